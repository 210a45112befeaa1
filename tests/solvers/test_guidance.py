"""Guidance against linear combinations of known fields. Gaussians of one width have velocities and flow maps affine in their
mean, so that guidance between them is exactly the flow to N(m_null + scale (m_c - m_null), s^2)."""

import json

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from dataloaders.sources import GaussianSource
from dataloaders.synthetic import KMeans
from evaluation.closed_forms import ExactFlow
from evaluation.generate import generate
from evaluation.metrics.oracles import known_flow
from evaluation.sample import load
from helpers_cfg import Autoguidance, ClassifierFreeGuidance, Guidance, ZeroStarGuidance, guided
from losses.couplings import IndependentCoupling
from losses.meanflow_guidance import MeanFlowGuidance
from losses.meanflow_loss import MeanFlowLoss
from losses.objective import FlowObjective
from losses.paths import LinearPath
from losses.predictions import DataPrediction, VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.weightings import UniformWeighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel
from scripts import sample
from solvers.base_solver import BaseSolver
from solvers.flow_map import FlowMapSolver
from solvers.runge_kutta import RK4

S, CLASSES = 0.4, 3
MEANS = torch.tensor([1.0, -2.0, 0.5, 0.2])  # of the classes 0, 1, 2 and of the null label


class GaussianByClass(VelocityModel):
    """u(z, r, t) of the flow from N(0, 1) to N(MEANS[label] + shift, s^2), the same in every dimension and channel."""

    def __init__(self, num_classes: int = CLASSES, shift: float = 0.0):
        super().__init__()
        self.num_classes, self.shift = num_classes, shift
        self.seen: list[tuple[int, Tensor | None]] = []
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, times = split_unified_flow_matching_input(unified_input)
        self.seen.append((len(z), label))
        mean = MEANS[torch.full((len(z),), CLASSES) if label is None else label] + self.shift
        wide = (-1, *(1,) * (z.ndim - 1))
        r, t, mean = (v.double().reshape(wide) for v in (times[:, 0], times[:, 1], mean))
        step = torch.where(t > r, t - r, 1e-6)
        std = [((1 - v) ** 2 + (v * S) ** 2).sqrt() for v in (r, r + step)]
        carried = (r + step) * mean + std[1] / std[0] * (z - r * mean)
        return ((carried - z) / step * self.scale).float()


def objective(network: VelocityModel | None = None, label_dropout: float = 0.1) -> FlowObjective:
    return MeanFlowLoss(
        network=network or GaussianByClass(), path=LinearPath(), coupling=IndependentCoupling(), time_sampler=UniformTimes(),
        prediction=VelocityPrediction(), weighting=UniformWeighting(), label_dropout=label_dropout,
    ).eval()  # fmt: skip


def unified(states: Tensor, r: Tensor) -> Tensor:
    """Headed to halfway between r and the end."""
    return objective().unified(states, r, (1 + r) / 2)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "solver", [RK4(20), FlowMapSolver(1), FlowMapSolver(3)], ids=lambda s: f"{type(s).__name__}{s.steps}"
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guided_samples_of_gaussians_are_gaussians_of_the_extrapolated_mean(scale: float, solver: BaseSolver) -> None:
    plain, x0, label = objective(), noise(60, 4, 2, 2), torch.arange(60) % CLASSES
    samples = generate(guided(plain, ClassifierFreeGuidance(plain.network, scale)), solver, x0, label)
    mean = MEANS[CLASSES] + scale * (MEANS[label] - MEANS[CLASSES])
    torch.testing.assert_close(samples, mean[:, None, None, None] + S * x0, atol=2e-3, rtol=0)  # all four channels


