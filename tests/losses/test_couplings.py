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

from losses.couplings import Coupling, IndependentCoupling, MinibatchOTCoupling

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


def test_pairing_within_groups_is_the_pairing_of_each_group() -> None:
    draw = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(10, 2, generator=draw), torch.randn(10, 2, generator=draw)
    parts = [MinibatchOTCoupling().pair(x0[i : i + 4], x1[i : i + 4], None, draw)[1] for i in (0, 4, 8)]
    assert torch.equal(MinibatchOTCoupling(group=4).pair(x0, x1, None, draw)[1], torch.cat(parts))
