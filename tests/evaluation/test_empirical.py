"""The exact flow of finite data, and what it says of a network that was trained on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from backends.submission import prepare
from dataloaders.augmentation import Augmentation
from dataloaders.gaussian_mixture import GaussianMixture
from dataloaders.photos import Photos
from dataloaders.sources import GaussianSource
from dataloaders.synthetic import KMeans
from dataloaders.tensor_dataset import TensorDataset
from evaluation import evaluator
from evaluation.closed_forms import ExactFlow
from evaluation.empirical_flow import EmpiricalFlow
from evaluation.metrics.base_metric import Absent, Generation
from evaluation.metrics.empirical import Memorisation, Memorised, memorisation, training_flow
from helpers_cfg import ClassifierFreeGuidance
from losses.couplings import IndependentCoupling, MinibatchOTCoupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath
from losses.predictions import VelocityPrediction
from losses.time_samplers import UniformTimes
from losses.weightings import UniformWeighting
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel
from scripts.report import report
from solvers.runge_kutta import Euler
from training.assemble import assemble
from visualizers.curves import metrics_of

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


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_posterior_of_the_nearest_row_is_bayes_rule(path: ProbabilityPath) -> None:
    """By densities, pair by pair; a mirror image is a row of its own."""
    rows, _, _, z, t, _ = drawn(path)
    for mirrored in (False, True):
        known = torch.cat([rows, rows.flip(-1)]) if mirrored else rows
        flow = EmpiricalFlow(rows, STD, path, mirrored=mirrored)
        found = flow.posterior(z, flow.times(z, t)).nearest
        for k, state in enumerate(z.double()):
            p = path.at(t[k].double())
            logs = torch.stack([Normal(p.alpha * row, p.sigma * STD).log_prob(state).sum() for row in known.double()])
            assert found[k].item() == pytest.approx(float((logs.max() - logs.logsumexp(0)).exp()), rel=1e-4)


def test_how_much_hangs_on_the_rows_looked_at_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of rows that are all there twice over is the same flow, half of others is not."""
    monkeypatch.setattr("evaluation.metrics.empirical.is_part", lambda dataset, count: True)
    errors = []
    for twice in (False, True):
        dataset = GaussianRows()
        if twice:
            dataset.states[:90] = dataset.states[:45].repeat_interleave(2, 0)
        found = memorisation(objective_of(FieldNetwork(lambda x, t: x)), dataset, source(), 400)
        assert isinstance(found, Memorisation) and found.subsample_error is not None
        assert f"half of the rows looked at move v_emp by {found.subsample_error:.0%}" in found.verdict
        errors.append(found.subsample_error)
    assert errors[1] < 1e-5 and 0.3 < errors[0] < 1.5


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


class FieldNetwork(VelocityModel):
    """A network that has learned a field exactly."""

    def __init__(self, field: Callable[..., Tensor], num_classes: int = 0):
        super().__init__()
        self.field, self.num_classes, self.weight = field, num_classes, nn.Parameter(torch.zeros(1))

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        x, times = split_unified_flow_matching_input(unified_input)
        return self.field(x, times[:, 0], *([label] if self.num_classes else []))


class GaussianRows(TensorDataset):
    """Draws of N(MEAN, (1/2)^2 I), every third held out, some of two labels; what is stored is known, and so is the law."""

    def __init__(self, rows: int = 90, held_out: int = 60, labels: Tensor | None = None):
        states = MEAN + 0.5 * torch.randn(rows + held_out, *SHAPE, generator=torch.Generator().manual_seed(3))
        given = torch.arange(rows + held_out) % 2 if labels is None else labels
        super().__init__(states, given, torch.arange(rows, rows + held_out), num_classes=2)


MEAN = 0.2
LAW = GaussianMixture(torch.ones(1), torch.full((1, 24), MEAN), torch.tensor([0.5]))


def objective_of(network: VelocityModel, path: ProbabilityPath | None = None, **parts: Any) -> FlowMatchingLoss:
    parts = {"coupling": IndependentCoupling(), "weighting": UniformWeighting()} | parts
    return FlowMatchingLoss(
        network=network, path=path or LinearPath(), time_sampler=UniformTimes(), prediction=VelocityPrediction(), **parts
    ).eval()


def source() -> GaussianSource:
    return GaussianSource(list(SHAPE), STD)


