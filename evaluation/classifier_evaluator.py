"""Judges a trained classifier on held-out images."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError, printable
from common.progress import watched
from common.ranges import Count, CountFrom2
from common.seeds import generator_for
from evaluation.evaluator import Evaluation, Evaluator, held_out_states
from evaluation.metrics.base_metric import EvaluationInputs, Score, share_score
from losses.cross_entropy_loss import CrossEntropyLoss
from losses.objective import Objective
from models.inputs import split_label

CLASSES_LOGGED = 20  # with more classes, only the worst one's accuracy is logged


@dataclass
class ClassifierEvaluation(Evaluation):
    """confusion (K, K): images of each class (row) taken for each (column). class_names: None where they are numbers."""

    confusion: Tensor
    class_names: list[str] | None = None

    @property
    def names(self) -> list[str]:
        """Return the name of each class on one line, or its number."""
        if self.class_names is None:
            return [str(k) for k in range(len(self.confusion))]
        encodable = (name.encode(errors="backslashreplace").decode() for name in self.class_names)  # in other encodings
        return [printable(" ".join(name.split())) for name in encodable]

    @property
    def class_accuracy(self) -> Tensor:
        """Return (K,): share of each class's images taken for what they are; NaN for a class without images."""
        return self.confusion.diag() / self.confusion.sum(1)

    def heading(self, nfe: int) -> str:
        return f"scores of {int(self.confusion.sum()):,} held-out images in {len(self.confusion)} classes"


def confusion_matrix(label: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return (K, K) int64 on the CPU: pairs of label (row) and predicted (column), both (N,), counted."""
    return torch.bincount((label * classes + predicted).cpu(), minlength=classes**2).view(classes, classes)


class ClassifierEvaluator(Evaluator):
    """eval/accuracy, eval/accuracy_top5 (of more than 5 classes), eval/accuracy_class_<k>, eval/accuracy_class_min, means
    over the classes of precision, recall and F1, eval/mcc, eval/calibration_error and the loss as trained.

    samples / final_samples: held-out images judged during the run / at its end, at most, always the same.
    """

    def __init__(self, samples: CountFrom2, final_samples: CountFrom2, batch_size: Count = 1024):
        self.samples, self.final_samples, self.batch_size = samples, final_samples, batch_size

    def check(self, objective: Objective) -> CrossEntropyLoss:
        if not isinstance(objective, CrossEntropyLoss):
            raise UserError("evaluation=classifier judges classifiers, and this loss trains none; use evaluation=generator")
        return objective

    def names(self) -> list[str]:
        means = [f"eval/{name}" for name in ("precision_macro", "recall_macro", "f1_macro", "mcc", "calibration_error")]
        return ["eval/loss", "eval/accuracy", *means]

    @torch.no_grad()
    def evaluate(self, given: EvaluationInputs) -> ClassifierEvaluation:
        """Return how the objective's network classifies held-out images, in eval mode on their device."""
        begun, dataset = time.perf_counter(), given.dataset
        objective = self.check(given.objective).eval()
        network = objective.network
        generator = generator_for(0, "evaluation/classifier", 0, next(network.parameters()).device)
        images, label = held_out_states(dataset, self.final_samples if given.final else self.samples, generator)
        label = split_label(label)[0]
        assert label is not None
        with watched(network, f"evaluation, {len(images):,} images", len(images)):
            logits = torch.cat([network(part) for part in images.split(self.batch_size)]).float()
        loss = objective.loss_of(logits, label).item()
        logits, label = logits.cpu(), label.cpu()  # the scores count in float64, which MPS lacks
        confusion = confusion_matrix(label, logits.argmax(1), network.num_classes)
        scores = self.scores(logits, label, confusion)
        values = {"eval/loss": loss}
        for score in scores:
            values |= score.values()
        return ClassifierEvaluation(list(scores), [], values, time.perf_counter() - begun, confusion, dataset.class_names)

    def scores(self, logits: Tensor, label: Tensor, confusion: Tensor) -> list[Score]:
        """Return accuracies, with binomial standard errors."""
        classes, note = len(confusion), f"{len(label):,} held-out images"
        right = logits.topk(min(5, classes)).indices == label[:, None]
        shares = confusion.diag() / confusion.sum(1)
        named = {f"eval/accuracy_class_{k}": share for k, share in enumerate(shares.tolist()) if share == share}
        scores = [share_score("eval/accuracy", right[:, 0], note)]
        if classes > 5:
            scores.append(share_score("eval/accuracy_top5", right.any(1), note))
        worst, extra = min(named.values()), named if classes <= CLASSES_LOGGED else None
        scores.append(Score("eval/accuracy_class_min", worst, extra=extra, note=note))
        means = {f"eval/{name}_macro": macro(shares, confusion) for name, shares in by_class(confusion).items()}
        means |= {"eval/mcc": matthews(confusion), "eval/calibration_error": calibration_error(logits, label)}
        return scores + [Score(name, value, note=note) for name, value in means.items()]


def by_class(confusion: Tensor) -> dict[str, Tensor]:
    """Return precision, recall and F1 of each class (K,), 0 where nothing was taken for it, or it has no images."""
    right, taken, there = confusion.diag().double(), confusion.sum(0), confusion.sum(1)
    share = lambda whole: right / whole.clamp(min=1)  # noqa: E731
    return {"precision": share(taken), "recall": share(there), "f1": 2 * right / (taken + there).clamp(min=1)}


def macro(shares: Tensor, confusion: Tensor) -> float:
    """Return the mean over the classes that have images, or that images are taken for."""
    met = confusion.sum(0) + confusion.sum(1) > 0
    return shares[met].mean().item()


def matthews(confusion: Tensor) -> float:
    """Return the correlation of class and answer over all classes (Gorodkin 2004); 0 where all have one answer."""
    taken, there, total = confusion.sum(0).double(), confusion.sum(1).double(), confusion.sum().double()
    covariance = confusion.diag().sum() * total - taken @ there
    size = ((total.square() - taken @ taken) * (total.square() - there @ there)).sqrt()
    return (covariance / size).item() if size > 0 else 0.0


def calibration_error(logits: Tensor, label: Tensor, bins: int = 15) -> float:
    """Return how far certainty and accuracy are apart, the mean over images in equal bins of certainty (Guo et al. 2017)."""
    certainty, answer = logits.double().softmax(1).max(1)
    place = (certainty * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    apart = sums.index_add(0, place, (answer == label).double() - certainty)
    return (apart.abs().sum() / len(label)).item()
