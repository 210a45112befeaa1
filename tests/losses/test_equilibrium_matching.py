"""Equilibrium matching against sums over times, and its climbing against the closed form of a linear field."""

import json

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from configuration.compose import compose_config, resolved
from evaluation.exact_worlds import MixtureWorld
from evaluation.parts import build_objective, build_solver
from losses.couplings import IndependentCoupling
from losses.equilibrium_matching_loss import EquilibriumMatchingLoss
from losses.objective import FlowObjective
from losses.paths import LinearPath
from losses.predictions import DataPrediction, VelocityPrediction
from losses.time_samplers import LogitNormalTimes, TimeSampler, UniformTimes
from losses.weightings import UniformWeighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel
from solvers.ascent import Ascent
from tests.losses.exact_mixture import MEANS, STDS, WEIGHTS, density, velocity


class Pulls(VelocityModel):
    """f(z) = 3 (2 - z), and what it was shown of times."""

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, self.times = split_unified_flow_matching_input(unified_input)
        return 3 * (2 - z)


def matching(sampler: TimeSampler | None = None, **parts) -> EquilibriumMatchingLoss:
    shared = {"prediction": VelocityPrediction(), "weighting": UniformWeighting(), "coupling": IndependentCoupling()}
    shared |= {"path": LinearPath(), "time_sampler": sampler or UniformTimes()}
    return EquilibriumMatchingLoss(network=Pulls(), **(shared | parts))


def test_its_minimum_is_the_sum_over_all_times_at_which_a_state_may_have_come():
    z = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    state, at = z.expand(len(t), -1), t[:, None].expand(-1, len(z))
    c, chance = 4 * (5 - 5 * at).clamp(max=1), density(state, at)
    expected = (c * velocity(state, at) * chance).sum(0) / chance.sum(0)
    world = MixtureWorld(LinearPath(), [WEIGHTS.tolist()], MEANS.tolist(), STDS.tolist())
    ends = torch.zeros(len(z)), torch.ones(len(z))
    found = matching().exact(world)(z[:, None], *ends, None)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "not of LogitNormalTimes" in str(matching(LogitNormalTimes()).exact(world))


def test_v_c_is_weighted_by_a_decay_and_the_network_sees_no_time():
    loss = matching()
    x0, x1 = torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(0))
    batch = loss.draw(x0, x1, None, torch.Generator().manual_seed(1))
    t = batch.r[:, None]
    c = torch.where(t < 0.8, 4.0, 20 * (1 - t))
    expected = (3 * (2 - t * x1 - (1 - t) * x0) - c * (x1 - x0)).square().mean()
    torch.testing.assert_close(loss(batch)["loss"], expected)
    assert torch.equal(loss.network.times, torch.tensor([[0.0, 1.0]]).expand(64, 2)) and 0.1 < t.min() + t.max() < 1.9


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_climbing_of_a_linear_field_is_its_recurrence(momentum):
    """x_k - 2 is a sum of powers of the roots of q^2 = (1 - b (1 + m)) q + b m, b = 3 eta, the first step a plain one."""
    solver, b = Ascent(steps=7, eta=0.1, momentum=momentum), 3 * 0.1
    x0, seen = torch.tensor([[5.0], [-1.0]], dtype=torch.float64), []
    for _ in range(2):  # nothing is left of the first way
        end = solver.sample(matching(), x0, None, lambda k: x0, lambda x, t: seen.append(x))
    middle = 0.5 * (1 - b * (1 + momentum))
    p, q = (middle + sign * (middle**2 + b * momentum) ** 0.5 for sign in (1, -1))
    share = (1 - b - q) / (p - q)
    expected = 2 + (x0 - 2) * (share * p**7 + (1 - share) * q**7)
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert solver.evaluations == 7 and len(seen) == 16


def configured(*words: str) -> tuple[FlowObjective, dict]:
    config = resolved(compose_config(["run_name=x", "model.width=8", "model.depth=1", *words]))
    objective = build_objective(config, torch.device("cpu"))
    assert isinstance(objective, FlowObjective)
    return objective, config


@pytest.mark.parametrize("words", [
    ["loss=equilibrium_matching", "solver=midpoint"], ["loss=equilibrium_matching", "solver=flow_map"],
    ["loss=mse", "solver=ascent"],
])  # fmt: skip
def test_a_field_without_time_is_climbed_and_a_flow_is_not(words):
    objective, config = configured(*words)
    with pytest.raises(UserError, match="a field without time"):
        build_solver(config).check(objective)


def test_what_it_does_not_teach_is_said():
    objective, _ = configured("loss=equilibrium_matching")
    for ask in (objective.check_learns_map, objective.check_learns_velocity):
        with pytest.raises(UserError, match="solver=ascent"):
            ask()
    with pytest.raises(UserError, match="loss/prediction=velocity"):
        matching(prediction=DataPrediction())


@pytest.mark.slow
def test_a_run_is_scored_by_its_climbed_samples_alone(small_run):
    few = ["evaluation=generator", "evaluation.samples=40", "evaluation.final_samples=40", "max_steps=2", "solver.steps=3"]
    folder = small_run("x", "loss=equilibrium_matching", *few)
    scores = json.loads((folder / "runs/x/status.json").read_text())["scores"]
    assert scores["eval/nfe"] == 3 and "eval/energy_distance" in scores
    assert not [name for name in scores if name.startswith("oracle/") or name.endswith("nfe_p")]