@pytest.mark.parametrize("kind", ["plain", "conditional", "mirrored", "balanced", "standardised"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_memoriser_copies_and_the_law_itself_does_not(path: ProbabilityPath, kind: str) -> None:
    dataset, classes = GaussianRows(), 2 if kind == "conditional" else 0
    dataset.mirrored = kind == "mirrored"
    if kind == "balanced":
        dataset.labels = (torch.arange(150) % 3 == 0).long()
        dataset.balance()
    objective = objective_of(FieldNetwork(lambda x, t, *label: x, classes), path)
    scale = 1.0
    if kind == "standardised":
        scale = 0.5
        objective.standardise_by([MEAN] * 2, [scale] * 2, SHAPE)
    flow = training_flow(objective, dataset, source())
    assert isinstance(flow, EmpiricalFlow)
    objective.network.field = flow
    found = memorisation(objective, dataset, source(), 400)
    assert isinstance(found, Memorisation) and found.excess.shape == (8, 50)
    assert found.excess.max() < 1e-6 * found.loss.mean()
    assert found.quotient.min() < 0.01 and "the network copies its training data at t >=" in found.verdict
    assert torch.allclose(found.held_out_loss, found.memoriser_loss, rtol=1e-3)
    law = LAW if kind != "standardised" else GaussianMixture(torch.ones(1), torch.zeros(1, 24), torch.ones(1))
    exact = ExactFlow(law, STD, path)
    objective.network.field = lambda x, t, *label: exact(x, t)
    found = memorisation(objective, dataset, source(), 3200)
    assert isinstance(found, Memorisation)
    assert found.quotient.min() > 0.8 and found.verdict.startswith("the network does not copy its training data")
    more = found.loss - found.least - found.excess
    error = (more.var(1) / more.shape[1]).sum().sqrt() / 8
    assert abs(more.mean()) < 4 * error < 0.2 * found.excess.mean()
    assert found.held_out_loss.mean() < found.memoriser_loss.mean()


def test_copying_half_the_way_in_time_is_said_so() -> None:
    """The memoriser's field between two times, the law's elsewhere."""
    dataset, objective = GaussianRows(), objective_of(FieldNetwork(lambda x, t: x))
    flow, exact = training_flow(objective, dataset, source()), ExactFlow(LAW, STD, LinearPath())
    late = lambda t: ((t > 0.6) & (t < 0.9)).reshape(-1, 1, 1, 1)  # noqa: E731
    objective.network.field = lambda x, t: torch.where(late(t), flow(x, t), exact(x, t))
    found = memorisation(objective, dataset, source(), 400)
    assert isinstance(found, Memorisation) and "copies its training data at t from 0.69 to 0.81 (" in found.verdict


class Unsaid(GaussianRows):
    """Data of a user who does not say which rows are trained on."""

    def training_part(self, count: int) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize("case, words", [
    ("afresh", "data drawn afresh has no training states"),
    ("unsaid", "Unsaid does not say which training states it has"),
    ("altered", "training changes rows at random (crop_padding=2)"),
    ("coupling", "optimal-transport pairs"),
    ("guided", "guidance leads away"),
    ("source", "the source is not Gaussian"),
    ("one", "there are no two training rows"),
    ("labels", "there are no two training rows of one label"),
    ("diverged", "the network's velocities are not finite"),
    ("unlooked", "it is looked at in the last evaluation alone"),
])  # fmt: skip
def test_why_there_is_no_verdict(case: str, words: str, tmp_path: Path) -> None:
    datasets = {"afresh": KMeans, "unsaid": Unsaid, "one": lambda: GaussianRows(1, 2)}
    dataset = datasets.get(case, GaussianRows)()
    if case == "labels":
        dataset.labels = torch.arange(150)
    if case == "altered":
        dataset.altered = Augmentation(flip=True, crop_padding=2).altered
    network = FieldNetwork(lambda x, t, *label: x * (torch.nan if case == "diverged" else 1), 150 if case == "labels" else 0)
    coupling = MinibatchOTCoupling() if case == "coupling" else IndependentCoupling()
    drawn_from = source()
    if case == "source":
        drawn_from.gaussian_std = None
    objective = objective_of(network, coupling=coupling)
    if case == "guided":
        objective.network = ClassifierFreeGuidance(FieldNetwork(lambda x, t, label: x, 2), scale=2.0)
    nothing = torch.zeros(1, *SHAPE)
    made = Generation(
        objective=objective, dataset=dataset, source=drawn_from, solver=Euler(), seed=0, dataset_key="x", cache=tmp_path,
        final=False, noise=nothing, samples=nothing,
    )  # fmt: skip
    with torch.no_grad():
        excess, copying = Memorised(draws=0 if case == "unlooked" else 400).compute(made)
    assert isinstance(excess, Absent) and isinstance(copying, Absent) and copying.reason == excess.reason
    assert words in copying.reason


def test_the_augmentation_of_pictures_is_known_to_the_flow() -> None:
    settings = [(False, 0, 0.0), (True, 0, 0.0), (True, 3, 0.0), (False, 0, 0.1)]
    made = [Photos(crops=4, held_out_crops=2, flip=f, crop_padding=c, augment=a) for f, c, a in settings]
    assert [photos.mirrored for photos in made] == [False, True, True, False]
    assert [photos.altered for photos in made] == [None, None, "crop_padding=3", "augment=0.1"]


@pytest.mark.slow
def test_a_run_on_digits_says_whether_it_copies(small_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    node = "+evaluation.metrics.memorised={_target_: evaluation.metrics.empirical.Memorised, draws: 64, final_draws: 128}"
    words = ["dataloaders=digits", "model=cnn", "model.width=8", "dataloaders.epoch_size=1438", "conditional=true"]
    folder = small_run("x", *words, node, "max_steps=2", "eval_every=1")
    printed, rows = capsys.readouterr().out, (folder / "runs/x/metrics.jsonl").read_text().splitlines()
    assert "oracle/copying: the network does not copy its training data" in printed
    scores = json.loads(rows[-1])
    losses = ("empirical_excess_loss", "train_loss", "held_out_loss", "memoriser_loss", "copying", "copying_held_out")
    for name in (*losses, "nearest_posterior"):
        assert all(scores[f"oracle/{name}_t{k}"] > 0 for k in range(8))
    sure = [scores[f"oracle/nearest_posterior_t{k}"] for k in range(8)]
    assert sure == sorted(sure) and sure[0] < 0.1 and sure[-1] > 0.99
    assert scores["oracle/empirical_excess_loss"] == pytest.approx(
        sum(scores[f"oracle/empirical_excess_loss_t{k}"] for k in range(8)) / 8, rel=1e-4
    )
    assert 0.8 < scores["oracle/copying"] < 1.2 and scores["oracle/empirical_excess_loss_se"] > 0
    assert not {name for name in metrics_of([scores]) if name.endswith("_t3")}
    page = report(["x", f"output_dir={folder}"]).read_text()
    assert "Does the network copy?" in page and "it does not copy" in page and "It copies its training data" not in page


@pytest.mark.parametrize("words", [[], ["loss/coupling=minibatch_ot"]])
def test_the_progress_of_an_evaluation_counts_all_rows(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = ["dataloaders=digits", "model=cnn", "model.width=8", "evaluation.samples=20", "solver.steps=2", "device=cpu"]
    metric = "{_target_: evaluation.metrics.empirical.Memorised, draws: 100}"
    given += ["evaluation=loss_only", f"+evaluation.metrics.memorised={metric}", "evaluation.final_samples=30"]
    run = assemble(prepare(["run_name=x", f"output_dir={tmp_path}", *given, *words]))
    flow, seen = run.inputs.flow, list[int]()
    assert flow is not None and isinstance(run.evaluator, evaluator.GeneratorEvaluator)
    flow.network.register_forward_hook(lambda module, given, answer: seen.append(len(given[0])))
    counted = list[int]()
    real = evaluator.watched
    monkeypatch.setattr(evaluator, "watched", lambda network, what, rows: counted.append(rows) or real(network, what, rows))
    run.evaluate(final=False)
    assert [sum(seen)] == counted == [run.evaluator.all_rows(flow, run.dataset, run.inputs.solver, final=False)]


@pytest.mark.parametrize(("share", "during", "last"), [(1.0, 1024, 4096), (0.5, 512, 2048), (0.1, 0, 409), (0.01, 0, 128)])
def test_a_share_of_the_states_is_looked_at_in_short_runs_and_too_few_are_not(share: float, during: int, last: int) -> None:
    assert Memorised().thinned(share) == {"draws": during, "final_draws": last}
