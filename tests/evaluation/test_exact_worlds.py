"""The data that losses are proven on: their flow against the integrated one, derivatives against differences."""

import pytest
import torch
from torch import Tensor

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.closed_forms import ExactFlow
from evaluation.exact_worlds import MixtureWorld
from evaluation.prove import WORLDS
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath

PATHS = [LinearPath(), CosinePath(), VariancePreservingPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=[type(path).__name__ for path in PATHS])


def states(world: MixtureWorld, path: ProbabilityPath, count: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """States on the path at one time, headed to a later one, and their labels, in float64."""
    generator = torch.Generator().manual_seed(0)
    x1, label = world.sample(count, generator)
    r = torch.full((count,), 0.4, dtype=torch.float64)
    return path.state(torch.randn(x1.shape, generator=generator), x1, r[:, None]), r, label


@every_path
@pytest.mark.parametrize("name", WORLDS)
def test_velocity_and_map_are_those_of_the_exact_flow(name, path):
    weights, means, stds = (torch.tensor(part, dtype=torch.float64) for part in WORLDS[name])
    world = MixtureWorld(path, *WORLDS[name])
    z, r, _ = states(world, path)
    flow = ExactFlow(GaussianMixture(weights.sum(0), means[:, None], stds), 1.0, path)
    t = torch.full_like(r, 0.97)
    torch.testing.assert_close(world.velocity(z, r, t), flow(z, r), rtol=0, atol=1e-10)
    torch.testing.assert_close(world.flow_map(z, r, t), flow.flow_map(z, 0.4, 0.97), rtol=0, atol=1e-6)
    torch.testing.assert_close(world.mean_velocity(z, r, r), world.velocity(z, r, r), rtol=0, atol=1e-12)


@every_path
def test_derivatives_of_the_mean_velocity_are_exact(path):
    world, step = MixtureWorld(path, *WORLDS["a mixture"]), 1e-5
    z, r, _ = states(world, path)
    t = torch.linspace(0.4, 0.97, len(r), dtype=torch.float64)
    tangents = (0.5 * torch.ones_like(z), torch.ones_like(r), -0.3 * torch.ones_like(r))
    derivative = torch.func.jvp(lambda *at: world.mean_velocity(*at), (z, r, t), tangents)[1]
    moved = lambda e: (x + e * d for x, d in zip((z, r, t), tangents, strict=True))  # noqa: E731
    ahead, behind = (world.mean_velocity(*moved(e)) for e in (step, -step))
    torch.testing.assert_close(derivative[3:], ((ahead - behind) / (2 * step))[3:], rtol=1e-4, atol=1e-4)


def test_a_label_chooses_its_components_and_the_null_label_all():
    path = LinearPath()
    world, first = MixtureWorld(path, *WORLDS["two classes"]), MixtureWorld(path, [[1.0]], [-1.2], [0.3])
    z, r, label = states(world, path)
    t, zero, null = torch.full_like(r, 0.8), torch.zeros_like(label), torch.full_like(label, 2)
    torch.testing.assert_close(world.mean_velocity(z, r, t, zero), first.mean_velocity(z, r, t), rtol=0, atol=1e-6)
    torch.testing.assert_close(world.mean_velocity(z, r, t, null), world.mean_velocity(z, r, t), rtol=0, atol=1e-10)
    assert float((label == 0).double().mean()) == pytest.approx(0.35, abs=0.05)
