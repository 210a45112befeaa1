"""The exact mean velocity of a mixture is where each objective is least: its expected gradient there is zero, by
quadrature, and is not once a sign, the order of the times or the side of the state is changed in the code."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from losses.alpha_flow_loss import AlphaFlowLoss
from losses.couplings import IndependentCoupling
from losses.meanflow_loss import ImprovedMeanFlowLoss, MeanFlowLoss
from losses.objective import FlowObjective
from losses.paths import LinearPath
from losses.predictions import VelocityPrediction
from losses.shortcut_loss import ShortcutLoss
from losses.split_meanflow_loss import SplitMeanFlowLoss
from losses.terminal_velocity_loss import TerminalVelocityLoss
from losses.time_samplers import UniformTimes
from losses.total_derivative import DerivativeObjective
from losses.weightings import UniformWeighting
from tests.losses.exact_mixture import OBJECTIVES, Exact, exact_mean_velocity, gradients, rows_at_points, velocity

pytestmark = pytest.mark.usefixtures("unified_in_double")
STATIONARY = [name for name in OBJECTIVES if name != "alpha_flow"]


@pytest.mark.parametrize("name", STATIONARY)
def test_the_exact_mean_velocity_is_stationary(name):
    assert gradients(name, Exact()).abs().max() < 1e-6


@pytest.mark.parametrize("name", STATIONARY)
def test_a_displaced_velocity_is_not(name):
    if name in ("shortcut", "split_meanflow"):
        wrong = Exact(lambda z, r, t: exact_mean_velocity(z, r, t) + (t - r))  # a constant would agree with itself
    else:
        wrong = Exact(lambda z, r, t: exact_mean_velocity(z, r, t) + 0.1 * z)
    assert gradients(name, wrong).abs().max() > 0.05


def readme_loss(old: str = "", new: str = "") -> FlowObjective:
    """The README's example of a loss, or a change of it, around the exact velocity."""
    section = (Path(__file__).resolve().parents[2] / "README.md").read_text().partition("## Adding a loss")[2]
    space: dict[str, Any] = {"__name__": "losses.late_loss", "torch": torch}
    code = section.partition("```python\n")[2].partition("```")[0]
    assert old in code
    exec(code.replace(old, new), space)
    parts = (LinearPath(), IndependentCoupling(), UniformTimes(0.0), VelocityPrediction(), UniformWeighting())
    return space["LateLoss"](Exact(lambda z, r, t: velocity(z, r)), *parts)


def test_the_readmes_loss_is_least_at_the_exact_velocity_and_hubers_is_not():
    def steepest(loss: FlowObjective) -> float:
        batch, chance = rows_at_points("mse")
        rows = [batch.split(i + 1)[0].split(i)[1] for i in range(len(batch))]
        expected = sum(p * loss(row)["loss"] for p, row in zip(chance, rows, strict=True))
        return float(torch.autograd.grad(expected, [loss.network.shift])[0].abs().max())

    assert steepest(readme_loss()) < 1e-6
    squared = "(v - batch.conditional_velocity).square()"
    huber = "torch.nn.functional.huber_loss(v, batch.conditional_velocity, reduction='none')"
    assert steepest(readme_loss(squared, huber)) > 0.05


@pytest.mark.parametrize("name", [n for n in STATIONARY if n != "mse"])
def test_the_instantaneous_velocity_is_not(name):
    instantaneous = Exact(lambda z, r, t: velocity(z, r))
    assert gradients(name, instantaneous).abs().max() > (0.02 if name == "split_meanflow" else 0.1)


MUTANTS = [
    ("meanflow", MeanFlowLoss, "forward", "v[:rows] + duration", "v[:rows] - duration"),
    ("meanflow", DerivativeObjective, "forward_mode", "(direction, torch", "(-direction, torch"),
    ("meanflow", DerivativeObjective, "forward_mode", "torch.ones_like(batch.r)", "-torch.ones_like(batch.r)"),
    ("improved_meanflow", ImprovedMeanFlowLoss, "forward", "derivative - target", "derivative + target"),
    ("improved_meanflow", ImprovedMeanFlowLoss, "forward", "u - expand_time", "u + expand_time"),
    ("improved_meanflow", DerivativeObjective, "forward_mode", "(direction, torch", "(-direction, torch"),
    ("shortcut", ShortcutLoss, "two_steps", "batch.input + expand", "batch.input - expand"),
    ("shortcut", ShortcutLoss, "two_steps", "step(teacher, z, middle", "step(teacher, z, batch.r"),
    ("split_meanflow", SplitMeanFlowLoss, "joined", "batch.input + expand", "batch.input - expand"),
    ("split_meanflow", SplitMeanFlowLoss, "joined", "share * u1 + (1 - share) * u2", "share * u2 + (1 - share) * u1"),
    ("terminal_velocity", TerminalVelocityLoss, "arrival_error", "u + duration * du_dt", "u - duration * du_dt"),
    ("terminal_velocity", TerminalVelocityLoss, "arrival_error", "batch.input + duration", "batch.input - duration"),
    ("terminal_velocity", TerminalVelocityLoss, "arrival_error", "batch.t, batch.label", "batch.r, batch.label"),
]
MUTANTS += [(n, FlowObjective, "mean_velocity", "self.unified(z, r, t)", "self.unified(z, t, r)") for n in STATIONARY[1:]]


def mutate(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, old: str, new: str) -> None:
    """Change the source of one method of ours."""
    source = textwrap.dedent(inspect.getsource(getattr(kind, method)))
    assert old in source, f"{kind.__name__}.{method} no longer says {old!r}"
    space = dict(vars(inspect.getmodule(kind)))
    exec("from __future__ import annotations\n" + source.replace(old, new), space)
    monkeypatch.setattr(kind, method, space[method])


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{m[0]}: {m[4]}" for m in MUTANTS])
def test_a_flipped_sign_or_order_is_not_stationary(mutant, monkeypatch):
    name, *change = mutant
    mutate(monkeypatch, *change)
    assert gradients(name, Exact()).abs().max() > 0.02


@pytest.mark.parametrize("name", ["meanflow", "improved_meanflow"])
def test_the_state_at_the_later_time_is_not_stationary(name):
    assert gradients(name, Exact(), side="t").abs().max() > 0.1


def extrapolated(a: float = 2.0**-9) -> Tensor:
    """The expected residual / a of alpha-Flow at each of POINTS, extrapolated from a and a / 2 to a = 0."""
    whole, half = (gradients("alpha_flow", Exact(), a=share) for share in (a, a / 2))
    return 2 * half - whole


def test_alpha_flow_is_stationary_in_the_limit_of_small_a():
    assert extrapolated().abs().max() < 0.02
    large, small = (gradients("alpha_flow", Exact(), a=share).abs() for share in (0.125, 2**-7))
    assert (large > 4 * small).all()


@pytest.mark.parametrize("change", [
    ("first.input + expand", "first.input - expand"),
    ("a * v + (1 - a) * later", "-a * v + (1 - a) * later"),
    ("first.r + step", "first.r - step"),
])  # fmt: skip
def test_alpha_flow_with_a_wrong_sign_is_not(change, monkeypatch):
    mutate(monkeypatch, AlphaFlowLoss, "consistency_target", *change)
    assert extrapolated().abs().max() > 0.5


@pytest.mark.parametrize("name", ["mse", "meanflow", "improved_meanflow"])
def test_adaptive_weighting_is_biased_on_a_mixture(name):
    assert gradients(name, Exact(), power=1.0).abs().max() > 0.05
