"""Distribution matching distillation where both scores are known: an affine generator, Gaussian data."""

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from losses.couplings import IndependentCoupling
from losses.distribution_matching_loss import DistributionMatchingLoss, NoisedBatch
from losses.paths import CosinePath, LinearPath, ProbabilityPath
from losses.predictions import VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.weightings import UniformWeighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel

MEAN, STD = 0.7, 0.4  # of the data


def gaussian_velocity(path: ProbabilityPath, z: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[dz/dt | z] from noise N(0, 1) to data N(mean, std^2)."""
    p = path.at(t)
    big = (p.alpha * std).square() + p.sigma.square()
    rate = (p.alpha * p.alpha_dot * std.square() + p.sigma * p.sigma_dot) / big
    return p.alpha_dot * mean + rate * (z - p.alpha * mean)


class Affine(VelocityModel):
    """The generator mean + std x0 where r < t, and, without a gradient, the velocity of its samples' own law where r = t."""

    def __init__(self, path: ProbabilityPath, mean: float, std: float):
        super().__init__()
        self.path = path
        self.mean, self.std = (torch.nn.Parameter(torch.tensor(value)) for value in (mean, std))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input)
        r, t = times.T[..., None]
        fake = gaussian_velocity(self.path, z, r, self.mean.detach(), self.std.detach())
        return torch.where(r < t, self.mean + (self.std - 1) * z, fake)


def matching(path: ProbabilityPath, mean: float, std: float, fake_rows: int = 3, teacher: str | None = "exact"):
    made = DistributionMatchingLoss(
        network=Affine(path, mean, std), path=path, teacher=teacher, fake_rows=fake_rows, strength=2.0,
        coupling=IndependentCoupling(), time_sampler=UniformTimes(), prediction=VelocityPrediction(),
        weighting=UniformWeighting(),
    )  # fmt: skip
    made.follow(lambda z, r, label: gaussian_velocity(path, z, r[:, None], torch.tensor(MEAN), torch.tensor(STD)))
    return made


def drawn(loss: DistributionMatchingLoss, seed: int = 0, rows: int = 64) -> NoisedBatch:
    x0, x1 = torch.randn(2, rows, 1, generator=torch.Generator().manual_seed(seed))
    return loss.draw(x0, x1, None, torch.Generator().manual_seed(seed + 1))


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()])
@pytest.mark.parametrize("fake_rows", [0, 3])
def test_samples_of_some_rows_move_by_the_difference_of_the_scores(path, fake_rows):
    loss = matching(path, -0.3, 1.1, fake_rows)
    batch, rows = drawn(loss), 64 // (1 + fake_rows)
    p = path.at(batch.time[:, None])
    x = -0.3 + 1.1 * batch.raw_source
    z = p.alpha * x + p.sigma * batch.noise
    score = lambda mean, std: -(z - p.alpha * mean) / ((p.alpha * std) ** 2 + p.sigma**2)  # noqa: E731
    difference = p.sigma**2 / p.alpha * (score(-0.3, 1.1) - score(MEAN, STD))
    terms = loss(batch)
    expected = 2 * difference[:rows].square().mean()
    torch.testing.assert_close(terms["generator"], expected, rtol=1e-4, atol=1e-6, check_dtype=False)
    mean, std = torch.autograd.grad(terms["loss"], [loss.network.mean, loss.network.std])
    torch.testing.assert_close(mean, 4 * difference[:rows].mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, 4 * (difference * batch.raw_source)[:rows].mean(), rtol=1e-4, atol=1e-5)
    v = gaussian_velocity(path, z, batch.time[:, None], torch.tensor(-0.3), torch.tensor(1.1))
    v_c = path.conditional_velocity(batch.noise, x, batch.time[:, None])
    torch.testing.assert_close(terms["fake"], (v - v_c).square().mean(), rtol=1e-4, atol=1e-5)


def test_noise_is_of_another_row():
    loss = matching(LinearPath(), -0.3, 1.1)
    batch = drawn(loss)
    assert torch.equal(batch.noise[1:], batch.raw_source[:-1])
    assert torch.equal(batch.unified_input[:, 1:], torch.tensor([[0.0, 1.0]]).expand(64, 2))


def test_the_generator_falls_to_the_data():
    """With the velocity of its own samples at hand: from N(-1, 1.5^2) to N(.7, .4^2)."""
    loss = matching(LinearPath(), -1.0, 1.5, fake_rows=0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    for step in range(400):
        optimizer.zero_grad()
        loss(drawn(loss, step, 256))["loss"].backward()
        optimizer.step()
    assert loss.network.mean.item() == pytest.approx(MEAN, abs=0.01) and loss.network.std.item() == pytest.approx(
        STD, abs=0.01
    )


def test_what_knows_no_velocity_teaches_none(small_run):
    folder = small_run("field", "loss=equilibrium_matching", "max_steps=1", "solver.steps=1")
    with pytest.raises(UserError, match="learned no velocity at an instant"):
        small_run("x", "loss=distribution_matching", "solver.steps=1", f"loss.teacher={folder / 'ckpts/mlp/field_last.pt'}")


def test_it_follows_a_teacher_that_is_known():
    with pytest.raises(UserError, match="follows a teacher; give"):
        matching(LinearPath(), 0.0, 1.0, teacher=None)
    loss = matching(LinearPath(), 0.0, 1.0, teacher="some.pt")
    assert "some.pt is not known exactly" in str(loss.stationary(None)) and loss.learns == "generator"
