"""The data that losses are proven on: their flow against the integrated one, derivatives against differences."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, distributions

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.closed_forms import ExactFlow
from evaluation.exact_worlds import MixtureWorld
from evaluation.prove import WORLDS
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath
from solvers.runge_kutta import RK4

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


def by_score(path: ProbabilityPath, label: Tensor) -> dict[bool, Callable[[Tensor, Tensor], Tensor]]:
    """The guided velocity of scale 2.5 and the plain one, v = alpha' E[x1 | z] + sigma' E[x0 | z], both from torch's own
    densities. Labels: 0 and 1, and 2 for all.
    """
    weights, means, stds = (torch.tensor(part, dtype=torch.float64) for part in WORLDS["two classes"])

    def of(chance: Tensor, z: Tensor, t: Tensor) -> Tensor:
        p, at = path.at(t), z.detach().requires_grad_()
        normal = distributions.Normal(p.alpha * means, ((p.alpha * stds) ** 2 + p.sigma**2).sqrt())
        law = distributions.MixtureSameFamily(distributions.Categorical(chance), normal)
        x0 = -p.sigma * torch.autograd.grad(law.log_prob(at).sum(), at)[0]
        return p.alpha_dot * (z - p.sigma * x0) / p.alpha + p.sigma_dot * x0

    def both(z: Tensor, t: Tensor) -> Tensor:
        each = torch.stack([of(chance, z, t) for chance in (*weights, weights.sum(0))])
        return torch.stack([each[label, torch.arange(len(z))], each[2]])

    guided = lambda z, t: torch.tensordot(torch.tensor([2.5, -1.5]).double(), both(z, t), 1)  # noqa: E731
    return {True: guided, False: lambda z, t: both(z, t)[0]}


@pytest.mark.parametrize(("path", "interval"), [(CosinePath(), (0.3, 0.7)), (VariancePreservingPath(), (0.0, 1.0))])
def test_the_guided_mean_velocity_is_that_of_the_guided_flow(path, interval):
    """Against Runge and Kutta's steps of the path itself, piece by piece; the null label keeps the plain flow."""
    plain = MixtureWorld(path, *WORLDS["two classes"])
    world, (z, r, label) = plain.guided(2.5, *interval), states(plain, path, 60)
    label[:10] = 2
    fields, t, z = by_score(path, label), torch.full_like(r, 0.9), z.double()
    times, x = sorted({0.4, *(end for end in interval if 0.4 < end < 0.9), 0.9}), z[:, 0]
    for low, high in pairwise(times):
        inside = interval[0] < (low + high) / 2 < interval[1]
        x = RK4(40).solve(fields[inside], x, torch.linspace(low, high, 41, dtype=torch.float64))
    expected = (x[:, None] - z) / 0.5
    torch.testing.assert_close(world.mean_velocity(z, r, t, label), expected, rtol=0, atol=2e-6)
    assert (world.mean_velocity(z, r, t, label) - plain.mean_velocity(z, r, t, label))[10:].abs().median() > 0.02
    at_once = world.mean_velocity(z, r, r, label)
    torch.testing.assert_close(at_once[:, 0], fields[True](z[:, 0], r[0]), rtol=0, atol=1e-8)
    later = fields[interval[1] == 1](x, t[0])
    torch.testing.assert_close(world.velocity(x[:, None], t, t, label)[:, 0], later, rtol=0, atol=1e-8)
    torch.testing.assert_close(world.mean_velocity(z, r, t), plain.mean_velocity(z, r, t), rtol=0, atol=0)


def test_where_the_guided_flow_leads_stays_the_same_along_it():
    """dX/dr + v . dX/dz = 0 at every r, where the difference quotients of a loss reach outside [0, 1], too."""
    plain = MixtureWorld(LinearPath(), *WORLDS["two classes"])
    world, r = plain.guided(3.0, 0.0, 1.0), torch.tensor([0.0, 0.001, 0.3, 0.6, 0.99], dtype=torch.float64)
    z, label = torch.tensor([[0.4], [-1.0], [0.7], [0.2], [1.1]], dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    v, t = world.velocity(z, r, r, label), torch.ones_like(r)
    change = torch.func.jvp(lambda *at: world.flow_map(*at, t, label), (z, r), (v, torch.ones_like(r)))[1]
    assert change.abs().max() < 1e-4
    ahead, behind = (world.flow_map(z + e * v, r + e, t + e * 0.5, label) for e in (2e-3, -2e-3))
    torch.testing.assert_close((ahead - behind) / 4e-3, 0.5 * world.velocity(world.flow_map(z, r, t, label), t, t, label),
                               rtol=0, atol=2e-3)  # fmt: skip
