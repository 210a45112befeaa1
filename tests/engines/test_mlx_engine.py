"""engine=mlx against torch: the same weights and draws give the same answers, losses and steps."""
# ruff: noqa: E402

import copy
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

mx = pytest.importorskip("mlx.core", reason="engine=mlx needs MLX: uv sync --extra mlx")

from backends.submission import prepare
from common.errors import UserError
from configuration import engines
from configuration.build import build
from configuration.compose import CONFIG_DIR, compose_config, groups, resolved
from dataloaders.sources import GaussianSource
from engines.layers import FORWARDS, Layout, Part, Pass, states_to_mlx, states_to_torch
from engines.mlx_engine import EngineSettings, MlxEngine, check_parts
from engines.objectives import LOSSES, Flow, Rows
from engines.optimizers import RULES, averaged
from evaluation.parts import build_objective
from losses.terms import named_terms
from training.state import averaged_objective

pytestmark = pytest.mark.mlx

DIGITS = ["dataloaders=digits", "dataloaders.state_shape=[1,4,4]", "conditional=true"]
CNN = [*DIGITS, "model=cnn", "model.width=8", "model.inner_width=8", "model.inner_blocks=1", "model.embedding=8"]
UNET = [*DIGITS, "model=unet_small", "model.width=8", "model.embedding=8", "model.multipliers=[1,2]"]
DIT = [*DIGITS, "model=dit_s", "model.hidden_size=8", "model.depth=2", "model.heads=2"]
MLP = ["conditional=true", "model.width=16", "model.depth=2"]
SMALL_CLASSIFIER = [*DIGITS[:2], "loss=cross_entropy", "model.width=8", "model.multipliers=[1,2]"]
RESNET = [*SMALL_CLASSIFIER, "model=resnet18"]
RESNET9 = ["dataloaders=digits", "loss=cross_entropy", "model=resnet9", "model.width=8"]
VIT = ["dataloaders=digits", "loss=cross_entropy", "model=vit_tiny", "model.width=128", "model.depth=1", "model.patch=4"]
RESNETS = [RESNET, *([*RESNET, "model.blocks=1", f"model.block={block}"] for block in ("bottleneck", "preactivated"))]


def objective_of(*words: str) -> tuple[dict[str, Any], Any]:
    """An objective with weights that are far from its start, where parts of it are zero."""
    config = resolved(compose_config(["run_name=x", "engine=mlx", *words]))
    objective, draws = build_objective(config, torch.device("cpu")), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in objective.network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draws) / max(1, weight[0].numel()) ** 0.5)
    return config, objective


def held(network: torch.nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one if one[name].numel())


@pytest.mark.parametrize("words", [
    MLP, [*MLP, "model.activation=relu"], CNN, UNET, [*UNET, "model.patch_size=2"], DIT, [*DIT, "model.qk_norm=true"],
])  # fmt: skip
def test_velocities_are_those_of_torch(words):
    assert_velocities_of_torch(*objective_of(*words, "loss=meanflow"))


def assert_velocities_of_torch(config: dict[str, Any], objective: Any) -> None:
    shape = config["dataloaders"]["state_shape"]
    z, r, label = torch.randn(5, *shape), torch.rand(5), torch.arange(5) % 3
    layout, network = Layout(objective.network), objective.network
    weights = layout.to_mlx(held(network))
    part = Part(network, Pass(weights))
    for given in (label, None):
        with torch.no_grad():
            expected = network(objective.unified(z, r, 1 - 0.5 * r), given)
        times = states_to_mlx(torch.stack([r, 1 - 0.5 * r], dim=1))
        found = states_to_torch(part(states_to_mlx(z), times, None if given is None else states_to_mlx(given)))
        assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-5
    assert difference(layout.to_torch(weights), held(network)) == 0


