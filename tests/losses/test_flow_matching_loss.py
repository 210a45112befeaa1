"""Flow matching against exact velocities: stationarity by quadrature, the draw, labels and weightings."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from losses.couplings import IndependentCoupling, MinibatchOTCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.objective import FlowBatch
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath
from losses.predictions import DataPrediction, NoisePrediction, Prediction, VelocityPrediction
from losses.time_samplers import LogitNormalTimes, TimeSampler, UniformTimes
from losses.weightings import AdaptiveWeighting, UniformWeighting, Weighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel

WORLDS = {"gaussian": ([1.0], [0.7], [0.4]), "mixture": ([0.35, 0.65], [-1.2, 0.9], [0.3, 0.5])}  # weights, means, stds
PATHS: list[ProbabilityPath] = [LinearPath(), CosinePath(), VariancePreservingPath()]
PREDICTIONS: list[Prediction] = [VelocityPrediction(), DataPrediction(), NoisePrediction()]
TIMES = torch.tensor([0.3, 0.5, 0.7, 0.9])  # no clamp is active there on any path


def objective(network: VelocityModel | None = None, **parts) -> FlowMatchingLoss:
    plain = {
        "path": LinearPath(),
        "coupling": IndependentCoupling(),
        "time_sampler": UniformTimes(),
        "prediction": VelocityPrediction(),
        "weighting": UniformWeighting(),
    }
    return FlowMatchingLoss(network=network or Recorder(), **{**plain, **parts})


class Recorder(VelocityModel):
    """A network that keeps what it was given and answers with a multiple of the state plus the times."""

    def __init__(self, num_classes: int = 0):
        super().__init__()
        self.num_classes, self.scale = num_classes, nn.Parameter(torch.tensor(0.0))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        self.seen, self.label = unified_input, label
        state, times = split_unified_flow_matching_input(unified_input)
        return self.scale * state * (1 + times.sum(1)).view(-1, *(1,) * (state.ndim - 1))


class ExactNetwork(VelocityModel):
    """The Bayes answer for a world, a path and a kind of prediction, plus theta . features(z, t), theta = 0.

    The gradient in theta is the functional gradient of the loss, tested against each feature. flip, shift: how wrong it is.
    """

    def __init__(self, world: str, path: ProbabilityPath, kind: Prediction, flip: float = 1.0, shift: float = 0.0):
        super().__init__()
        self.weights, self.means, self.stds = (torch.tensor(values) for values in WORLDS[world])
        self.path, self.kind, self.flip, self.shift = path, kind, flip, shift
        self.theta = nn.Parameter(torch.zeros(6))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, t = unified_input[:, :1], unified_input[:, 1:2]
        p = self.path.at(t)
        variance = (p.alpha * self.stds) ** 2 + p.sigma**2
        offset = z - p.alpha * self.means
        share = (self.weights.log() - 0.5 * variance.log() - 0.5 * offset**2 / variance).softmax(1)
        x1 = (share * (self.means + p.alpha * self.stds**2 / variance * offset)).sum(1, keepdim=True)  # E[x1 | z]
        x0 = (share * p.sigma / variance * offset).sum(1, keepdim=True)  # E[x0 | z]
        answers = {VelocityPrediction: p.alpha_dot * x1 + p.sigma_dot * x0, DataPrediction: x1, NoisePrediction: x0}
        features = torch.cat([torch.ones_like(z), z, z**2, (2 * z).sin(), (2 * z).cos(), t * z], dim=1)
        return self.flip * answers[type(self.kind)] + self.shift + (features @ self.theta)[:, None]


class GivenTimes(TimeSampler):
    """Every time of TIMES for as many rows, one after the other."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return TIMES.repeat_interleave(shape[-1] // len(TIMES)).expand(shape)