def test_both_predictions_come_from_one_pass_of_twice_the_rows() -> None:
    network = GaussianByClass()
    label = torch.tensor([0, 1, CLASSES])
    ClassifierFreeGuidance(network, 2.0)(unified(noise(3, 2), torch.tensor(0.3)), label)
    ((rows, labels),) = network.seen
    assert rows == 6 and labels is not None and labels.tolist() == [0, 1, CLASSES, CLASSES, CLASSES, CLASSES]


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_only_labelled_rows_inside_the_interval_are_guided(scale: float) -> None:
    network, times = GaussianByClass(), torch.tensor([0.0, 0.2, 0.3, 0.5, 0.8, 0.9, 1.0, 0.5])
    x, label = unified(noise(8, 4, 2, 2), times), torch.tensor([0, 1, 2, 0, 1, 2, 0, CLASSES])
    strong, weak = network(x, label), network(x, None)
    inside = torch.tensor([False, True, True, True, True, False, False, True])[:, None, None, None]
    expected = torch.where(inside, weak + scale * (strong - weak), strong)
    guidance = ClassifierFreeGuidance(network, scale, (0.2, 0.8))
    torch.testing.assert_close(guidance(x, label), expected)
    assert torch.equal(guidance(x, label)[7], weak[7])
    assert torch.equal(guidance(x), weak)
    if scale == 1:
        assert torch.equal(guidance(x, label), strong)


@pytest.mark.parametrize("guide_classes", [0, CLASSES])
def test_autoguidance_leads_away_from_the_weaker_network(guide_classes: int) -> None:
    network, guide = GaussianByClass(), GaussianByClass(guide_classes, shift=-0.3)
    guidance = Autoguidance(network, guide, 2.0, (0.1, 1.0))
    x, label = unified(noise(6, 2), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])), torch.arange(6) % CLASSES
    weak, strong = guide(x, label if guide_classes else None), network(x, label)
    expected = torch.cat([strong[:1], (2 * strong - weak)[1:]])
    torch.testing.assert_close(guidance(x, label), expected)
    seen = guide.seen[-1][1]
    assert seen is None if guide_classes == 0 else torch.equal(seen, label)  # type: ignore[arg-type]
    assert torch.equal(Autoguidance(network, guide, 1.0)(x, label), strong)


def test_the_original_stays_as_it_is_and_its_new_weights_are_seen() -> None:
    plain, x = objective(), noise(5, 2)
    network, label = plain.network, torch.arange(5) % CLASSES
    copied = guided(plain, ClassifierFreeGuidance(network, 2.0))
    assert plain.network is network and isinstance(copied.network, Guidance) and copied.path is plain.path
    before = copied.velocity(x, torch.tensor(0.5), label)
    with torch.no_grad():
        network.scale.mul_(2)  # type: ignore[operator,union-attr]
    torch.testing.assert_close(copied.velocity(x, torch.tensor(0.5), label), 2 * before)


def test_meanflow_target_is_its_formula_inside_the_interval_and_the_plain_velocity_outside() -> None:
    v_c, v_label, v_null = noise(3, 4, 2, 2, 2).unbind(0)
    guidance = MeanFlowGuidance(omega=1.5, kappa=0.25, start=0.2, end=0.8)
    target = guidance.target(v_c, v_label, v_null, torch.tensor([0.1, 0.2, 0.8, 0.9]))
    torch.testing.assert_close(target[1:3], (1.5 * v_c + 0.25 * v_label - 0.75 * v_null)[1:3])
    assert torch.equal(target[[0, 3]], v_c[[0, 3]])
    assert torch.equal(MeanFlowGuidance().target(v_c, v_label, v_null, torch.zeros(4)), v_c)


@pytest.mark.parametrize(("omega", "kappa"), [(1.0, 0.5), (2.0, 0.0), (0.6, 0.7)])
def test_meanflow_target_is_stationary_at_the_effective_scale(omega: float, kappa: float) -> None:
    v_c, v_null = noise(2, 5, 2).double().unbind(0)
    guidance = MeanFlowGuidance(omega, kappa)
    exact = v_null + guidance.scale * (v_c - v_null)
    torch.testing.assert_close(guidance.target(v_c, exact, v_null, torch.full((5,), 0.5)), exact)
    assert guidance.scale == pytest.approx(omega / (1 - kappa))


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda: ClassifierFreeGuidance(GaussianByClass(0), 2.0), "train it with conditional=true"),
        (lambda: ClassifierFreeGuidance(GaussianByClass(), -1.0), "a number of at least 0"),
        (lambda: ClassifierFreeGuidance(GaussianByClass(), float("nan")), "a number of at least 0"),
        (lambda: ClassifierFreeGuidance(GaussianByClass(), 2.0, (0.5, 0.2)), "two times"),
        (lambda: ClassifierFreeGuidance(GaussianByClass(), 2.0, (0.5,)), "two times"),
        (lambda: guided(objective(label_dropout=0), ClassifierFreeGuidance(GaussianByClass(), 2.0)), "label_dropout=0.1"),
        (lambda: Autoguidance(GaussianByClass(0), GaussianByClass(3), 2.0), "3 classes, the guided one 0"),
        (lambda: MeanFlowGuidance(start=0.7, end=0.2), "start <= end"),
    ],
)
def test_mistakes_are_one_sentence(mistake, sentence) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        mistake()
    assert "\n" not in str(error.value)


