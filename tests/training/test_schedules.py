"""Schedules: a contract over every file in configs/schedule, closed forms, and torch's own schedulers."""

import math
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from training.schedules import Constant, Cosine, Exponential, Linear, Plateau, Schedule, Step

CONFIGS = Path(__file__).parents[2] / "configs" / "schedule"
NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
RATE = 0.5  # of the optimizers that torch's schedulers drive


def configured(name: str, **settings: float) -> Schedule:
    return instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"), **settings)


def documented_end(name: str) -> float:
    """Where a run ends, by the words of the config: `final`, or gamma once for each milestone, or where it began."""
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    return config.get("final", config.get("gamma", 1.0) ** len(config.get("milestones", [])))


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)


def torch_factors(scheduler: LRScheduler, driven: torch.optim.Optimizer, steps: int) -> list[float]:
    """The factors of steps 0, 1, ..., steps."""
    factors = []
    for _ in range(steps + 1):
        factors.append(driven.param_groups[0]["lr"] / RATE)
        driven.step()
        if len(factors) <= steps:
            scheduler.step()
    return factors


def factors(schedule: Schedule, total: int) -> list[float]:
    """The factors of steps 0, 1, ..., total; the last one is where the run would arrive."""
    return [schedule.factor(step, total) for step in range(total + 1)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(total=st.integers(1, 200), warmup=st.integers(0, 60))
def test_factors_stay_in_the_unit_interval_and_end_where_documented(name: str, total: int, warmup: int) -> None:
    schedule = configured(name, warmup_steps=warmup)
    assert all(0 <= factor <= 1 for factor in factors(schedule, total))
    if warmup < total:
        assert schedule.factor(total, total) == pytest.approx(documented_end(name), abs=1e-12)
    assert schedule.factor(total + warmup + 5, total) == schedule.factor(total + warmup, total), "past the end it stays"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(total=st.integers(2, 200), warmup=st.integers(1, 60))
def test_warmup_rises_linearly_to_where_the_schedule_starts(name: str, total: int, warmup: int) -> None:
    schedule, start = configured(name, warmup_steps=warmup), configured(name).factor(0, max(1, total - warmup))
    rise = [schedule.factor(step, total) for step in range(warmup + 1)]
    assert rise[:-1] == pytest.approx([start * (step + 1) / warmup for step in range(warmup)])
    assert rise[-1] == pytest.approx(start), "the first step after warm-up is the schedule's first"
    assert rise[0] > 0, "no step is wasted on a rate of 0"


@pytest.mark.parametrize("name", NAMES)
def test_after_warmup_the_schedule_runs_over_the_steps_that_are_left(name: str) -> None:
    late, early = configured(name, warmup_steps=30), configured(name)
    assert factors(late, 130)[30:] == pytest.approx(factors(early, 100))


@pytest.mark.parametrize("name", NAMES)
def test_a_factor_depends_on_the_step_alone(name: str) -> None:
    schedule, order = configured(name, warmup_steps=7), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = {step: schedule.factor(step, 50) for step in order.tolist()}
    resumed = configured(name, warmup_steps=7)
    resumed.load_state_dict(schedule.state_dict())
    assert [shuffled[step] for step in range(50)] == factors(resumed, 50)[:-1]


@pytest.mark.parametrize("step", range(101))
def test_closed_forms(step: int) -> None:
    share, final = step / 100, 0.2
    assert Constant().factor(step, 100) == 1
    assert Linear(final).factor(step, 100) == pytest.approx((1 - share) + share * final)
    assert Cosine(final).factor(step, 100) == pytest.approx(final + (1 - final) * math.cos(math.pi * share / 2) ** 2)
    assert Exponential(final).factor(step, 100) == pytest.approx(math.exp(share * math.log(final)))
    fallen = 1.0 if step < 50 else 0.1 if step < 75 else 0.01
    assert Step([0.5, 0.75]).factor(step, 100) == pytest.approx(fallen)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_torchs(final: float) -> None:
    driven = optimizer()
    expected = torch_factors(CosineAnnealingLR(driven, T_max=80, eta_min=final * RATE), driven, 80)
    assert factors(Cosine(final), 80) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rise", [0.12, 0.3, 0.75])
@pytest.mark.parametrize("total", [3, 7, 10, 50, 101, 1960])
def test_one_cycle_is_torchs(total: int, rise: float) -> None:
    driven = optimizer()
    scheduler = OneCycleLR(driven, RATE, total_steps=total, pct_start=rise, div_factor=25)
    expected = torch_factors(scheduler, driven, total - 1)
    ours = factors(configured("one_cycle", rise=rise), total)
    assert ours[:-1] == pytest.approx(expected, abs=1e-12)
    assert ours[-2] == ours[-1] == 4e-6, "the last step of the run has the final rate"


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(0, 10) | st.just(math.nan), max_size=40), patience=st.integers(0, 4))
def test_plateau_drops_when_torch_does(values: list[float], patience: int) -> None:
    driven, plateau = optimizer(), Plateau(gamma=0.5, patience=patience)
    reference = ReduceLROnPlateau(driven, factor=0.5, patience=patience, threshold=0.0, eps=0.0)
    for value in values:
        plateau.observe(value)
        reference.step(value)
        assert plateau.factor(10, 100) == pytest.approx(driven.param_groups[0]["lr"] / RATE)


def test_plateau_waits_for_its_patience_and_a_best_value_starts_the_wait_anew() -> None:
    plateau, seen = Plateau(gamma=0.1, patience=2), []
    for value in [1.0, 1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0]:
        plateau.observe(value)
        seen.append(plateau.factor(0, 1))
    assert seen == pytest.approx([1, 1, 1, 1, 1, 1, 0.1, 0.1])


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(0, 10), min_size=1, max_size=20), split=st.integers(0, 20))
def test_plateau_goes_on_from_its_saved_state(values: list[float], split: int) -> None:
    whole, first, second = (Plateau(patience=1) for _ in range(3))
    for value in values:
        whole.observe(value)
    for value in values[:split]:
        first.observe(value)
    second.load_state_dict(first.state_dict())
    for value in values[split:]:
        second.observe(value)
    assert second.state_dict() == whole.state_dict()
    assert second.factor(3, 10) == whole.factor(3, 10)


def test_only_plateau_hears_the_metric() -> None:
    for name in set(NAMES) - {"plateau"}:
        schedule = configured(name)
        before = factors(schedule, 20)
        for _ in range(20):
            schedule.observe(1.0)
        assert factors(schedule, 20) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_in_epochs_is_that_of_as_many_steps(name: str) -> None:
    in_epochs, in_steps = configured(name, warmup_epochs=1.6), configured(name, warmup_steps=13)  # 12.8 steps
    in_epochs.count_in_steps(8)
    in_steps.count_in_steps(8)
    assert factors(in_epochs, 40) == factors(in_steps, 40)
    with pytest.raises(InstantiationException, match="two lengths of one warm-up"):
        configured(name, warmup_epochs=1.5, warmup_steps=12)