@pytest.mark.parametrize(
    "words", [SMALL_CLASSIFIER, *RESNETS, RESNET9], ids=["group norm", "batch norm", "bottleneck", "preactivated", "resnet9"]
)
def test_logits_are_those_of_torch_in_training_and_after_it(words):
    """A batch norm goes by the moments of the batch, or by those it has seen."""
    assert_logits_of_torch(*objective_of(*words))


def assert_logits_of_torch(config: dict[str, Any], objective: Any) -> None:
    images, network = torch.randn(5, *config["dataloaders"]["state_shape"]), objective.network
    with torch.no_grad():
        for buffer in network.buffers():
            buffer.copy_(buffer + 2)
        for training in (False, True):
            part = Part(network, Pass(Layout(network).to_mlx(held(network)), training=training))
            found, expected = states_to_torch(part(states_to_mlx(images))), network.train(training)(images)
            assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-5


TINY = {"depth": 1, "hidden_size": 16, "heads": 2, "width": 8, "inner_width": 8, "blocks": 1, "patch": 4, "dropout": 0.0}
WIDTHS = {"lenet": 6, "wide_resnet": 1} | {name: 128 for name in groups()["model"] if name.startswith("vit")}


@pytest.mark.parametrize("name", groups()["model"])
def test_every_model_of_the_configuration_answers_as_in_torch_or_is_refused(name):
    """Each file of configs/model, made small; a vision transformer of two heads."""
    node = OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml")
    classifies, points = node["_target_"].startswith("models.classifier."), name == "mlp"
    words = [f"model={name}", *([] if points else ["dataloaders=digits"])]
    words += ["loss=cross_entropy"] if classifies else ["conditional=true", "loss=meanflow"]
    words += [f"model.{key}={WIDTHS.get(name, v) if key == 'width' else v}" for key, v in TINY.items() if key in node]
    if node["_target_"] in engines.MODELS:
        (assert_logits_of_torch if classifies else assert_velocities_of_torch)(*objective_of(*words))
    else:
        with pytest.raises(UserError, match=f"engine=mlx does not have model={name}; .* use engine=torch"):
            prepare(["run_name=x", "engine=mlx", *words])


