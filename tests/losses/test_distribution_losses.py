"""Losses that match distributions against their formulas, and where they are zero."""

import math

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from losses.couplings import IndependentCoupling
from losses.drifting_loss import DriftingLoss
from losses.inductive_moment_matching_loss import InductiveMomentMatchingLoss, MomentBatch
from losses.objective import FlowObjective
from losses.paths import LinearPath, VariancePreservingPath
from losses.predictions import VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.weightings import AdaptiveWeighting, UniformWeighting, Weighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel

STD = 0.4  # of the data in the plane, about the origin, as is the noise of std 1


class Turns(VelocityModel):
    """u(z, r, t) of the map z S(t) / S(r) times `stretch`, turned by `angle` (t - r): right marginals whatever the angle. A
    label adds its number.
    """

    def __init__(self, angle: float = 0.0, stretch: float = 1.0, classes: int = 0):
        super().__init__()
        self.angle, self.stretch, self.num_classes = angle, stretch, classes
        self.shift = torch.nn.Parameter(torch.zeros(2))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input)
        (r, t), gap = times.T, (times[:, 1] - times[:, 0])[:, None].clamp(min=1e-6)
        size = lambda time: ((1 - time).square() + (STD * time).square()).sqrt()  # noqa: E731
        angle, ratio = self.angle * (t - r), self.stretch ** (t - r) * size(t) / size(r)
        turned = torch.stack(
            [z[:, 0] * angle.cos() - z[:, 1] * angle.sin(), z[:, 0] * angle.sin() + z[:, 1] * angle.cos()], 1
        )
        number = 0 if label is None else label[:, None]
        return (ratio[:, None] * turned + self.shift - z) / gap + number


def around(
    kind: type[FlowObjective], network: VelocityModel, weighting: Weighting | None = None, **settings
) -> FlowObjective:
    parts = {"path": LinearPath(), "coupling": IndependentCoupling(), "prediction": VelocityPrediction()}
    parts |= {"time_sampler": UniformTimes(1.0, 0.25), "weighting": weighting or UniformWeighting()}
    return kind(network=network, **(parts | settings))


def drifting(network: VelocityModel | None = None, tau: tuple[float, ...] = (0.5,), **settings) -> DriftingLoss:
    made = around(DriftingLoss, network or Turns(), tau=list(tau), **settings)
    assert isinstance(made, DriftingLoss)
    return made


def matching(network: VelocityModel, **settings) -> InductiveMomentMatchingLoss:
    made = around(InductiveMomentMatchingLoss, network, **({"step": 0.3, "width": 0.7} | settings))
    assert isinstance(made, InductiveMomentMatchingLoss)
    return made


def drift_of_one(x: Tensor, data: list[Tensor], samples: list[Tensor], tau: float) -> Tensor:
    """V(x) as the double sum of its formula."""
    k = lambda y: math.exp(-float((x - y).norm()) / tau)  # noqa: E731
    total = sum((k(a) * k(b) * (a - b) for a in data for b in samples), torch.zeros(2, dtype=torch.float64))
    return total / (sum(map(k, data)) * sum(map(k, samples)))


def test_the_drift_is_its_double_sum_over_the_other_rows_of_the_same_label():
    x, data = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.tensor([0, 1, 0, 0, 1, 2, 0])
    found = drifting(tau=(0.5, 2.0)).drift(x, data, label)
    for i in range(7):
        near = [j for j in range(7) if j != i and label[j] == label[i]]
        parts = (
            [drift_of_one(x[i], [data[j] for j in near], [x[j] for j in near], tau) for tau in (0.5, 2.0)] if near else []
        )
        torch.testing.assert_close(found[i], sum(parts, torch.zeros(2, dtype=torch.float64)))


def test_exchanging_data_and_samples_turns_the_drift_round_so_that_between_equals_its_mean_is_exactly_zero():
    x, one, other = torch.randn(3, 9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = ((one, other), (other, one))
    there, back = (drifting(tau=(0.1, 1.0)).drift(torch.cat([x[:1], a[1:]]), b, None)[0] for a, b in pairs)
    assert there.norm() > 0.1
    torch.testing.assert_close(there, -back)


@pytest.mark.parametrize("label", [None, torch.arange(32) % 2])
def test_samples_move_by_the_drift_and_a_single_row_stays(label):
    loss = drifting(Turns(stretch=1.5, classes=2), label_dropout=0.3)
    batch = loss.draw(*torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(0)), label, torch.Generator())
    assert label is None or 0 < (batch.label == 2).sum() < 20
    x = loss.flow_map(batch.raw_source, torch.tensor(0.0), torch.tensor(1.0), batch.label).detach()
    v = loss.drift(x, batch.raw_target, batch.label)
    value = loss(batch)["loss"]
    torch.testing.assert_close(value, v.square().sum(1).mean())
    torch.testing.assert_close(torch.autograd.grad(value, [loss.network.shift])[0], -2 * v.mean(0))
    alone = loss(batch.split(1)[0])["loss"]
    assert alone == 0 and torch.autograd.grad(alone, [loss.network.shift])[0].eq(0).all()


