"""Every one-step objective against the exact mean velocity of a 1-D mixture: its expected gradient there is zero, by
quadrature, and is not once a sign, the order of the times or the side of the state is changed in the code."""

import inspect
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn

from common.errors import UserError
from evaluation.generate import few_steps
from losses.alpha_flow_loss import AlphaBatch, AlphaFlowLoss
from losses.alpha_schedules import ExponentialAlpha, SigmoidAlpha
from losses.couplings import IndependentCoupling, ReflowCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.meanflow_guidance import MeanFlowGuidance
from losses.meanflow_loss import ImprovedMeanFlowLoss, MeanFlowLoss
from losses.objective import FlowBatch, FlowObjective
from losses.paths import LinearPath
from losses.predictions import VelocityPrediction
from losses.shortcut_loss import ShortcutLoss
from losses.split_meanflow_loss import SplitBatch, SplitMeanFlowLoss
from losses.terminal_velocity_loss import TerminalVelocityLoss
from losses.time_samplers import DyadicTimes, TimeSampler, UniformTimes
from losses.total_derivative import DerivativeObjective
from losses.weightings import AdaptiveWeighting, UniformWeighting, Weighting
from models.flow_matching.mlp import MLP
from models.flow_matching.small_cnn import SmallCNN
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel

WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.35, 0.65], [-1.2, 0.9], [0.3, 0.5]))
POINTS = [(-1.5, 0.125, 0.875), (-0.3, 0.375, 0.75), (0.2, 0.0625, 1.0), (0.8, 0.5, 0.6875), (1.1, 0.25, 0.625)]
every_point = pytest.mark.parametrize("point", POINTS)


def components(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, (z - t m_k) / S_k(t) and S_k(t) of the components, (K, ...)."""
    w, m, s = (c.view(-1, *(1,) * t.ndim) for c in (WEIGHTS, MEANS, STDS))
    big = ((1 - t).square() + (t * s).square()).sqrt()
    return w, (z - t * m) / big, big


def distribution(z: Tensor, t: Tensor) -> Tensor:
    """F_t(z) of the mixture along the path."""
    w, standard, _ = components(z, t)
    return (w * torch.special.ndtr(standard)).sum(0)


def density(z: Tensor, t: Tensor) -> Tensor:
    w, standard, big = components(z, t)
    return (w * torch.exp(-0.5 * standard.square()) / (big * math.sqrt(2 * math.pi))).sum(0)


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """v(z, t), the posterior mean of the components' own velocities."""
    w, standard, big = components(z, t)
    share = w * torch.exp(-0.5 * standard.square()) / big
    m, s = (c.view(-1, *(1,) * t.ndim) for c in (MEANS, STDS))
    own = m + (t * s.square() - (1 - t)) / big.square() * (z - t * m)
    return (share * own).sum(0) / share.sum(0)


def flow_map(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """X(z, r, t) = F_t^-1(F_r(z)), by bisection in float64, with the derivatives of one Newton step for jvp."""
    target = distribution(z, r)
    with torch.no_grad():
        low, high = torch.full_like(z, -12.0), torch.full_like(z, 12.0)
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = distribution(middle, t) < target.detach()
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    x = 0.5 * (low + high)
    return x - (distribution(x, t) - target) / density(x, t)


def exact_mean_velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    gap = torch.where(t == r, torch.ones_like(t), t - r)
    return torch.where(t == r, velocity(z, r), (flow_map(z, r, t) - z) / gap)


def posterior_velocities(z: Tensor, r: Tensor, nodes: int = 40) -> tuple[Tensor, Tensor]:
    """v_c given z_r = z as nodes and probabilities (K * nodes,): Gauss-Hermite over x1 within each component."""
    points, weights = (torch.tensor(a, dtype=torch.float64) for a in hermegauss(nodes))
    values, chances = [], []
    for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True):
        big = ((1 - r) ** 2 + (r * s) ** 2).sqrt()
        mean, std = m + r * s**2 / big**2 * (z - r * m), (1 - r) * s / big
        evidence = w * torch.exp(-0.5 * ((z - r * m) / big) ** 2) / big
        values.append((mean + std * points - z) / (1 - r))
        chances.append(evidence * weights)
    chance = torch.cat(chances)
    return torch.cat(values), chance / chance.sum()


class Exact(VelocityModel):
    """A given u(z, r, t) of 1-D states; `shift` displaces it, and the gradient for it is what stationarity is about."""

    def __init__(self, mean_velocity: Any = exact_mean_velocity):
        super().__init__()
        self.mean_velocity = mean_velocity
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input)
        return self.mean_velocity(z[:, 0], times[:, 0], times[:, 1])[:, None] + self.shift


