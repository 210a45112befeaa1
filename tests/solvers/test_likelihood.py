"""Log-likelihoods against closed forms: a linear field, one Gaussian, a mixture, and an image-shaped state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import UserError
from dataloaders.gaussian_mixture import GaussianMixture
from dataloaders.sources import GaussianSource
from solvers.base_solver import BaseSolver
from solvers.dopri5 import Dopri5
from solvers.likelihood import encode, log_likelihood
from solvers.runge_kutta import RK4, Euler, Heun, Midpoint

M, S = 0.7, 0.4
DRIFT = torch.tensor([[0.6, 2.0, 0.0], [-1.0, -0.9, 0.5], [0.3, 0.0, 0.8]], dtype=torch.float64)  # trace 0.5


def gaussian_velocity(z: Tensor, t: Tensor) -> Tensor:
    """The exact velocity of the linear path from N(0, I) to N(M, S^2 I)."""
    variance = (1 - t) ** 2 + (t * S) ** 2
    return M + (t * S**2 - (1 - t)) / variance * (z - t * M)


def mixture_velocity(mixture: GaussianMixture, z: Tensor, t: Tensor) -> Tensor:
    """The exact velocity of the linear path from N(0, I) to the mixture: its components', by responsibility."""
    variances = (1 - t) ** 2 + (t * mixture.stds) ** 2
    responsibility = GaussianMixture(mixture.weights, t * mixture.means, variances.sqrt()).component_log_probs(z)
    rates = (t * mixture.stds**2 - (1 - t)) / variances
    velocities = mixture.means + rates[:, None] * (z[:, None, :] - t * mixture.means)
    return (responsibility.softmax(1)[..., None] * velocities).sum(1)


