"""Couplings: who is paired with whom, held against every possible assignment."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from common.errors import UserError
from losses.couplings import Coupling, IndependentCoupling, MinibatchOTCoupling, SinkhornCoupling
from models.inputs import join_condition

seeds = st.integers(0, 10_000)


def batch(n: int, seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, data and the data's row numbers as labels."""
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, n, *shape, generator=generator)
    return x0, 0.7 + 2 * x1, torch.arange(n)


def squared_distance(x0: Tensor, x1: Tensor) -> float:
    return float((x0.double() - x1.double()).square().sum())


@settings(max_examples=25, deadline=None)
@given(seed=seeds, shape=st.sampled_from([(1,), (2,), (1, 2, 2)]))
def test_optimal_transport_is_the_cheapest_of_all_assignments(seed: int, shape: tuple[int, ...]) -> None:
    x0, x1, label = batch(5, seed, *shape)
    paired = MinibatchOTCoupling().pair(x0, x1, label, torch.Generator())
    cheapest = min(squared_distance(x0, x1[list(order)]) for order in itertools.permutations(range(5)))
    assert squared_distance(paired[0], paired[1]) == pytest.approx(cheapest, rel=1e-5)


def test_optimal_transport_in_one_dimension_pairs_by_rank() -> None:
    x0, x1, _ = batch(200, 0, 1)
    x0, x1, _ = MinibatchOTCoupling().pair(x0, x1, None, torch.Generator())
    assert torch.equal(x0.flatten().argsort(), x1.flatten().argsort())


@pytest.mark.parametrize(
    ("rows", "offset", "scale"), [(64, 1000, 1), (300, 0, 1), (300, 1000, 1), (300, 1, 1e-6), (200, 5, 0)]
)
def test_many_rows_far_from_the_origin_near_each_other_or_all_the_same_are_paired_exactly(rows, offset, scale) -> None:
    """Prices that shorten the search change no assignment; products in float32 would lose the differences that decide."""
    x0, x1, _ = batch(rows, 0, 2)
    x0, x1 = offset + scale * x0, offset + scale * x1
    exact = np.square(x0.double().numpy()[:, None] - x1.double().numpy()[None]).sum(-1)
    paired = MinibatchOTCoupling().pair(x0, x1, None, torch.Generator())
    assert squared_distance(paired[0], paired[1]) == pytest.approx(exact[linear_sum_assignment(exact)].sum(), rel=1e-9)


@pytest.mark.parametrize("coupling", [IndependentCoupling(), MinibatchOTCoupling()], ids=lambda c: type(c).__name__)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=st.integers(1, 40))
def test_every_row_is_used_once_and_labels_stay_with_their_data(coupling: Coupling, seed: int, n: int) -> None:
    x0, x1, label = batch(n, seed, 2)
    y0, y1, kept = coupling.pair(x0, x1, label, torch.Generator())
    assert torch.equal(y0, x0)
    assert kept is not None and sorted(kept.tolist()) == list(range(n))
    assert torch.equal(y1, x1[kept])
    assert coupling.pair(x0, x1, None, torch.Generator())[2] is None


@pytest.mark.parametrize("coupling", [IndependentCoupling(), MinibatchOTCoupling()], ids=lambda c: type(c).__name__)
def test_pairing_is_deterministic_and_touches_no_random_state(coupling: Coupling) -> None:
    x0, x1, label = batch(32, 1, 2)
    generator = torch.Generator().manual_seed(5)
    before = (generator.get_state(), torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    first = coupling.pair(x0, x1, label, generator)
    after = (generator.get_state(), torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2:] == after[2:]
    second = coupling.pair(x0, x1, label, torch.Generator().manual_seed(6))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_independent_coupling_leaves_the_batch_as_it_comes() -> None:
    given = batch(8, 2, 3)
    assert all(part is own for part, own in zip(IndependentCoupling().pair(*given, torch.Generator()), given, strict=True))


@pytest.mark.parametrize("weight", [0.0, 1e6])
def test_pairing_within_groups_is_the_pairing_of_each_group(weight: float) -> None:
    draw, label = torch.Generator().manual_seed(0), torch.tensor([0, 1, 1, 0, 0, 0, 1, 1, 0, 1])
    x0, x1 = torch.randn(10, 2, generator=draw), torch.randn(10, 2, generator=draw)
    whole, grouped = MinibatchOTCoupling(label_weight=weight), MinibatchOTCoupling(group=4, label_weight=weight)
    parts = [whole.pair(x0[i : i + 4], x1[i : i + 4], label[i : i + 4], draw)[1] for i in (0, 4, 8)]
    assert torch.equal(grouped.pair(x0, x1, label, draw)[1], torch.cat(parts))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, weight=st.sampled_from([0.5, 5.0, float("inf")]))
