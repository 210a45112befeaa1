"""The exact flow of finite data, and what it says of a network that was trained on them."""

import pytest
import torch
from torch import Tensor

from evaluation.empirical_flow import EmpiricalFlow
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath

PATHS = [LinearPath(), CosinePath(), VariancePreservingPath()]
STD = 0.8  # of the source
SHAPE = (2, 3, 4)


def drawn(path: ProbabilityPath, count: int = 40, seed: int = 0) -> tuple[Tensor, ...]:
    """Rows (7, ...) and labels; the row that each state is made of, the states, their times, conditional velocities."""
    g = torch.Generator().manual_seed(seed)
    rows, labels = torch.randn(7, *SHAPE, generator=g) / 3, torch.tensor([0, 0, 1, 0, 1, 1, 0])
    index, t = torch.randint(7, (count,), generator=g), path.last_time * (torch.arange(count) + 0.5) / count
    x0, wide = STD * torch.randn(count, *SHAPE, generator=g), t.reshape(-1, 1, 1, 1)
    return rows, labels, index, path.state(x0, rows[index], wide), t, path.conditional_velocity(x0, rows[index], wide)


def brute_force(path: ProbabilityPath, rows: list[Tensor], weights: list[float], z: Tensor, t: Tensor) -> Tensor:
    """Return the definition for one state, in float64."""
    p, z = path.at(t.double()), z.double()
    x0 = [(z - p.alpha * x.double()) / p.sigma for x in rows]
    shares = (torch.tensor(weights).double().log() - torch.stack([0.5 * (x / STD).square().sum() for x in x0])).softmax(0)
    each = [p.alpha_dot * x.double() + p.sigma_dot * noise for x, noise in zip(rows, x0, strict=True)]
    return sum(share * v for share, v in zip(shares, each, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["plain", "conditional", "mirrored", "without", "with", "shares", "all"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_flow_is_the_definition(path: ProbabilityPath, case: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr("evaluation.empirical_flow.WEIGHTS", 50)  # several chunks of states and of rows
    monkeypatch.setattr("evaluation.empirical_flow.ROWS", 72)
    rows, labels, index, z, t, _ = drawn(path)
    mirrored, conditional, without = (
        case in ("mirrored", "with", "all"),
        case in ("conditional", "all"),
        case in ("without", "all"),
    )
    shares = torch.linspace(0.5, 1.5, 7) if case in ("shares", "all") else torch.ones(7)
    flow = EmpiricalFlow(
        rows, STD, path, labels if conditional else None, mirrored, shares if case in ("shares", "all") else None
    )
    own, z = labels[index] if conditional else None, z.to(dtype)
    more = torch.randn(len(z), *SHAPE, generator=torch.Generator().manual_seed(1)) / 3
    left_out = index if without else None
    found = flow.velocity_with(z, t, more) if case == "with" else flow.velocity(z, t, own, left_out)
    for k, state in enumerate(z):
        kept = [
            i for i in range(7) if not (conditional and labels[i] != labels[index[k]]) and not (without and i == index[k])
        ]
        known = [(rows[i], shares[i].item()) for i in kept] + [(more[k], 1.0)] * (case == "with")
        known += [(row.flip(-1), share) for row, share in known] * mirrored
        truth = brute_force(path, [row for row, _ in known], [share for _, share in known], state, t[k])
        assert found.dtype == dtype and found.shape == z.shape
        assert (found[k].double() - truth).norm() <= 1e-5 * truth.norm()


def test_one_row_leaves_no_other_velocity() -> None:
    path = LinearPath()
    rows, _, _, z, t, _ = drawn(path)
    flow = EmpiricalFlow(rows[:1], STD, path)
    x0 = (z - path.at(t).alpha.reshape(-1, 1, 1, 1) * rows[0]) / (1 - t).reshape(-1, 1, 1, 1)
    assert torch.allclose(flow(z, t), rows[0] - x0, atol=1e-4)
    assert flow.velocity(z, t, without=torch.zeros(len(z), dtype=torch.int64)).isnan().all()
    twice = EmpiricalFlow(rows[:2], STD, path)
    assert torch.allclose(flow.velocity_with(z, t, rows[1].expand_as(z)), twice(z, t), atol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_loss_minus_the_least_one_is_the_distance_to_the_flow(path: ProbabilityPath) -> None:
    """For any field u: E|v_c - u|^2 - E|v_c - v|^2 = E|u - v|^2; and no field has less loss."""
    rows, _, _, z, t, v_c = drawn(path, count=20_000)
    exact = EmpiricalFlow(rows, STD, path)(z, t)
    other = 0.9 * exact + 0.1 * z.tanh()
    norm = lambda x: x.flatten(1).square().sum(1)  # noqa: E731
    paired = norm(v_c - other) - norm(v_c - exact) - norm(other - exact)
    assert norm(other - exact).mean() > 0.01
    assert abs(paired.mean()) < 4 * paired.std() / len(paired) ** 0.5
