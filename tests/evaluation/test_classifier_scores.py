"""Scores of classifiers against scikit-learn and torchmetrics."""

import pytest
import torch

from evaluation.classifier_evaluator import by_class, calibration_error, confusion_matrix, macro, matthews


@pytest.mark.parametrize("classes", [2, 7, 40])
@pytest.mark.parametrize("sure", [0.0, 2.0, 50.0])
def test_scores_are_those_of_scikit_learn(classes, sure):
    from sklearn import metrics  # both take seconds to import, which not every process need spend
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(classes)
    label = torch.randint(0, classes, (500,), generator=generator)
    label[label == classes - 1] = 0 if classes > 2 else 1  # a class without images
    logits = torch.randn(500, classes, generator=generator) + sure * torch.nn.functional.one_hot(label, classes)
    answer = logits.argmax(1)
    confusion = confusion_matrix(label, answer, classes)
    wanted = dict(zip(("precision", "recall", "f1"), metrics.precision_recall_fscore_support(
        label, answer, labels=range(classes), zero_division=0), strict=False))  # fmt: skip
    for name, found in by_class(confusion).items():
        assert found.numpy() == pytest.approx(wanted[name], abs=1e-6)
    averages = metrics.precision_recall_fscore_support(label, answer, average="macro", zero_division=0)
    for found, average in zip(by_class(confusion).values(), averages, strict=False):
        assert macro(found, confusion) == pytest.approx(average, abs=1e-6)
    assert matthews(confusion) == pytest.approx(metrics.matthews_corrcoef(label, answer), abs=1e-6)
    reference = multiclass_calibration_error(logits.softmax(1), label, num_classes=classes, n_bins=15)
    assert calibration_error(logits, label) == pytest.approx(reference.item(), abs=1e-6)


def test_one_answer_for_all_has_no_correlation():
    assert matthews(torch.tensor([[3, 0], [4, 0]])) == 0