def test_pairs_of_two_classes_cost_as_much_more_as_is_asked(seed: int, weight: float) -> None:
    x0, x1, _ = batch(6, seed, 2)
    label = torch.tensor([0, 1, 0, 1, 2, 0])
    a, b, kept = MinibatchOTCoupling(label_weight=weight).pair(x0, x1, label, torch.Generator())

    def cost(order: list[int]) -> float:
        differ = int((label != label[order]).sum())
        return squared_distance(x0, x1[order]) + (weight * differ if differ else 0.0)

    found = squared_distance(a, b) + (weight * int((kept != label).sum()) if (kept != label).any() else 0.0)
    assert found == pytest.approx(min(cost(list(order)) for order in itertools.permutations(range(6))), rel=1e-5)


def test_many_rows_are_paired_within_their_classes() -> None:
    x0, x1, _ = batch(300, 0, 2)
    label = torch.arange(300) % 3
    own = MinibatchOTCoupling(label_weight=float("inf")).pair(x0, x1, label, torch.Generator())
    assert torch.equal(own[2], label)
    for k in range(3):
        alone = MinibatchOTCoupling().pair(x0[label == k], x1[label == k], None, torch.Generator())
        assert torch.equal(own[1][label == k], alone[1])


@pytest.mark.parametrize("kind", [MinibatchOTCoupling, SinkhornCoupling])
def test_labels_with_more_than_a_class_are_paired_by_that(kind: type[Coupling]) -> None:
    """As an augmentation or a condition gives them: a class, then numbers of each row's own."""
    x0, x1, _ = batch(12, 0, 2)
    classes = torch.arange(12) % 2
    label = join_condition(classes, torch.randn(12, 3, generator=torch.Generator().manual_seed(1)))
    paired = kind(label_weight=1e6).pair(x0, x1, label, torch.Generator().manual_seed(2))
    alone = kind(label_weight=1e6).pair(x0, x1, classes, torch.Generator().manual_seed(2))
    assert torch.equal(paired[1], alone[1]) and torch.equal(paired[2][:, 0], alone[2].float())


@pytest.mark.parametrize("coupling", [MinibatchOTCoupling(label_weight=1.0), SinkhornCoupling(label_weight=1.0)])
def test_a_weight_of_labels_without_labels_is_one_sentence(coupling: Coupling) -> None:
    x0, x1, _ = batch(4, 0, 2)
    with pytest.raises(UserError, match="label_weight needs labels"):
        coupling.pair(x0, x1, None, torch.Generator())