def gaussian_log_prob(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Independent of the library: (B,)."""
    return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("divergence", ["auto", "exact"])
@pytest.mark.parametrize("solver", [Midpoint(200), Heun(200), RK4(25), Dopri5(1e-8, 1e-8)], ids=lambda s: type(s).__name__)
def test_linear_field(solver: BaseSolver, divergence: str) -> None:
    """dx/dt = A x carries N(0, I) to N(0, E E^T), E = exp(A)."""
    x1 = 2 * normal(16, 3)
    flow = torch.linalg.matrix_exp(DRIFT)
    truth = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), flow @ flow.T)
    found = log_likelihood(lambda x, t: x @ DRIFT.T, x1, gaussian_log_prob, solver, divergence)  # type: ignore[arg-type]
    assert found.standard_error is None
    assert torch.allclose(found.x0, x1 @ torch.linalg.inv(flow).T, atol=1e-3)
    assert torch.allclose(found.log_prob, truth.log_prob(x1), atol=1e-3)


@pytest.mark.parametrize(
    "solver, mean_error",
    [(Euler(50), 3e-2), (Midpoint(25), 5e-4), (Heun(25), 2e-3), (RK4(12), 5e-6), (Dopri5(), 1e-6)],
    ids=lambda case: type(case).__name__,
)
def test_single_gaussian_at_fifty_evaluations(solver: BaseSolver, mean_error: float) -> None:
    """Measured: midpoint's 25 steps leave 4.3e-4 nats (7.1e-4 at worst); RK4's 12 leave 2.4e-6 (3.4e-5)."""
    x1 = M + S * normal(2000, 1)
    found = log_likelihood(gaussian_velocity, x1, gaussian_log_prob, solver)
    assert (found.log_prob - gaussian_log_prob(x1, M, S)).abs().mean() < mean_error
    assert solver.evaluations < 65


def test_mixture() -> None:
    mixture = GaussianMixture(
        torch.tensor([0.35, 0.65], dtype=torch.float64),
        torch.tensor([[-1.2, 0.4], [0.9, -0.3]], dtype=torch.float64),
        torch.tensor([0.3, 0.5], dtype=torch.float64),
    )
    x1 = 1.2 * normal(200, 2)
    found = log_likelihood(lambda x, t: mixture_velocity(mixture, x, t), x1, gaussian_log_prob, RK4(50))
    assert torch.allclose(found.log_prob, mixture.log_prob(x1), atol=1e-4)


@pytest.mark.parametrize("std", [1.0, 2.5])
def test_the_projects_source_and_image_shapes(std: float) -> None:
    """dx/dt = x doubles as a change of scale by e: D = 2 * 3 * 3 = 18 dimensions, in float32."""
    x1 = normal(4, 2, 3, 3).float()
    found = log_likelihood(lambda x, t: x, x1, GaussianSource([2, 3, 3], std).log_prob, RK4(12), "exact")
    assert found.x0.shape == x1.shape
    assert found.log_prob.dtype == torch.float32
    assert torch.allclose(found.log_prob, gaussian_log_prob(x1, 0.0, std * math.e), atol=1e-4)


def swirl(x: Tensor, t: Tensor) -> Tensor:
    """A field with a dense, state-dependent Jacobian, so that Hutchinson's estimate has a spread."""
    return torch.tanh(2 * x.roll(1, dims=1) + x * x.roll(2, dims=1)) + 0.3 * torch.sin(3 * x) * (1 - t)


def test_hutchinson_agrees_within_its_standard_errors() -> None:
    x1 = normal(400, 6)
    exact = log_likelihood(swirl, x1, gaussian_log_prob, Midpoint(8), "exact")
    generator = torch.Generator().manual_seed(1)
    estimate = log_likelihood(swirl, x1, gaussian_log_prob, Midpoint(8), "hutchinson", 32, generator)
    assert estimate.standard_error is not None
    assert torch.allclose(estimate.x0, exact.x0)
    z = (estimate.log_prob - exact.log_prob) / estimate.standard_error
    assert abs(float(z.mean())) < 4 / 400**0.5
    assert 0.85 < float(z.std()) < 1.25  # 1.03 for Student's t with 31 degrees of freedom
    assert float(estimate.standard_error.mean()) > 0.1


def test_hutchinson_error_shrinks_as_the_root_of_the_probes() -> None:
    x1 = normal(100, 6)
    few, many = (log_likelihood(swirl, x1, gaussian_log_prob, Midpoint(4), "hutchinson", k) for k in (8, 128))
    assert few.standard_error is not None
    assert many.standard_error is not None
    ratio = few.standard_error.square().mean() / many.standard_error.square().mean()
    assert 16 * 0.8 < float(ratio) < 16 * 1.25


def test_hutchinson_is_exact_for_a_diagonal_jacobian() -> None:
    """e^T diag(d) e = sum d for random signs, and for no other probes of unit variance."""
    x1 = M + S * normal(20, 40)
    found = log_likelihood(gaussian_velocity, x1, gaussian_log_prob, RK4(12))
    assert found.standard_error is not None
    assert found.standard_error.max() < 1e-12
    assert torch.allclose(found.log_prob, gaussian_log_prob(x1, M, S), atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(dim=st.integers(1, 24))
def test_auto_is_exact_up_to_sixteen_dimensions(dim: int) -> None:
    found = log_likelihood(lambda x, t: x, normal(2, dim), gaussian_log_prob, Euler(1), probes=2)
    assert (found.standard_error is None) == (dim <= 16)


def test_probes_come_from_the_generator_and_stay_fixed() -> None:
    def estimate(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return log_likelihood(swirl, normal(5, 6), gaussian_log_prob, Euler(3), "hutchinson", 2, generator).log_prob

    state = torch.random.get_rng_state()
    assert torch.equal(estimate(3), estimate(3))
    assert torch.equal(estimate(None), estimate(None))
    assert not torch.equal(estimate(3), estimate(4))
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not touched


def test_the_same_with_and_without_gradients() -> None:
    """A network's likelihood under no_grad and inference_mode, leaving nothing behind on its parameters."""
    network = torch.nn.Linear(2, 2).double()
    x1 = normal(3, 2)

    def found() -> Tensor:
        return log_likelihood(lambda x, t: network(x).tanh(), x1, gaussian_log_prob, Midpoint(4)).log_prob

    with torch.no_grad():
        quiet = found()
    with torch.inference_mode():
        x1 = x1 * 1.0
        inference = found()
    x1 = normal(3, 2).requires_grad_()  # data that asks for gradients gets none
    assert torch.equal(found(), quiet)
    assert torch.equal(inference, quiet)
    assert not found().requires_grad
    assert network.weight.grad is None


def test_encode_reaches_the_noise() -> None:
    x0 = normal(8, 2)
    x1 = M + S * x0  # the exact flow map from t = 0 to t = 1
    assert torch.allclose(encode(gaussian_velocity, x1, RK4(25)), x0, atol=1e-4)


@pytest.mark.parametrize("options", [{"divergence": "trace"}, {"divergence": "hutchinson", "probes": 1}])
def test_mistakes_are_one_sentence(options: dict[str, str | int]) -> None:
    with pytest.raises(UserError) as error:
        log_likelihood(gaussian_velocity, normal(2, 2), gaussian_log_prob, Euler(1), **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