class QuadratureWeighting(Weighting):
    """What `inner` would do to infinitely many rows: its slope at each row, weighed by the row's probability."""

    def __init__(self, probability: Tensor, inner: Weighting):
        self.probability, self.inner = probability, inner

    def __call__(self, squared_error: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(self.inner(squared_error), squared_error, retain_graph=True)
        return (self.probability * len(squared_error) * slope * squared_error).sum()


def grid(world: str) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes x0, x1 (N, 1) and probabilities (N,): the trapezoidal rule in both, exact to rounding for smooth densities."""
    weights, means, stds = (torch.tensor(values) for values in WORLDS[world])
    x0, x1 = torch.linspace(-6, 6, 101), torch.linspace(-3.4, 4.4, 131)
    density = MixtureSameFamily(Categorical(weights), Normal(means, stds))
    probability = Normal(0.0, 1.0).log_prob(x0).exp()[:, None] * density.log_prob(x1).exp()
    pairs = torch.cartesian_prod(x0, x1)
    return pairs[:, :1], pairs[:, 1:], (probability / probability.sum()).flatten()


def expected_gradient(network: ExactNetwork, world: str, inner: Weighting | None = None, **parts) -> Tensor:
    """The gradient in theta of the expected loss over noise, data and TIMES."""
    x0, x1, probability = (torch.cat([part] * len(TIMES)) for part in grid(world))
    weighting = QuadratureWeighting(probability / len(TIMES), inner or UniformWeighting())
    parts |= {"time_sampler": GivenTimes(), "weighting": weighting}
    loss = objective(network, path=network.path, prediction=network.kind, **parts)
    batch = loss.draw(x0, x1, None, torch.Generator())
    (gradient,) = torch.autograd.grad(loss(batch)["loss"], network.theta)
    return gradient.abs().max()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("path, kind", list(product(PATHS, PREDICTIONS)), ids=lambda part: type(part).__name__)
def test_the_exact_answer_is_stationary_and_a_wrong_one_is_not(world: str, path: ProbabilityPath, kind: Prediction) -> None:
    assert expected_gradient(ExactNetwork(world, path, kind), world) < 2e-5
    assert expected_gradient(ExactNetwork(world, path, kind, flip=-1.0), world) > 0.1
    assert expected_gradient(ExactNetwork(world, path, kind, shift=0.05), world) > 0.05


@pytest.mark.parametrize("second_time", ["end", "state"])
def test_the_second_time_does_not_move_the_minimum(second_time: str) -> None:
    network = ExactNetwork("mixture", LinearPath(), VelocityPrediction())
    assert expected_gradient(network, "mixture", second_time=second_time) < 2e-5


def test_adaptive_weighting_moves_the_minimum_of_a_mixture_but_not_of_a_gaussian() -> None:
    """Why p = 0 is the default in 2-D, and why a single Gaussian cannot test it."""
    gradients = {
        (world, p): expected_gradient(ExactNetwork(world, LinearPath(), VelocityPrediction()), world, AdaptiveWeighting(p=p))
        for world in WORLDS
        for p in (0.0, 1.0)
    }
    assert gradients["mixture", 1.0] > 0.02
    assert max(value for case, value in gradients.items() if case != ("mixture", 1.0)) < 2e-5


def states(n: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, n, *shape, generator=generator)
    return x0, 0.7 + 0.4 * x1


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_a_sample_is_a_sum_over_dimensions_and_a_batch_a_mean_over_samples(shape: tuple[int, ...]) -> None:
    x0, x1 = states(6, *shape)
    loss = objective()  # answers 0
    batch = loss.draw(x0, x1, None, torch.Generator())
    by_hand = sum(float((b - a).square().sum()) for a, b in zip(x0, x1, strict=True)) / 6
    assert loss(batch)["loss"].item() == pytest.approx(by_hand, rel=1e-5)
    assert list(loss(batch)) == ["loss"]


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
@pytest.mark.parametrize("second_time", ["end", "state"])
def test_the_network_sees_the_state_its_time_and_the_time_it_is_headed_to(second_time: str, shape: tuple[int, ...]) -> None:
    x0, x1 = states(5, *shape)
    loss = objective(second_time=second_time)
    batch = loss.draw(x0, x1, None, torch.Generator().manual_seed(1))
    loss(batch)
    in_training = loss.network.seen
    t = torch.rand(5, generator=torch.Generator().manual_seed(1)).view(-1, *(1,) * len(shape))
    assert torch.equal(in_training[:, :-2], (1 - t) * x0 + t * x1)
    time = t.expand_as(in_training[:, :1])
    second = torch.ones_like(time) if second_time == "end" else time
    assert torch.equal(in_training[:, -2:], torch.cat([time, second], dim=1))
    loss.velocity(batch.input, batch.r)
    assert torch.equal(loss.network.seen, in_training), "sampling must ask what training answered"


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
@pytest.mark.parametrize("kind", PREDICTIONS, ids=lambda part: type(part).__name__)
def test_velocity_takes_one_time_for_all_or_one_for_each(kind: Prediction, shape: tuple[int, ...]) -> None:
    loss, (x, _) = objective(prediction=kind), states(4, *shape)
    nn.init.constant_(loss.network.scale, 0.7)
    at_once = loss.velocity(x, torch.tensor(0.3))
    assert at_once.shape == x.shape
    assert torch.equal(at_once, loss.velocity(x, torch.full((4,), 0.3)))
    mixed = loss.velocity(x, torch.tensor([0.3, 0.9, 0.3, 0.9]))
    assert torch.allclose(mixed[::2], at_once[::2]) and not torch.allclose(mixed[1::2], at_once[1::2])


def test_velocity_is_the_exact_field_whatever_the_network_predicts() -> None:
    z, t = torch.linspace(-2, 2, 41)[:, None], torch.linspace(0.1, 0.9, 41)
    for path in PATHS:
        fields = [
            objective(ExactNetwork("mixture", path, kind), path=path, prediction=kind).velocity(z, 0.4 + 0.5 * t)
            for kind in PREDICTIONS
        ]
        for field in fields[1:]:
            assert torch.allclose(field, fields[0], atol=1e-4)


def test_a_share_of_labels_is_hidden_and_the_others_stay() -> None:
    n, share = 20_000, 0.1
    x, label = torch.zeros(n, 1), torch.arange(n) % 10
    loss = objective(Recorder(num_classes=10), label_dropout=share)
    batch = loss.draw(x, x, label, torch.Generator().manual_seed(0))
    loss(batch)
    assert torch.equal(loss.network.label, batch.label) and batch.label.dtype == torch.int64
    hidden = batch.label != label
    assert abs(hidden.float().mean() - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert (batch.label[hidden] == 10).all()


@pytest.mark.parametrize("num_classes, labelled, dropout, expected", [
    (10, True, 0.0, [0, 1, 2]), (10, True, 1.0, [10, 10, 10]), (10, False, 0.5, None), (0, True, 0.5, None),
])  # fmt: skip
def test_only_a_conditional_network_on_labelled_data_is_told_labels(
    num_classes: int, labelled: bool, dropout: float, expected: list[int] | None
) -> None:
    loss = objective(Recorder(num_classes), label_dropout=dropout)
    batch = loss.draw(*states(3, 2), torch.arange(3) if labelled else None, torch.Generator())
    loss(batch)
    told = loss.network.label
    assert (told if told is None else told.tolist()) == expected


def test_labels_follow_their_data_through_the_coupling() -> None:
    x0, x1 = states(32, 2)
    loss = objective(Recorder(num_classes=32), coupling=MinibatchOTCoupling())
    batch = loss.draw(x0, x1, torch.arange(32), torch.Generator())
    assert not torch.equal(batch.raw_target, x1)
    assert torch.equal(batch.raw_target, x1[batch.label])
    assert torch.equal(batch.conditional_velocity, batch.raw_target - batch.raw_source)


def test_a_draw_uses_the_given_generator_alone() -> None:
    x0, x1 = states(16, 2)
    loss = objective(Recorder(num_classes=10), label_dropout=0.5, time_sampler=LogitNormalTimes(ratio=0.5))

    def drawn(generator: torch.Generator) -> FlowBatch:
        return loss.draw(x0, x1, torch.arange(16) % 10, generator)

    untouched, generator = torch.get_rng_state(), torch.Generator().manual_seed(1)
    first, later = drawn(generator), drawn(generator)
    again, other = (drawn(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(untouched, torch.get_rng_state())
    for name in ("raw_source", "raw_target", "r", "t", "input", "conditional_velocity", "unified_input", "label"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    for name in ("r", "t", "unified_input", "label"):
        assert not torch.equal(getattr(first, name), getattr(other, name)), name
        assert not torch.equal(getattr(first, name), getattr(later, name)), name
    assert len(first) == 16


def test_training_stops_short_of_where_the_paths_velocity_is_infinite() -> None:
    x = torch.ones(5000, 1)
    loss = objective(path=VariancePreservingPath(), time_sampler=LogitNormalTimes(mean=8.0))
    batch = loss.draw(x, x, None, torch.Generator().manual_seed(0))
    assert 0.9985 < batch.r.max() <= VariancePreservingPath.last_time == 0.999
    assert torch.equal(batch.unified_input[:, 1], batch.r)


@settings(max_examples=30, deadline=None)
@given(errors=st.lists(st.floats(0.001, 50), min_size=1, max_size=6), p=st.floats(0, 1.5), c=st.floats(1e-3, 1.0))
def test_adaptive_weight_is_a_constant_for_the_gradient(errors: list[float], p: float, c: float) -> None:
    squared = torch.tensor(errors, dtype=torch.float64, requires_grad=True)
    loss = AdaptiveWeighting(p, c)(squared)
    (gradient,) = torch.autograd.grad(loss, squared)
    weight = [1 / (error + c) ** p for error in errors]
    assert loss.item() == pytest.approx(sum(w * e for w, e in zip(weight, errors, strict=True)) / len(errors))
    assert gradient.tolist() == pytest.approx([w / len(errors) for w in weight])
    assert AdaptiveWeighting(0.0, c)(squared).item() == pytest.approx(UniformWeighting()(squared).item())
    assert UniformWeighting()(squared).item() == pytest.approx(sum(errors) / len(errors))