SCORED = (
    "evaluation=generator", "evaluation.samples=40", "evaluation.final_samples=40", "max_steps=4",
    "+evaluation.metrics.velocity.final_draws=500", "~evaluation.metrics.log_prob", "~evaluation.metrics.budget",
)  # fmt: skip


def scores(folder, name: str) -> dict[str, float]:
    return json.loads((folder / f"runs/{name}/status.json").read_text())["scores"]


@pytest.mark.slow
def test_a_guided_run_scores_guided_samples_and_the_plain_loss(small_run, capsys, tmp_path) -> None:
    folder = small_run("plain", "conditional=true", *SCORED)
    small_run("free", "conditional=true", "guidance=cfg", "guidance.scale=3", *SCORED)
    plain, free = scores(folder, "plain"), scores(folder, "free")
    assert plain["eval/loss"] == free["eval/loss"]
    assert plain["eval/energy_distance"] != free["eval/energy_distance"]
    # from Python and from the command line: a run's own guidance, another, none
    path, bare = folder / "ckpts/mlp/free_last.pt", load(folder / "ckpts/mlp/plain_last.pt")
    torch.testing.assert_close(load(path).sample(20), bare.sample(20, guidance=3.0))
    torch.testing.assert_close(load(path).sample(20, guidance=1), bare.sample(20))
    assert not torch.allclose(load(path).sample(20), bare.sample(20))
    for words, scale in (([], 3), (["guidance=cfg", "guidance.scale=2"], 2), (["guidance=none"], 1)):
        assert sample.main([f"ckpt={path}", "n=20", f"out={tmp_path / 'x.npy'}", *words]) == 0
        torch.testing.assert_close(numbers(tmp_path / "x.npy"), bare.sample(20, guidance=scale))
    # a run goes on with other guidance
    small_run("free", "resume=true", "guidance=none", "max_steps=6")
    small_run("plain", "resume=true", "max_steps=6")
    assert scores(folder, "free")["eval/energy_distance"] == scores(folder, "plain")["eval/energy_distance"]
    capsys.readouterr()
    small_run("e", f"eval_checkpoint={path}", "guidance=cfg", "guidance.scale=2", "guidance.interval=[0.1,0.6]")
    assert "ClassifierFreeGuidance 2 for t in [0.1, 0.6]" in capsys.readouterr().out


def numbers(path) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.load(path))