class Expectation(Weighting):
    """E over v_c of the squared error, or of its adaptively weighted form, in place of the mean over a batch."""

    def __init__(self, chance: Tensor, power: float = 0.0):
        self.chance, self.power = chance, power

    def __call__(self, squared_error: Tensor, a: Tensor | float = 1.0) -> Tensor:
        return (self.chance * squared_error / a / (squared_error + 1e-3).pow(self.power).detach()).sum()


OBJECTIVES: dict[str, tuple[type[FlowObjective], dict[str, Any]]] = {
    "mse": (FlowMatchingLoss, {"second_time": "state"}),
    "meanflow": (MeanFlowLoss, {"jvp": "func"}),
    "meanflow_separate": (MeanFlowLoss, {"jvp": "separate"}),
    "improved_meanflow": (ImprovedMeanFlowLoss, {"jvp": "func"}),
    "shortcut": (ShortcutLoss, {}),
    "split_meanflow": (SplitMeanFlowLoss, {}),
    "terminal_velocity": (TerminalVelocityLoss, {"jvp": "func"}),
    "alpha_flow": (AlphaFlowLoss, {"alpha": ExponentialAlpha(), "switch": 0.0}),
}
STATIONARY = [name for name in OBJECTIVES if name != "alpha_flow"]


def objective(name: str, network: VelocityModel, weighting: Weighting | None = None, **other: Any) -> FlowObjective:
    kind, settings = OBJECTIVES[name]
    sampler: TimeSampler = DyadicTimes(7, 1.0) if kind is ShortcutLoss else UniformTimes(1.0)
    parts = {
        "network": network, "path": LinearPath(), "coupling": IndependentCoupling(), "time_sampler": sampler,
        "prediction": VelocityPrediction(), "weighting": weighting or UniformWeighting(),
    }  # fmt: skip
    return kind(**(parts | settings | other))


