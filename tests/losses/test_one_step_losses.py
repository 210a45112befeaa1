"""One-step objectives: schedules, targets, the engines of their derivative, guidance, and starts from another run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from evaluation.generate import few_steps
from losses.alpha_schedules import EasyConsistencyAlpha, ExponentialAlpha, SigmoidAlpha
from losses.couplings import ReflowCoupling
from losses.meanflow_guidance import MeanFlowGuidance
from losses.objective import FlowBatch, FlowObjective
from losses.time_samplers import DyadicTimes, UniformTimes
from losses.total_derivative import DerivativeObjective
from losses.weightings import AdaptiveWeighting, UniformWeighting
from models.flow_matching.mlp import MLP
from models.flow_matching.small_cnn import SmallCNN
from tests.losses.exact_mixture import OBJECTIVES, Exact, gaussian_mean_velocity, objective

pytestmark = pytest.mark.usefixtures("unified_in_double")


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
    assert SigmoidAlpha(sharpness=1e6).share(1.0) < 1e-300
    stages = EasyConsistencyAlpha(2.0, stages=4)
    assert [stages.share(progress) for progress in (0.0, 0.24, 0.25, 0.99, 1.0)] == [1 / 2, 1 / 2, 1 / 4, 1 / 16, 1 / 16]
    assert 0 < stages.shares(1.0, torch.tensor([0.0])).item() < 1e-3  # there the level is infinite
    with pytest.raises(UserError, match="begin < end"):
        SigmoidAlpha(0.5, 0.5)


def test_alpha_flow_hands_over_to_the_derivative_below_the_switch():
    loss = objective("alpha_flow", Exact(), alpha=SigmoidAlpha(0.0, 0.5), switch=0.005)
    x = torch.randn(8, 1)
    drawn = [loss.draw(x, x + 1, None, torch.Generator().manual_seed(0), progress) for progress in (0.1, 0.25, 0.5)]
    assert [batch.by_derivative for batch in drawn] == [False, False, True]
    assert float(drawn[1].a[0]) == pytest.approx(0.5)


class Rotates(Exact):
    """u(z, r, t) of a map that is no flow, so that no two parts of a loss are equal by accident."""

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        z, r, t = unified_input[:, :-2], unified_input[:, -2:-1], unified_input[:, -1:]
        return (2 * z + r).sin() * t + self.shift[0]


@pytest.mark.parametrize("progress", [0.05, 0.95])
def test_consistency_is_the_distance_of_two_maps_to_data_at_easy_consistency_tunings_noise_levels(progress):
    """Written as the papers have it: f(z, sigma) = X at two noise levels of one pair, sigma = (1 - r) / r, stage k."""
    sampler, ect = UniformTimes(1.0, to_data=True), EasyConsistencyAlpha(2.0, stages=4)
    loss = objective("alpha_flow", Rotates(), alpha=ect, switch=0.0, time_sampler=sampler).double()
    x0, x1 = torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = loss.draw(x0, x1, None, torch.Generator().manual_seed(1), progress)
    r, k = batch.r.double()[:, None], {0.05: 1, 0.95: 4}[progress]
    sigma = (1 - r) / r
    later = (sigma * (1 - (1 + 8 / (1 + sigma.exp())) / 2**k)).clamp(min=0)
    s = 1 / (1 + later)

    def to_data(time: Tensor) -> Tensor:
        z, ones = time * x1 + (1 - time) * x0, torch.ones_like(time)
        return z + (1 - time) * loss.network(torch.cat([z, time, ones], dim=1))

    assert loss.learns == "endpoint_map" and ((s == 1).any() if k == 1 else (s < 1).all())
    expected = ((to_data(r) - to_data(s)).square() / (1 - r) / (s - r)).mean()
    torch.testing.assert_close(loss(batch)["loss"], expected, rtol=1e-4, atol=0)


def test_what_consistency_training_cannot_serve_is_said():
    with pytest.raises(UserError, match="SplitMeanFlowLoss makes its targets of maps that end before the data"):
        objective("split_meanflow", Exact(), time_sampler=UniformTimes(1.0, to_data=True))
    with pytest.raises(UserError, match="does not shorten"):
        EasyConsistencyAlpha(q=1.0)


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


def test_a_teacher_makes_all_of_the_guided_velocity_but_of_hidden_labels():
    """Of v_T = z (1 + label): omega v + kappa v_cfg + (1 - omega - kappa) v_null is w v + (1 - w) v_null, w = 2 / 0.75."""
    x0, x1, label = *torch.randn(2, 64, 2), torch.arange(64) % 3
    guided = conditional("meanflow", guidance=MeanFlowGuidance(omega=2.0, kappa=0.25, start=0.3), teacher="exact")
    guided.follow(lambda z, r, label: z * (1 + label[:, None]))
    batch = guided.draw(x0, x1, label, torch.Generator().manual_seed(0))
    shown, z = batch.label, batch.input
    scale = torch.where((shown < 3) & (batch.r >= 0.3), 2 / 0.75, 1.0)[:, None]
    torch.testing.assert_close(guided.velocity_target(batch), z * (4 + scale * (shown[:, None] - 3)))


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