def steps_of_torch(objective, average, optimizer, ema, batches, clip) -> list[dict[str, float]]:
    """Optimizer steps as training/loop.py takes them."""
    seen = []
    for step, batch in enumerate(batches, start=1):
        terms = named_terms(objective(batch, average), {})
        terms["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(objective.network.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(average.network, objective.network, step)
        seen.append({name: term.item() for name, term in terms.items()} | {"grad_norm": norm.item()})
    return seen


def both_engines(
    words: list[str], steps: int = 2, rows: int = 8, clip: float = 1.0, **settings: Any
) -> tuple[list[Any], list[Any]]:
    """Of torch and of MLX, after the same steps: named tensors of weights, average and optimizer, and the values seen."""
    # AdamW makes steps of the mere rounding in gradients that are 0, as of a bias before a normalisation, but for its eps
    eps = [] if "optimizer=sgd" in words else ["optimizer.eps=1e-4"]
    config, objective = objective_of("ema.decay=0.3", *words, *(f"+{word}" for word in eps))
    objective.train()
    ema, draws = build(config["ema"]), torch.Generator().manual_seed(5)
    x1 = torch.randn(rows, *config["dataloaders"]["state_shape"], generator=draws)
    source, label = GaussianSource(x1.shape[1:]), torch.arange(rows) % 3
    batches = [objective.batch(source, x1, label, draws, progress) for progress in torch.linspace(0.3, 0.7, steps).tolist()]
    results = []
    for engine in ("torch", "mlx"):
        own = copy.deepcopy(objective)
        average, optimizer = averaged_objective(own, ema), build(config["optimizer"], params=own.network.parameters())
        if engine == "torch":
            values = steps_of_torch(own, average, optimizer, ema, batches, clip)
        else:
            given = {"device": "cpu", "precision": "fp32", "grad_clip": clip, "compile": False} | settings
            mlx, rate = MlxEngine(own, average.network, optimizer, EngineSettings(**given)), config["optimizer"]["lr"]
            values = [mlx.step([batch], [1.0], rate, ema.share(k + 1)) for k, batch in enumerate(batches)]
            mlx.hand_back()
        slots = {f"{i} {k}": v for i, of in enumerate(optimizer.state.values()) for k, v in of.items()}
        results.append([held(own.network), held(average.network), slots, values])
    return results[0], results[1]


JVP = ["loss.jvp=func"]
PAIRED = ["loss/coupling=sinkhorn"]
GUIDED = ["loss.guidance.omega=2", "loss.guidance.kappa=0.3", "loss.label_dropout=0.5"]
STEPS = {
    "mse": [*MLP, "loss=mse"],
    "mse to be fine-tuned": [*MLP, "loss=mse", "loss.second_time=state", "loss/weighting=adaptive", *PAIRED],
    "meanflow": [*MLP, "loss=meanflow", "loss/path=cosine"],
    "meanflow forward": [*MLP, "loss=meanflow", *JVP, "loss.variance_reduction=0.5", "loss/weighting=adaptive"],
    "meanflow guided": [*MLP, "loss=meanflow", "loss/guidance=meanflow", *GUIDED],
    "meanflow dit": [*DIT, "loss=meanflow", *JVP],
    "meanflow cnn": [*CNN, "loss=meanflow", *JVP],
    "improved": [*MLP, "loss=improved_meanflow"],
    "improved unet": [*UNET, "loss=improved_meanflow", "loss.jvp=separate"],
    "alpha_flow": [*MLP, "loss=alpha_flow", "loss.switch=0.1", "loss/weighting=adaptive"],
    "soflow": [*MLP, "loss=soflow", "conditional=false"],
    "consistency": [*MLP, "loss=consistency"],
    "shortcut": [*MLP, "loss=shortcut"],
    "split": [*MLP, "loss=split_meanflow", "optimizer=sgd"],
    "split unet": [*UNET, "loss=split_meanflow"],
    "classifier": [*SMALL_CLASSIFIER, "loss.label_smoothing=0.1", "loss.mixup=0.4", "loss.focusing=2"],
    "lenet": ["dataloaders=digits", "loss=cross_entropy", "model=lenet"],
    "vision transformer": VIT,
    "adam": [*RESNET9, "optimizer=adam", "optimizer.weight_decay=0.1"],
    "resnet": [*RESNET, "optimizer=sgd", "optimizer.lr=0.02", "optimizer.nesterov=false", "optimizer.weight_decay=0.1"],
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_torch(name, monkeypatch):
    """Weights, average, buffers, what the optimizer remembers, every loss and the norm of the gradient."""
    if any("loss.jvp" in word for word in STEPS[name]):
        monkeypatch.setattr("engines.objectives.STEP", 0.5)  # no difference is taken
    (*expected, seen), (*found, values) = both_engines(STEPS[name])
    for one, other in zip(expected, found, strict=True):
        assert difference(one, other) < 1e-4
    for one, other in zip(seen, values, strict=True):
        assert {k: other[k].item() for k in one} == pytest.approx(one, rel=1e-4)


def test_a_compiled_step_is_that_of_torch():
    """Of the smallest network: MLX compiles a source file in C++ for each of its kernels, kept in the folder of temporary
    files. A second batch of other rows is another form of the step.
    """
    words = ["model.width=4", "model.depth=1", "model.time_frequencies=[]", "model.activation=relu", "loss=mse"]
    plain = ["optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false"]
    (*expected, _), (*found, _) = both_engines([*words, *plain], clip=1e9, compile=True)
    for one, other in zip(expected[:2], found[:2], strict=True):
        assert difference(one, other) < 1e-5


@pytest.mark.parametrize(
    "words", [[*MLP, "loss=meanflow", *JVP], [*UNET, "loss=mse"], RESNET, VIT], ids=["mlp", "unet", "resnet", "vit"]
)
def test_bf16_rounds_as_torch_does(words):
    """The gradient is off by as much as torch's under autocast, and not by nothing."""
    (*_, exact), (*_, rounded) = both_engines(words, steps=1, precision="bf16")
    off = abs(rounded[0]["grad_norm"].item() / exact[0]["grad_norm"] - 1)
    assert 1e-6 < off < 0.03


def test_times_and_derivatives_are_those_of_fp32_in_bf16():
    _, objective = objective_of(*UNET, "loss=meanflow")
    weights, times = Layout(objective.network).to_mlx(held(objective.network)), mx.array([[0.5, 0.5001]])
    exact, low = (Pass(weights, kind) for kind in (mx.float32, mx.bfloat16))
    one, other = (Part(objective.network, now).conditioning(times, None) for now in (exact, low))
    assert other.dtype == mx.float32 and (one == other).all()
    rows = Rows({"input": mx.ones((1, 4, 4, 1)), "r": times[:, 0], "t": times[:, 1]})
    one, other = (Flow(objective, now).derivative(rows, rows.input) for now in (exact, low))
    assert (one == other).all() and mx.abs(one).max() > 0.1


def test_shares_weigh_the_batches_of_a_step():
    """Two batches of 8 and 4 rows as one of 12: the mean loss of all rows and its gradient."""
    config, objective = objective_of(*MLP, "loss=mse", "loss.label_dropout=0")
    draws, label = torch.Generator().manual_seed(5), torch.arange(12) % 3
    batch = objective.batch(GaussianSource([2]), torch.randn(12, 2), label, draws, 0.5)
    seen = []
    for group, shares in (([batch], [1.0]), (batch.split(8), [2 / 3, 1 / 3])):
        own = copy.deepcopy(objective)
        average, optimizer = (
            averaged_objective(own, build(config["ema"])),
            build(config["optimizer"], params=own.parameters()),
        )
        engine = MlxEngine(own, average.network, optimizer, EngineSettings("cpu", "fp32", None, False))
        seen.append({name: value.item() for name, value in engine.step(list(group), shares, 1e-3, 0.1).items()})
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_the_average_is_the_weights_where_nothing_is_averaged():
    average, weights = {"w": mx.array([1e8, 3.0])}, {"w": mx.array([0.1, -7.3])}
    assert (averaged(average, weights, mx.array(1.0))["w"] == weights["w"]).all()
    assert averaged(average, weights, mx.array(0.25))["w"][1].item() == pytest.approx(0.425)


def test_parts_that_are_not_written_in_mlx_are_refused_at_assembly(small_run, tmp_path):
    with pytest.raises(UserError, match="engine=mlx has no dropout"):
        check_parts(objective_of("model.dropout=0.1")[1])
    _, objective = objective_of()
    objective.network.layers.append(torch.nn.Softplus())
    with pytest.raises(UserError, match="engine=mlx does not have Softplus, a part of this model; use engine=torch"):
        check_parts(objective)
    with pytest.raises(UserError, match="engine=mlx does not have DriftingLoss"):
        check_parts(objective_of("loss=drifting")[1])
    with pytest.raises(UserError, match=r"engine=mlx does not have optimizer\.amsgrad"):
        small_run("x", "engine=mlx", "+optimizer.amsgrad=true")
    if not mx.metal.is_available():
        with pytest.raises(UserError, match="device=mps is Metal"):
            small_run("x", "engine=mlx", "device=mps")
    assert not (tmp_path / "outputs").exists()


def test_every_class_that_is_let_through_is_written_in_mlx():
    of = {"MODELS": FORWARDS, "LOSSES": LOSSES, "OPTIMIZERS": RULES}
    for kind, table in of.items():
        allowed = {name.rpartition(".")[2] for name in getattr(engines, kind)}
        assert allowed <= {known.__name__ for known in table}
        assert kind == "MODELS" or len(allowed) == len(table)