@pytest.mark.parametrize(("offset", "blur"), [(0, 0.1), (1000, 0.1), (0, 0.02), (0, 3.0)])
def test_the_entropic_plan_has_its_marginals_and_the_form_that_makes_it_least(offset: float, blur: float) -> None:
    """A plan with these marginals is the least if and only if log P is -cost / eps but for what rows, and columns, have in
    common: the log-odds of every 2 x 2 block are those of the costs."""
    x0, x1, label = batch(40, 1, 2)
    x0, x1, weight = x0 + offset, x1 - offset, torch.where(label[:, None] % 2 == label % 2, 0.0, 0.7)
    plan = SinkhornCoupling(blur, 1000).plan(x0, x1, weight).double()
    assert float((plan.sum(0) - 1).abs().max()) < (1e-4 if blur > 0.02 else 0.05)  # the sharper the slower
    assert float((plan.sum(1) - 1).abs().max()) < 1e-5
    a, b = x0.double(), x1.double()
    cost = (a[:, None] - b).square().sum(-1) + weight
    centred = (a - a.mean(0)).square().sum(1).mean() + (b - b.mean(0)).square().sum(1).mean()

    def odds(value: Tensor) -> Tensor:
        return value[:-1, :-1] + value[1:, 1:] - value[:-1, 1:] - value[1:, :-1]

    seen = plan.clamp(min=1e-300).log()
    certain = torch.stack([seen[:-1, :-1], seen[1:, 1:], seen[:-1, 1:], seen[1:, :-1]]).amin(0) > -60
    assert certain.float().mean() > 0.05
    torch.testing.assert_close(odds(seen)[certain], odds(-cost / (blur * centred))[certain], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("steps", [1, 3, 25])
def test_the_entropic_plan_is_of_as_many_steps_as_are_asked(steps: int) -> None:
    """Against the plain iteration in logarithms, of one row and column update before the first step."""
    x0, x1, _ = batch(9, 5, 2)
    a, b = x0.double() - x0.double().mean(0), x1.double() - x1.double().mean(0)
    gain = 2 * a @ b.T / (0.05 * (a.square().sum(1).mean() + b.square().sum(1).mean()))
    column = torch.zeros(9, dtype=torch.float64)
    for _ in range(steps + 1):
        row = -torch.logsumexp(gain + column, 1, keepdim=True)
        column = -torch.logsumexp(gain + row, 0)
    torch.testing.assert_close(SinkhornCoupling(0.05, steps).plan(x0.double(), x1.double()), torch.softmax(gain + column, 1))


def test_a_small_blur_gives_the_exact_assignment_and_a_large_one_independent_pairs() -> None:
    x0, x1, _ = batch(12, 3, 2)
    exact = MinibatchOTCoupling.partners(x0, x1)
    assert torch.equal(SinkhornCoupling(3e-4, 20_000).plan(x0, x1).argmax(1), exact)
    assert torch.allclose(SinkhornCoupling(1e4).plan(x0, x1), torch.full((12, 12), 1 / 12), atol=1e-4)


def test_partners_are_drawn_as_often_as_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    law, (_, x1, label) = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0]), batch(5, 4, 2)
    monkeypatch.setattr(SinkhornCoupling, "plan", lambda self, x0, x1, others: law.expand(len(x0), 5))
    paired = SinkhornCoupling().pair(torch.zeros(10_000, 2), x1, label, torch.Generator().manual_seed(0))
    counts, expected = paired[2].bincount(minlength=5), 10_000 * law
    assert torch.equal(paired[1], x1[paired[2]]) and counts[4] == 0
    assert float(((counts - expected).square() / expected)[:4].sum()) < 21.1  # chi-squared of 3, p = 1e-4


def test_entropic_pairs_of_gaussians_have_the_covariance_of_the_schroedinger_bridge() -> None:
    """Of cost |x - y|^2, eps = 2 s^2: (sqrt(4 a^2 b^2 + s^4) - s^2) / 2 (Janati et al. 2020, arXiv 2006.02572)."""
    draw = torch.Generator().manual_seed(0)
    a, b, blur = 1.0, 2.0, 0.5
    found = []
    for _ in range(10):
        x0, x1 = a * torch.randn(1000, 1, generator=draw), 5 + b * torch.randn(1000, 1, generator=draw)
        plan = SinkhornCoupling(blur).plan(x0, x1)
        found.append(float(((x0 - x0.mean()).T @ plan @ (x1 - x1.mean()) / 1000).squeeze()))
    s2 = blur * (a * a + b * b) / 2
    mean, error = np.mean(found), np.std(found) / 10**0.5
    assert error < 0.03 and abs(mean - ((4 * a * a * b * b + s2 * s2) ** 0.5 - s2) / 2) < 4 * error


@pytest.mark.parametrize("weight", [0, 1e6])
def test_a_conditional_run_says_when_its_pairs_ignore_the_class(
    small_run, capsys: pytest.CaptureFixture[str], weight: float
):
    words = ["dataloaders=moons", "conditional=true", "loss/coupling=minibatch_ot", f"loss.coupling.label_weight={weight}"]
    small_run("x", *words, "max_steps=1")
    assert ("loss.coupling.label_weight=1e6 pairs within classes" in capsys.readouterr().out) == (weight == 0)


@pytest.mark.parametrize("weight", [0, 1e6])
def test_a_run_on_conditions_says_that_its_pairs_ignore_them(small_run, capsys: pytest.CaptureFixture[str], weight: float):
    words = ["conditional=true", "loss/coupling=minibatch_ot", f"loss.coupling.label_weight={weight}"]
    small_run("x", "dataloaders=regression", *words, "max_steps=1")
    assert "use loss/coupling=independent" in " ".join(capsys.readouterr().out.split())