@pytest.fixture(autouse=True)
def unified_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs keep the states' own precision here, so that quadrature is not drowned in rounding."""

    real = FlowObjective.unified

    def unified(self: FlowObjective, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        if z.ndim == 4:
            return real(self, z, r, t)
        r, t = (time.to(z.dtype).expand(len(z)) for time in (r, t))
        return torch.cat([z, r[:, None], (torch.ones_like(t) if self.second_time == "end" else t)[:, None]], dim=1)

    monkeypatch.setattr(FlowObjective, "unified", unified)


def rows_at(name: str, point: tuple[float, float, float], side: str = "r", a: float = 0.0) -> tuple[FlowBatch, Tensor]:
    """One row for each node of v_c given z_r = z, and their probabilities. side="t": the state taken for the one at t."""
    z, r, t = (torch.tensor(v, dtype=torch.float64) for v in point)
    if name == "shortcut":  # an interval of the ladder, above its foot
        r, t = torch.tensor(0.25, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    if name == "mse":
        t = r
    v_c, chance = posterior_velocities(z, r if side == "r" else t.clamp(max=0.9))
    n = len(v_c)
    state, times = z.repeat(n, 1), (r.repeat(n), t.repeat(n))
    batch = FlowBatch(state, state, *times, state, v_c[:, None], torch.cat([state, *(x[:, None] for x in times)], dim=1))
    if name == "split_meanflow":
        batch = SplitBatch(**vars(batch), share=torch.full((n,), 0.3, dtype=torch.float64))
    if name == "alpha_flow":
        batch = AlphaBatch(**vars(batch), a=torch.full((n,), a, dtype=torch.float64))
    return batch, chance


def gradient_at(
    name: str, point: tuple[float, float, float], network: VelocityModel, power: float = 0.0, side: str = "r", a: float = 0.0
) -> float:
    """d/d(shift) of E[loss | z_r = z] at one (z, r, t), exact by quadrature over v_c."""
    batch, chance = rows_at(name, point, side, a)
    loss = objective(name, network, Expectation(chance, power))(batch)["loss"]
    (gradient,) = torch.autograd.grad(loss, [next(network.parameters())])
    return float(gradient)


@every_point
@pytest.mark.parametrize("name", STATIONARY)
def test_the_exact_mean_velocity_is_stationary(name, point):
    assert abs(gradient_at(name, point, Exact())) < 1e-6


@pytest.mark.parametrize("name", STATIONARY)
def test_a_displaced_velocity_is_not(name):
    if name in ("shortcut", "split_meanflow"):
        wrong = Exact(lambda z, r, t: exact_mean_velocity(z, r, t) + (t - r))  # a constant would agree with itself
    else:
        wrong = Exact(lambda z, r, t: exact_mean_velocity(z, r, t) + 0.1 * z)
    assert max(abs(gradient_at(name, point, wrong)) for point in POINTS) > 0.05


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
    def gradients(loss: FlowObjective) -> list[float]:
        found = []
        for point in POINTS:
            batch, chance = rows_at("mse", point)
            rows = [batch.split(i + 1)[0].split(i)[1] for i in range(len(batch))]
            expected = sum(p * loss(row)["loss"] for p, row in zip(chance, rows, strict=True))
            found.append(abs(float(torch.autograd.grad(expected, [loss.network.shift])[0])))
        return found

    assert max(gradients(readme_loss())) < 1e-6
    squared, huber = (
        "(v - batch.conditional_velocity).square()",
        "huber_loss(v, batch.conditional_velocity, reduction='none')",
    )
    assert max(gradients(readme_loss(squared, f"torch.nn.functional.{huber}"))) > 0.05


@pytest.mark.parametrize("name", [n for n in STATIONARY if n != "mse"])
def test_the_instantaneous_velocity_is_not(name):
    instantaneous = Exact(lambda z, r, t: velocity(z, r))
    if name == "split_meanflow":
        assert max(abs(gradient_at(name, point, instantaneous)) for point in POINTS) > 0.02
    else:
        assert max(abs(gradient_at(name, point, instantaneous)) for point in POINTS) > 0.1


MUTANTS = [
    ("meanflow", MeanFlowLoss, "forward", "v[:rows] + duration", "v[:rows] - duration"),
    ("meanflow", DerivativeObjective, "forward_mode", "(direction, torch", "(-direction, torch"),
    ("meanflow", DerivativeObjective, "forward_mode", "torch.ones_like(batch.r)", "-torch.ones_like(batch.r)"),
    ("improved_meanflow", ImprovedMeanFlowLoss, "forward", "derivative - target", "derivative + target"),
    ("improved_meanflow", ImprovedMeanFlowLoss, "forward", "u - expand_time", "u + expand_time"),
    ("improved_meanflow", DerivativeObjective, "forward_mode", "(direction, torch", "(-direction, torch"),
    ("shortcut", ShortcutLoss, "two_steps", "batch.input + expand", "batch.input - expand"),
    ("shortcut", ShortcutLoss, "two_steps", "mean_velocity(z, middle", "mean_velocity(z, batch.r"),
    ("split_meanflow", SplitMeanFlowLoss, "joined", "batch.input + expand", "batch.input - expand"),
    ("split_meanflow", SplitMeanFlowLoss, "joined", "share * u1 + (1 - share) * u2", "share * u2 + (1 - share) * u1"),
    ("terminal_velocity", TerminalVelocityLoss, "arrival_error", "u + duration * du_dt", "u - duration * du_dt"),
    ("terminal_velocity", TerminalVelocityLoss, "arrival_error", "batch.input + duration", "batch.input - duration"),
    ("terminal_velocity", TerminalVelocityLoss, "arrival_error", "batch.t, batch.label", "batch.r, batch.label"),
    *(
        (n, FlowObjective, "mean_velocity", "self.unified(z, r, t)", "self.unified(z, t, r)")
        for n in STATIONARY
        if n != "mse"
    ),
]


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
    assert max(abs(gradient_at(name, point, Exact())) for point in POINTS) > 0.02


@pytest.mark.parametrize("name", ["meanflow", "improved_meanflow"])
def test_the_state_at_the_later_time_is_not_stationary(name):
    assert max(abs(gradient_at(name, point, Exact(), side="t")) for point in POINTS) > 0.1


def extrapolated(point: tuple[float, float, float], a: float = 2.0**-9) -> float:
    """The expected residual / a of alpha-Flow, extrapolated from a and a / 2 to a = 0."""
    whole, half = (gradient_at("alpha_flow", point, Exact(), a=share) for share in (a, a / 2))
    return 2 * half - whole


def test_alpha_flow_is_stationary_in_the_limit_of_small_a():
    for point in POINTS:
        assert abs(extrapolated(point)) < 0.02
        assert abs(gradient_at("alpha_flow", point, Exact(), a=0.125)) > 4 * abs(
            gradient_at("alpha_flow", point, Exact(), a=2**-7)
        )


@pytest.mark.parametrize(
    "change",
    [
        ("first.input + expand", "first.input - expand"),
        ("a * v + (1 - a) * later", "-a * v + (1 - a) * later"),
        ("first.r + step", "first.r - step"),
    ],
)
def test_alpha_flow_with_a_wrong_sign_is_not(change, monkeypatch):
    mutate(monkeypatch, AlphaFlowLoss, "consistency_target", *change)
    assert max(abs(extrapolated(point)) for point in POINTS) > 0.5


@pytest.mark.parametrize("name", ["mse", "meanflow", "improved_meanflow"])
def test_adaptive_weighting_is_biased_on_a_mixture(name):
    assert max(abs(gradient_at(name, point, Exact(), power=1.0)) for point in POINTS) > 0.05


def test_the_foot_of_the_ladder_is_an_euler_step_of_first_order():
    """u1 and u2 are instantaneous there: twice the levels, half the bias."""
    biases = []
    for levels in (6, 7, 8):
        t = torch.tensor([2.0 ** -(levels - 1)], dtype=torch.float64) + 0.25
        z, r = torch.tensor([[0.2]], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
        loss = objective("shortcut", Exact(), time_sampler=DyadicTimes(levels, 1.0))
        batch = FlowBatch(z, z, r, t, z, z, z)
        biases.append(abs(float((loss.two_steps(loss, batch) - loss.mean_velocities(batch)).detach())))
    assert biases[0] / biases[1] == pytest.approx(2, abs=0.3) and biases[1] / biases[2] == pytest.approx(2, abs=0.2)


def test_the_consistency_weight_has_the_gradient_of_its_limit():
    """A residual of a e, weighed: with p = 0 the gradient is that of e whatever a; with p = 1 it is L / (L + c)."""
    e, a = torch.tensor([0.3, -2.0]), torch.tensor([1e-2, 0.5])
    plain = UniformWeighting()((a * e).square(), a)
    torch.testing.assert_close(plain, (a * e.square()).mean())
    adaptive = AdaptiveWeighting(p=1.0, c=1e-3)((a * e).square(), a)
    torch.testing.assert_close(adaptive, ((a * e).square() / ((a * e).square() + 1e-3)).mean())


def test_alpha_schedules_fall_from_one_to_their_least():
    sigmoid, exponential = SigmoidAlpha(0.0, 0.8), ExponentialAlpha(1 / 3200, over=0.5)
    assert sigmoid.share(0.0) > 0.9999 and sigmoid.share(0.4) == pytest.approx(0.5) and sigmoid.share(0.8) < 1e-5
    assert exponential.share(0.0) == 1 and exponential.share(0.25) == pytest.approx(3200**-0.5)
    assert exponential.share(0.5) == exponential.share(1.0) == pytest.approx(1 / 3200)
    with pytest.raises(UserError, match="begin < end"):
        SigmoidAlpha(0.5, 0.5)


def test_alpha_flow_hands_over_to_the_derivative_below_the_switch():
    loss = objective("alpha_flow", Exact(), alpha=SigmoidAlpha(0.0, 0.5), switch=0.005)
    x = torch.randn(8, 1)
    drawn = [loss.draw(x, x + 1, None, torch.Generator().manual_seed(0), progress) for progress in (0.1, 0.25, 0.5)]
    assert [batch.by_derivative for batch in drawn] == [False, False, True]
    assert float(drawn[1].a[0]) == pytest.approx(0.5)


def gaussian_mean_velocity(z: Tensor, r: Tensor, t: Tensor, m: float = 0.7, s: float = 0.4) -> Tensor:
    big = lambda time: ((1 - time) ** 2 + (time * s) ** 2).sqrt()  # noqa: E731
    gap = torch.where(t > r, t - r, torch.ones_like(t))
    average = (t * m + big(t) / big(r) * (z - r * m) - z) / gap
    instant = m + (r * s**2 - (1 - r)) / big(r) ** 2 * (z - r * m)
    return torch.where(t > r, average, instant)


def test_one_evaluation_of_the_exact_map_makes_the_data():
    """m != 0 and s != 1: the order of times that public code gets wrong would give mean m / s and std |2 - 1 / s|."""
    trained = objective("meanflow", Exact(gaussian_mean_velocity)).double()
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = trained.flow_map(noise, torch.tensor(0.0), torch.tensor(1.0)).detach()
    assert float(samples.mean()) == pytest.approx(0.7, abs=0.005)
    assert float(samples.std()) == pytest.approx(0.4, abs=0.005)


def test_few_steps_of_the_exact_map_are_one_step():
    trained = objective("meanflow", Exact(gaussian_mean_velocity))
    noise = torch.linspace(-2, 2, 9)[:, None]
    once = few_steps(trained, noise, None, 1)
    torch.testing.assert_close(once, (0.7 + 0.4 * noise), atol=1e-5, rtol=0, check_dtype=False)
    for evaluations in (2, 3, 8):
        torch.testing.assert_close(few_steps(trained, noise, None, evaluations), once, atol=1e-5, rtol=0)


def small_network(dropout: float = 0.0) -> MLP:
    torch.manual_seed(0)
    return MLP([2], width=32, depth=2, time_frequencies=[1.0, 2.0], dropout=dropout)


def loss_and_gradients(name: str, jvp: str, dropout: float, ratio: float = 0.5) -> tuple[Tensor, list[Tensor]]:
    loss = objective(name, small_network(dropout), jvp=jvp, time_sampler=UniformTimes(ratio))
    x0, x1 = torch.randn(2, 64, 2, generator=torch.Generator().manual_seed(1))
    batch = loss.draw(x0, x1, None, torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    value = loss(batch)["loss"]
    value.backward()
    return value.detach(), [p.grad for p in loss.network.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("jvp", ["separate", "finite_difference", "auto"])
@pytest.mark.parametrize("name", ["meanflow", "improved_meanflow"])
def test_the_engines_agree(name, jvp, dropout):
    """The same loss and gradients, dropout masks included, whichever engine takes the derivative."""
    value, gradients = loss_and_gradients(name, "func", dropout)
    other, others = loss_and_gradients(name, jvp, dropout)
    torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(others, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_both_engines_of_the_terminal_derivative_agree(dropout):
    value, gradients = loss_and_gradients("terminal_velocity", "func", dropout)
    other, others = loss_and_gradients("terminal_velocity", "finite_difference", dropout)
    torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(others, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=5e-4 * float(theirs.abs().max()))


def test_terminal_velocity_refuses_an_engine_without_a_graph():
    with pytest.raises(UserError, match="back-propagates"):
        objective("terminal_velocity", small_network(), jvp="separate")


@pytest.mark.parametrize("jvp", ["func", "separate", "finite_difference"])
def test_only_the_interval_rows_pay_for_the_derivative(jvp, monkeypatch):
    seen = []
    for engine in ("forward_mode", "central_difference"):
        real = getattr(DerivativeObjective, engine)
        spy = lambda self, batch, direction, real=real: seen.append(len(batch)) or real(self, batch, direction)  # noqa: E731
        monkeypatch.setattr(DerivativeObjective, engine, spy)
    loss_and_gradients("meanflow", jvp, 0.0, ratio=0.25)
    assert seen == [16]


@pytest.mark.parametrize("name", ["meanflow", "improved_meanflow", "split_meanflow", "terminal_velocity", "alpha_flow"])
def test_without_intervals_each_is_flow_matching(name):
    loss = objective(name, small_network(), time_sampler=UniformTimes(0.0))
    x0, x1 = torch.randn(2, 64, 2)
    batch = loss.draw(x0, x1, None, torch.Generator().manual_seed(0))
    plain = objective("mse", loss.network)(batch)["loss"]
    torch.testing.assert_close(loss(batch)["loss"], plain)


@pytest.mark.parametrize("jvp", ["func", "separate", "finite_difference"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in ("mse", "meanflow_separate")])
def test_any_share_of_intervals_trains_an_image_model(name, ratio, jvp):
    engine = {"jvp": jvp} if "jvp" in OBJECTIVES[name][1] and (name, jvp) != ("terminal_velocity", "separate") else {}
    sampler = DyadicTimes(7, ratio) if name == "shortcut" else UniformTimes(ratio)
    network = SmallCNN([1, 4, 4], width=8, inner_width=8, inner_blocks=1, embedding=8, time_frequencies=[1.0])
    loss = objective(name, network, time_sampler=sampler, **engine)
    x0, x1 = torch.randn(2, 8, 1, 4, 4)
    value = loss(loss.draw(x0, x1, None, torch.Generator().manual_seed(0)), loss)["loss"]
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in network.parameters())


def test_shortcut_targets_come_from_the_teacher_and_carry_no_graph():
    loss = objective("shortcut", small_network())
    teacher = objective("shortcut", MLP([2], width=8, depth=1, time_frequencies=[1.0]))
    x0, x1 = torch.randn(2, 64, 2)
    batch = loss.draw(x0, x1, None, torch.Generator().manual_seed(0))
    assert float(loss(batch, teacher)["loss"]) != float(loss(batch, loss)["loss"])
    loss(batch, teacher)["loss"].backward()
    assert all(p.grad is None for p in teacher.network.parameters())


def test_shortcut_needs_times_on_a_ladder():
    with pytest.raises(UserError, match="dyadic"):
        objective("shortcut", small_network(), time_sampler=UniformTimes(0.5))


def test_an_instantaneous_model_has_no_flow_map():
    loss = objective("mse", Exact(gaussian_mean_velocity))
    with pytest.raises(UserError, match="loss=meanflow"):
        loss.flow_map(torch.zeros(2, 1), torch.tensor(0.0), torch.tensor(1.0))


def conditional(name: str, **other: Any) -> FlowObjective:
    torch.manual_seed(0)
    network = MLP([2], num_classes=3, width=32, depth=2, time_frequencies=[1.0])
    return objective(name, network, time_sampler=UniformTimes(0.5), label_dropout=0.1, **other)


@pytest.mark.parametrize("name", ["meanflow", "improved_meanflow", "alpha_flow"])
def test_guidance_enters_the_target_of_labelled_rows_only(name):
    x0, x1, label = *torch.randn(2, 64, 2), torch.arange(64) % 3
    plain, guided = conditional(name), conditional(name, guidance=MeanFlowGuidance(omega=2.0, kappa=0.25))
    batch = guided.draw(x0, x1, label, torch.Generator().manual_seed(0))
    null, v_c = batch.label == 3, batch.conditional_velocity
    assert 0 < null.sum() < 64
    target = guided.velocity_target(batch)
    torch.testing.assert_close(target[null], v_c[null])
    own = plain.velocity(batch.input, batch.r, batch.label)
    nothing = plain.velocity(batch.input, batch.r, torch.full_like(batch.label, 3))
    torch.testing.assert_close(target[~null], (2 * v_c + 0.25 * own - 1.25 * nothing)[~null].detach())
    assert not target.requires_grad
    torch.testing.assert_close(plain.velocity_target(batch), v_c)


def test_guidance_without_labels_is_refused():
    with pytest.raises(UserError, match="conditional=true"):
        objective("meanflow", small_network(), guidance=MeanFlowGuidance())


def test_reflow_pairs_are_where_the_teacher_carries_the_noise(small_run):
    """Each x1 is the teacher's own sample of its x0, the same pairs for the EMA objective and for the next process."""
    from evaluation.generate import generate
    from evaluation.parts import build_solver
    from evaluation.reflow import TeacherPairs
    from evaluation.sample import load

    folder = small_run("teacher")
    path = folder / "ckpts/mlp/teacher_last.pt"
    coupling = ReflowCoupling(str(path), 300, TeacherPairs())
    x = torch.zeros(40, 2)
    x0, x1, label = coupling.pair(x, x, None, torch.Generator().manual_seed(0))
    model = load(path, "cpu")
    with torch.no_grad():
        carried = generate(model.objective, build_solver(model.config), x0, None)
    torch.testing.assert_close(x1, carried, atol=1e-5, rtol=1e-5)
    again = ReflowCoupling(str(path), 300, TeacherPairs()).pair(x, x, None, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], x0) and torch.equal(again[1], x1) and label is None
    with pytest.raises(UserError, match="teacher of this data"):
        ReflowCoupling(str(path), 10, TeacherPairs()).pair(torch.zeros(4, 3), torch.zeros(4, 3), None, torch.Generator())


def test_a_flow_is_fine_tuned_into_a_one_step_model_by_one_command(small_run, capsys):
    """The network is built as the flow's was, its weights are the start, and a second time never seen is said."""
    folder = small_run("flow", "experiment=finetunable_flow")
    path = folder / "ckpts/mlp/flow_last.pt"
    small_run("one_step", f"init_from={path}", "loss=meanflow", "max_steps=1", "optimizer.lr=1e-9", "ema.decay=0.0")
    assert "second_time" not in capsys.readouterr().out
    before, after = (torch.load(folder / f"ckpts/mlp/{n}_last.pt", weights_only=True) for n in ("flow", "one_step"))
    for name, value in before["ema"].items():
        torch.testing.assert_close(after["network"][name], value, atol=1e-6, rtol=0)
    small_run("plain", "loss=mse", "max_steps=1")
    small_run("other", f"init_from={folder / 'ckpts/mlp/plain_last.pt'}", "loss=meanflow", "max_steps=1")
    said = capsys.readouterr().out
    assert "second_time=end" in said and "time_frequencies" in said
    assert len(torch.load(folder / "ckpts/mlp/other_last.pt", weights_only=True)["config"]["model"]["time_frequencies"]) == 5