def test_a_weaker_checkpoint_guides_and_is_held_to_the_flow_of_the_data_it_learned(small_run) -> None:
    folder = small_run("weak", "max_steps=2", "model.width=8")
    weak = folder / "ckpts/mlp/weak_last.pt"
    small_run("x", "guidance=autoguidance", f"guidance.checkpoint={weak}", "guidance.scale=2", *SCORED)
    assert scores(folder, "x")["oracle/velocity_error"] > 0
    model, guide = load(folder / "ckpts/mlp/x_last.pt"), load(weak)
    flow, dataset, source = model.flow(), KMeans(), GaussianSource([2])
    z, t = noise(7, 2).double(), torch.tensor(0.4)
    plain = known_flow(model.objective, dataset, source)
    torch.testing.assert_close(known_flow(flow, dataset, source)(z, t), plain(z, t))  # both learned the same
    small_run("wide", "max_steps=2", "dataloaders.std=0.2")
    small_run("y", "guidance=autoguidance", f"guidance.checkpoint={folder / 'ckpts/mlp/wide_last.pt'}", "max_steps=2")
    wide = ExactFlow(KMeans(std=0.2).mixture.to(dtype=torch.float64), 1.0, LinearPath())
    found = known_flow(load(folder / "ckpts/mlp/y_last.pt").flow(), dataset, source)
    torch.testing.assert_close(found(z, t), 2 * plain(z, t) - wide(z, t))
    x, t = noise(7, 2), torch.tensor(0.4)
    torch.testing.assert_close(model.flow().velocity(x, t), 2 * model.velocity(x, t) - guide.velocity(x, t))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["guidance=cfg"], "conditional=true"),
        (["guidance=cfg", "conditional=true", "loss.label_dropout=0.0"], "loss.label_dropout=0"),
        (["guidance=autoguidance"], "guidance.checkpoint is missing"),
        (["guidance=autoguidance", "guidance.checkpoint=/nowhere.pt"], "guidance.checkpoint=/nowhere.pt is not a file"),
        (["guidance=autoguidance", "guidance.checkpoint={w}", "loss=meanflow"], "second_time is end, here it is state"),
        (["guidance=autoguidance", "guidance.checkpoint={w}", "loss/path=cosine"], "its path is"),
        (
            [
                "guidance=autoguidance",
                "guidance.checkpoint={w}",
                "dataloaders=digits",
                "model=cnn",
                "dataloaders.epoch_size=1438",
            ],
            "its state shape is",
        ),
        (["guidance=cfg", "guidance.scale=-1"], "guidance.scale takes"),
        (["guidance=cfg", "guidance.interval=[0.5]"], "guidance.interval takes"),
        (["guidance=other"], "does not exist"),
    ],
)
def test_a_run_that_cannot_be_guided_is_refused_before_it_trains(words, sentence, small_run, tmp_path) -> None:
    weak = tmp_path / "weak/ckpts/mlp/weak_last.pt"
    if any("{w}" in word for word in words):
        small_run("weak", "max_steps=1", output="weak")
    with pytest.raises(UserError, match=sentence) as error:
        small_run("x", *(word.format(w=weak) for word in words))
    assert "\n" not in str(error.value) and not (tmp_path / "outputs/runs/x").exists()


def test_a_checkpoint_from_before_guidance_is_sampled(shared_run) -> None:
    model = load(shared_run("x", "epochs=1") / "ckpts/mlp/x_last.pt")
    expected = model.sample(5)
    for key in ("guidance", "vae"):
        model.config.pop(key, None)
    model.config["choices"].pop("guidance", None)
    assert torch.equal(model.sample(5), expected)


def planes(v: Tensor) -> VelocityModel:
    """A network of three classes in the plane, whose velocities v (4, 2) are constant; the null label's comes last."""

    class Constant(VelocityModel):
        num_classes = 3

        def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
            rows = torch.full((len(unified_input),), 3) if label is None else label
            return v[rows]

    return Constant()


def test_cfg_zero_star_pushes_away_from_what_the_class_has_not():
    v = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0], [0.5, 1.5]])
    unified = torch.cat([torch.zeros(4, 2), torch.tensor([[0.0, 1.0], [0.3, 1.0], [0.6, 1.0], [0.9, 1.0]])], dim=1)
    label = torch.tensor([0, 1, 2, 3])
    share = (v @ v[3] / v[3].square().sum())[:, None]
    expected = share * v[3] + 2.5 * (v - share * v[3])
    torch.testing.assert_close(ZeroStarGuidance(planes(v), 2.5)(unified, label), expected)
    torch.testing.assert_close(ZeroStarGuidance(planes(v), 1.0)(unified, label), v)
    stopped = ZeroStarGuidance(planes(v), 2.5, zero_until=0.5)(unified, label)
    torch.testing.assert_close(stopped, expected * torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
    along = torch.stack([3 * v[3], -v[3], 0 * v[3], v[3]])  # nothing is left to push away from
    torch.testing.assert_close(ZeroStarGuidance(planes(along), 7.0)(unified, label), along)


def test_cfg_zero_star_is_refused_where_it_means_nothing():
    flow = objective()
    with pytest.raises(UserError, match="leave it at 0"):
        guided(flow, ZeroStarGuidance(flow.network, 2.0, zero_until=0.1))
    flow.prediction = DataPrediction()
    with pytest.raises(UserError, match="predicts x1"):
        guided(flow, ZeroStarGuidance(flow.network, 2.0))
