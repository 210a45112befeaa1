"""Time samplers: every file in configs/loss/time_sampler, their distributions and the layout of a batch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy import stats
from scipy.special import logit

from losses.time_samplers import DyadicTimes, LogitNormalTimes, TimeSampler, UniformTimes

CONFIGS = Path(__file__).parents[2] / "configs" / "loss" / "time_sampler"
NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
N = 20_000

Distribution = Callable[[np.ndarray], np.ndarray]


def configured(name: str, **settings: float) -> TimeSampler:
    return instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"), **settings)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agrees(sample: torch.Tensor, distribution: Distribution) -> bool:
    """Kolmogorov-Smirnov; the seeds are fixed, so a pass is a pass for good."""
    return stats.kstest(sample.double().numpy(), distribution).pvalue > 0.01


def logit_normal(mean: float, std: float) -> Distribution:
    return lambda t: stats.norm.cdf((logit(t) - mean) / std)


CASES: list[tuple[Callable[[float], TimeSampler], Distribution]] = [
    (lambda ratio: UniformTimes(ratio), lambda t: np.clip(t, 0, 1)),
    (lambda ratio: LogitNormalTimes(ratio=ratio), logit_normal(0.0, 1.0)),
    (lambda ratio: LogitNormalTimes(-0.4, 1.0, ratio), logit_normal(-0.4, 1.0)),
    (lambda ratio: LogitNormalTimes(2.0, 0.5, ratio), logit_normal(2.0, 0.5)),
]


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("sampler, cdf", CASES)
def test_single_times_follow_their_distribution(
    sampler: Callable[[float], TimeSampler], cdf: Distribution, ratio: float
) -> None:
    rows = round(N / (1 - ratio))
    r, t = (time[rows - N :] for time in sampler(ratio).sample(rows, seeded()))
    assert torch.equal(r, t) and agrees(r, cdf)


@pytest.mark.parametrize("sampler, cdf", CASES)
def test_pairs_are_two_independent_draws_sorted(sampler: Callable[[float], TimeSampler], cdf: Distribution) -> None:
    r, t = sampler(1.0).sample(N, seeded())
    assert agrees(r, lambda x: 1 - (1 - cdf(x)) ** 2)
    assert agrees(t, lambda x: cdf(x) ** 2)
    gap = torch.from_numpy(cdf(t.double().numpy()) - cdf(r.double().numpy()))  # between two sorted uniforms
    assert agrees(gap, lambda d: 1 - (1 - d) ** 2)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, derandomize=True)  # two fp32 draws tie once in 2^24
@given(n=st.integers(1, 300), ratio=st.floats(0, 1), seed=st.integers(0, 1000))
def test_the_first_rows_have_an_interval_and_the_rest_have_none(name: str, n: int, ratio: float, seed: int) -> None:
    sampler = configured(name, ratio=ratio)
    r, t = sampler.sample(n, seeded(seed))
    rows = round(ratio * n)
    assert r.shape == t.shape == (n,) and r.dtype == t.dtype == torch.float32
    assert sampler.interval_rows(n) == rows
    assert (r[:rows] < t[:rows]).all() and torch.equal(r[rows:], t[rows:])
    assert r.min() >= 0 and t.max() <= 1


@pytest.mark.parametrize("sampler, cdf", [(UniformTimes(0.5, to_data=True), CASES[0][1]),
                                          (LogitNormalTimes(2.0, 0.5, 0.5, to_data=True), CASES[3][1])])  # fmt: skip
def test_to_data_every_interval_ends_at_one_and_its_state_has_a_single_time(sampler: TimeSampler, cdf: Distribution) -> None:
    r, t = sampler.sample(2 * N, seeded())
    assert torch.equal(t[:N], torch.ones(N)) and torch.equal(r[N:], t[N:]) and agrees(r[:N], cdf)


@pytest.mark.parametrize("ratio", [0.0, 0.75])
@pytest.mark.parametrize("name", NAMES)
def test_times_come_from_the_given_generator_alone(name: str, ratio: float) -> None:
    sampler, untouched = configured(name, ratio=ratio), torch.get_rng_state()
    generator = seeded(3)
    first, later = sampler.sample(64, generator), sampler.sample(64, generator)
    again, other = sampler.sample(64, seeded(3)), sampler.sample(64, seeded(4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    fresh = first[0] if name != "dyadic" else first[0][sampler.interval_rows(64) :]  # dyadic intervals begin on a grid
    assert not torch.isin(fresh, torch.cat([later[0], other[0]])).any()
    assert not torch.equal(first[0], later[0]) and not torch.equal(first[0], other[0])
    assert torch.equal(untouched, torch.get_rng_state())


@pytest.mark.parametrize("name, rows", [(name, 125 if name == "dyadic" else 0) for name in NAMES])
def test_intervals_are_off_by_default_but_for_the_sampler_made_of_them(name: str, rows: int) -> None:
    assert configured(name).interval_rows(1000) == rows


@given(levels=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_dyadic_intervals_are_whole_cells_of_a_dyadic_grid(levels: int, seed: int) -> None:
    r, t = DyadicTimes(levels, ratio=1.0).sample(200, seeded(seed))
    k = torch.log2(1 / (t - r))
    assert torch.equal(k, k.round()) and k.min() >= 0 and k.max() <= levels - 1
    cell = r / (t - r)
    assert torch.equal(cell, cell.round())


def test_dyadic_lengths_and_places_are_uniform() -> None:
    r, t = DyadicTimes(4, ratio=1.0).sample(N, seeded())
    k = torch.log2(1 / (t - r)).long()
    assert stats.chisquare(torch.bincount(k, minlength=4)).pvalue > 0.01
    for level in range(1, 4):
        cells = (r[k == level] * 2**level).long()
        assert stats.chisquare(torch.bincount(cells, minlength=2**level)).pvalue > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_the_intervals_goes_the_whole_way_and_the_rest_stays_as_drawn(name: str) -> None:
    plain, whole = (configured(name, ratio=0.5, **more).sample(64, seeded()) for more in ({}, {"whole": 0.25}))
    assert torch.equal(whole[0][:8], torch.zeros(8)) and torch.equal(whole[1][:8], torch.ones(8))
    assert all(torch.equal(one[8:], other[8:]) for one, other in zip(plain, whole, strict=True))
