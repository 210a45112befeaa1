"""Focal loss, SuperLoss and mixup against their definitions, by other libraries where there are any."""

import math

import pytest
import torch
from scipy import optimize, special, stats
from torch import nn

from dataloaders.sources import GaussianSource
from losses.cross_entropy_loss import CrossEntropyLoss, LabelledBatch, beta, lambert_w, super_loss
from models.classifier.classifier import Classifier

LOGITS = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 3
LABEL = torch.arange(64) % 5


class Plain(Classifier):
    """Its images are its logits."""

    def __init__(self):
        super().__init__()
        self.num_classes, self.head = 5, nn.Linear(1, 1)

    def features(self, images):
        return images.flatten(1)

    def forward(self, images):
        return images.flatten(1)


def images(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :, None, None]


def test_focal_loss_is_cross_entropy_times_what_is_missing_of_certainty():
    p = LOGITS.double().softmax(1)[torch.arange(64), LABEL]
    found = CrossEntropyLoss(Plain(), focusing=2.0)(LabelledBatch(images(LOGITS), LABEL))["loss"]
    assert found.item() == pytest.approx((-((1 - p) ** 2) * p.log()).mean().item(), rel=1e-5)


def test_lambert_w_is_scipys():
    x = torch.cat(
        [torch.linspace(-1 / math.e + 1e-9, 2, 400, dtype=torch.float64), torch.logspace(0, 4, 50, dtype=torch.float64)]
    )
    torch.testing.assert_close(lambert_w(x), torch.from_numpy(special.lambertw(x.numpy()).real), rtol=1e-9, atol=2e-7)


@pytest.mark.parametrize("strength", [0.25, 1.0, 4.0])
def test_super_loss_is_the_minimum_over_the_weight_and_its_gradient_that_weight(strength):
    threshold = math.log(5)
    for loss in (0.01, 1.0, 1.7, 4.0, 12.0):
        value = torch.tensor([loss], dtype=torch.float64, requires_grad=True)
        found = super_loss(value, threshold, strength)
        least = optimize.minimize_scalar(
            lambda u, excess=loss - threshold: excess * math.exp(u) + strength * u * u, bounds=(-8, 1), method="bounded",
            options={"xatol": 1e-9},
        )  # fmt: skip
        if loss > threshold - 2 * strength / math.e:  # else there is none and the weight stays at e
            assert found.item() == pytest.approx(least.fun, rel=1e-5, abs=1e-6)
        found.sum().backward()
        assert value.grad.item() == pytest.approx(min(math.exp(least.x), math.e), rel=1e-3)


def test_super_loss_trusts_hard_rows_less():
    rows = torch.tensor([0.1, math.log(5), 5.0], requires_grad=True)
    super_loss(rows, math.log(5), 1.0).sum().backward()
    assert rows.grad[0] > 1 and rows.grad[1] == pytest.approx(1) and rows.grad[2] < 0.5


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_beta_draws_are_beta(alpha):
    drawn = beta(alpha, 20_000, torch.Generator().manual_seed(1))
    lower = drawn[drawn < 0.5].double().numpy()  # near 1 a float has few values
    assert abs(len(lower) / len(drawn) - 0.5) < 0.015
    assert stats.kstest(lower, lambda x: 2 * stats.beta(alpha, alpha).cdf(x)).pvalue > 1e-3


def test_mixup_mixes_images_and_losses_alike_and_depends_on_the_generator_alone():
    loss = CrossEntropyLoss(Plain(), mixup=1.0)
    given = (GaussianSource([5, 1, 1]), images(LOGITS), LABEL)
    one, two = (loss.batch(*given, torch.Generator().manual_seed(3), 0.5) for _ in range(2))
    assert torch.equal(one.images, two.images) and one.share is not None and 0 < one.share.max() <= 0.5
    row = int(one.share.argmax())
    other = next(k for k in range(64) if torch.allclose(
        one.images[row, :, 0, 0], (1 - one.share[row]) * LOGITS[row] + one.share[row] * LOGITS[k], atol=1e-6
    ))  # fmt: skip
    assert one.other[row] == LABEL[other]
    log_p = one.images.flatten(1).log_softmax(1)
    own, mixed = (-log_p[torch.arange(64), label] for label in (LABEL, one.other))
    expected = ((1 - one.share) * own + one.share * mixed).mean()
    torch.testing.assert_close(loss(one)["loss"], expected)


def test_images_are_distorted_before_they_are_mixed_and_labels_stay():
    x = torch.rand(64, 1, 5, 1, generator=torch.Generator().manual_seed(0))
    source, words = GaussianSource([1, 5, 1]), {"elastic": 0.5}
    plain, mixed = (
        CrossEntropyLoss(Plain(), **words, **more).batch(source, x, LABEL, torch.Generator().manual_seed(3), 0.5)
        for more in ({}, {"mixup": 1.0})
    )
    assert plain.label is LABEL and plain.other is None and not torch.equal(plain.images, x)
    other = next(k for k in range(64) if torch.allclose(
        mixed.images[0], torch.lerp(plain.images[0], plain.images[k], mixed.share[0]), atol=1e-6
    ))  # fmt: skip
    assert mixed.other[0] == LABEL[other]


def test_plain_cross_entropy_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    CrossEntropyLoss(Plain()).batch(GaussianSource([5, 1, 1]), images(LOGITS), LABEL, generator, 0.0)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.slow
def test_all_together_compile_to_one_graph_and_equal_eager():
    words = {"focusing": 1.0, "superloss": 2.0, "mixup": 1.0}
    network = nn.Linear(5, 5)

    class Net(Plain):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, images):
            return self.inner(images.flatten(1))

    loss = CrossEntropyLoss(Net(), **words)
    batch = loss.batch(GaussianSource([5, 1, 1]), images(LOGITS), LABEL, torch.Generator().manual_seed(3), 0.5)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    a, b = (torch.autograd.grad(one(batch)["loss"], list(network.parameters())) for one in (loss, compiled))
    torch.testing.assert_close(a, b)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in a)