def drawn(loss: InductiveMomentMatchingLoss, rows: int, label: Tensor | None = None) -> MomentBatch:
    x0, x1 = torch.randn(2, rows, 2, generator=torch.Generator().manual_seed(0))
    return loss.draw(x0, STD * x1, label, torch.Generator().manual_seed(1))


def test_a_group_shares_its_times_and_label_and_the_later_state_is_of_the_same_pair():
    loss = matching(Turns(classes=3), label_dropout=0.2)
    batch = drawn(loss, 63, torch.arange(63) % 3)
    first = torch.arange(63) // 4 * 4
    assert torch.equal(batch.r, batch.r[first]) and torch.equal(batch.t, batch.t[first])
    assert (batch.label.diff() >= 0).all() and (batch.label == 3).any()
    assert (batch.r < batch.later_time).all() and (batch.later_time <= batch.t).all()
    torch.testing.assert_close(batch.later_time - batch.r, (batch.t - batch.r).clamp(max=0.3))
    whole = (batch.r == 0) & (batch.t == 1)
    assert whole.sum() == 16 and whole.nonzero().max() > 20  # a quarter, of whatever label
    for z, time in ((batch.input, batch.r), (batch.later, batch.later_time)):
        torch.testing.assert_close(z, time[:, None] * batch.raw_target + (1 - time[:, None]) * batch.raw_source)


def test_on_a_path_that_ends_before_the_data_the_times_end_there():
    loss = matching(Turns(), path=VariancePreservingPath())
    batch = drawn(loss, 64)
    assert 0 < batch.r.max() < batch.t.max() == loss.path.last_time < 1


def test_the_moment_loss_is_its_sum_over_different_rows_of_a_group_and_label():
    loss = matching(Turns(1.0, 1.3, classes=2)).double()
    batch = drawn(loss, 10, torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1, 1]))
    x = loss.flow_map(batch.input, batch.r, batch.t, batch.label)
    y = loss.flow_map(batch.later, batch.later_time, batch.t, batch.label).detach()
    k = lambda a, b: torch.exp(-(a - b).norm() / 0.7)  # noqa: E731
    near = [(i, j) for i in range(10) for j in range(10) if i != j and i // 4 == j // 4 and batch.label[i] == batch.label[j]]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in near) / len(near)
    found = loss(batch)["loss"]
    assert len(near) == 20
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    slopes = [torch.autograd.grad(value, [loss.network.shift])[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=0)
    assert matching(Turns())(drawn(loss, 1))["loss"] == 0


def test_the_moment_loss_is_zero_at_every_map_with_the_right_marginals_and_at_no_other():
    """The flow, and the same turned on the way; its mean and standard error over 300 batches of 512 rows."""

    def mean(network: VelocityModel) -> tuple[float, float]:
        loss, generator = matching(network), torch.Generator().manual_seed(0)
        with torch.no_grad():
            values = torch.stack([
                loss(loss.draw(x0, STD * x1, None, generator))["loss"]
                for x0, x1 in (torch.randn(2, 512, 2, generator=generator) for _ in range(300))
            ])  # fmt: skip
        return float(values.mean()), float(values.std() / 300**0.5)

    for angle in (0.0, 2.0):
        value, error = mean(Turns(angle))
        assert abs(value) < 3 * error < 2e-3, (angle, value, error)
    value, error = mean(Turns(stretch=1.5))
    assert value > 10 * error


def test_what_does_not_go_with_these_losses_is_said():
    with pytest.raises(UserError, match="no errors that could be weighed"):
        matching(Turns(), weighting=AdaptiveWeighting())
    augmented = torch.zeros(4, 3, dtype=torch.int64)
    for made in (drifting(Turns(classes=2)), matching(Turns(classes=2))):
        with pytest.raises(UserError, match="alone with its own"):
            made.draw(*torch.randn(2, 4, 2), augmented, torch.Generator())
        with pytest.raises(UserError, match="not its velocity at an instant"):
            made.check_learns_velocity()
