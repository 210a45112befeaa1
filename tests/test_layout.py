"""The house: folders resolve to this checkout, every configuration composes and builds, the rules of the house hold."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from backends.submission import prepare
from common.errors import UserError
from configuration.build import build
from configuration.compose import CONFIG_DIR, compose_config, groups, resolved
from evaluation.parts import build_objective
from losses.couplings import Paths
from losses.flow_map_objective import FlowMapObjective
from losses.objective import FlowObjective
from losses.terms import named_terms
from training.ema import ConstantEMA
from training.state import averaged_objective

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    "common",
    "minigrad",
    "models",
    "dataloaders",
    "losses",
    "engines",
    "solvers",
    "helpers_cfg",
    "configuration",
    "run_files",
    "evaluation",
    "training",
    "train",
    "backends",
    "searches",
    "launcher",
    "experiment",
    "visualizers",
    "scripts",
    "dev",
)  # each imports only from those before it
FOLDERS = tuple(name for name in FLOORS if name not in ("helpers_cfg", "train", "launcher", "experiment"))
IMAGE_SETS = (
    "digits", "random_images", "photos", "mnist", "cifar10", "cifar100", "image_folder", "image_pairs", "celeba", "imagenet",
    "imagenet_pixels", "imagenet_encoded",
)  # fmt: skip
META_ABOVE = 20_000_000
LATE = {  # what some need, or only some runs, is not imported with these
    "dataloaders.array_header": "numpy torch",
    "evaluation.pictures": "matplotlib torch",
    "minigrad, minigrad.sample": "omegaconf scipy torch",
    "run_files.run_folder, run_files.experiment_log": "torch",
    "run_files.telemetry": "pynvml torch",
    "run_files.trackers, run_files.trackio_tracker": "numpy tensorboard torch trackio wandb",
}


@pytest.mark.process
@pytest.mark.parametrize("modules, late", LATE.items())
def test_modules_that_import_no_more_than_they_need(modules, late):
    code = f"import sys, {modules}; print(sorted(set({late.split()}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == "[]\n"


@pytest.mark.parametrize("name", [*FOLDERS, "launcher", "experiment", "train", "helpers_cfg"])
def test_no_installed_package_hides_a_folder_of_ours(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None
    places = [Path(place) for place in spec.submodule_search_locations or [str(spec.origin)]]
    assert all(place.resolve().is_relative_to(ROOT) for place in places)


def test_house_rules():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "launcher.py", ROOT / "experiment.py", ROOT / "train.py", ROOT / "helpers_cfg.py"]
    assert not [
        path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("__init__.py") if folder != "minigrad"
    ]
    for path in files:
        text = path.read_text()
        assert not re.search(r"\bhasattr\(|os\.path\.|import Protocol", text), path
        assert path.name == "trackers.py" or not re.search(r"except( Exception)?:", text), path
    long = [path for path in [*files, *(ROOT / "tests").rglob("*.py")] if len(path.read_text().splitlines()) > 350]
    assert not long, f"{long}: more than 350 lines; divide them by subject"


def imports() -> dict[str, set[str]]:
    """Return the modules of this project that each of them imports, lazily and for type checking included."""
    files = [path for name in FLOORS for path in ((ROOT / name).rglob("*.py") if name in FOLDERS else [ROOT / f"{name}.py"])]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: imports are absolute, from the root"
                named |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = named & modules.keys() - {module}
    return found


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """Return the imports from a floor above the importing one."""
    floor = {name: height for height, name in enumerate(FLOORS)}
    height = lambda module: floor[module.split(".")[0]]  # noqa: E731
    return [f"{a} -> {b}" for a, others in arrows.items() for b in sorted(others) if height(b) > height(a)]


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Return the modules left after those that import nothing still left are taken away, again and again."""
    left = dict(arrows)
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_floors_import_only_from_below_and_in_no_circle():
    arrows = imports()
    assert len(arrows) > 100 and not upward(arrows) and not circles(arrows)
    assert upward(arrows | {"losses.paths": {"training.loop"}}) == ["losses.paths -> training.loop"]
    assert set(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()})) == {"a", "b", "c", "d"}


CLASSIFIER_LOSSES = ("cross_entropy",)  # their contract is in test_classifiers.py


def companions(group: str, choice: str, tmp_path: Path, settings: dict[str, Any] | None = None) -> list[str]:
    """Overrides that a choice cannot do without; settings: those of its data."""
    if group == "dataloaders" and choice == "array":
        import numpy as np

        np.save(tmp_path / "x.npy", np.zeros((20, 2), dtype="float32"))
        return [f"dataloaders.path={tmp_path / 'x.npy'}"]
    if (group, choice) == ("dataloaders", "torch"):
        return [f"dataloaders.{key}={value}" for key, value in (settings or {}).items()]
    if (group, choice) == ("evaluation", "fid"):
        pytest.importorskip("cleanfid")
        (tmp_path / "inception-2015-12-05.pt").touch()
        return [f"evaluation.metrics.fid.network.path={tmp_path}"]
    if (group, choice) == ("guidance", "autoguidance"):
        return ["guidance.checkpoint=weak_last.pt"]
    if data_of(group, choice) in IMAGE_SETS:
        words, vae = dict(settings or {}), (settings or {}).get("vae")
        words.pop("vae", None)
        typed = [f"dataloaders.{key}={'null' if value is None else value}".replace(" ", "") for key, value in words.items()]
        model = {"dataloaders": ["model=cnn"]}.get(group, [])
        model += ["model.patch_size=2"] if choice == "imagenet_meanflow" else []  # the tiny latents are 2 x 2
        return [*model, *typed, *(["vae=stable_diffusion", f"vae.path={vae['path']}"] if vae else [])]
    if (group, choice) in [("loss", "reflow"), ("loss", "distillation"), ("loss/coupling", "reflow")]:
        return ["loss.coupling.teacher=none.pt"]
    if (group, choice) == ("loss/time_sampler", "dyadic"):
        return ["loss=shortcut"]
    if group == "solver/diffusion":
        return ["solver=sde"]
    if (group, choice) == ("loss/guidance", "meanflow"):
        return ["loss=meanflow", "conditional=true"]
    if group == "loss/alpha":
        return ["loss=alpha_flow"]
    if (group, choice) in [("loss", name) for name in CLASSIFIER_LOSSES] or (group, choice) == ("evaluation", "classifier"):
        return ["dataloaders=digits", "loss=cross_entropy"]
    if group == "model" and is_classifier(choice):
        return ["dataloaders=random_images", "dataloaders.state_shape=[3,32,32]", "loss=cross_entropy"]
    if group == "model":
        try:
            resolved(compose_config(["run_name=x", f"model={choice}"]))
        except Exception:
            return [f"dataloaders={IMAGE_SETS[0]}"]
    return []


def data_of(group: str, choice: str) -> str:
    """The data set a data choice is, or an experiment has; else nothing."""
    if group == "dataloaders":
        return choice
    text = (CONFIG_DIR / group / f"{choice}.yaml").read_text() if group == "experiment" else ""
    found = re.search(r"override /dataloaders: (\w+)", text)
    return found[1] if found else ""


def is_classifier(model: str) -> bool:
    return OmegaConf.load(CONFIG_DIR / "model" / f"{model}.yaml")["_target_"].startswith("models.classifier.")


EVERY_CHOICE = [(group, choice) for group, choices in groups().items() for choice in choices]


JUDGED = ("model", "dataloaders", "loss", "evaluation", "conditional")
MADE: set[str] = set()


def once(make: Callable[[Any], Any], nodes: Any) -> None:
    """Call make(nodes), unless it has gone well with the same ones: two choices have all but one in common."""
    key = json.dumps(nodes, sort_keys=True, default=str)
    if key not in MADE:
        make(nodes)
        MADE.add(key)


def check_evaluation(config: dict[str, Any]) -> None:
    """Build the evaluation, and hold it against the objective unless the network is large."""
    evaluation = build(config["evaluation"])
    with torch.device("meta"):
        large = build(config["model"]).parameter_count() > META_ABOVE
    if not large:
        evaluation.check(build_objective(config, torch.device("cpu")))


@pytest.mark.parametrize(("group", "choice"), EVERY_CHOICE, ids=[f"{g}={c}" for g, c in EVERY_CHOICE])
def test_every_choice_composes_and_builds(group, choice, tmp_path, official):
    settings = official(data_of(group, choice))
    overrides = ["run_name=x", f"{group}={choice}", *companions(group, choice, tmp_path, settings)]
    config = prepare(overrides) if group == "experiment" else resolved(compose_config(overrides))
    once(lambda _: check_evaluation(config), [config[part] for part in JUDGED])
    for part in ("dataloaders", "source", "solver", "schedule", "ema", "backend"):
        once(build, config[part])
    for callback in config["callbacks"].values():
        once(build, callback)
    text = (ROOT / "configs" / group / f"{choice}.yaml").read_text()
    shown = re.search(r"^# python launcher.py ", text, re.MULTILINE)
    assert shown, f"configs/{group}/{choice}.yaml shows no command that uses it; begin it with # python launcher.py ..."


DATA = groups()["dataloaders"]


@pytest.mark.parametrize("dataset", DATA)
def test_every_dataset_trains_two_steps_and_is_sampled(dataset, small_run, tmp_path, official):
    extra = companions("dataloaders", dataset, tmp_path, official(dataset))
    words = [f"dataloaders={dataset}", *extra, "max_steps=2"]
    if "model=cnn" in extra:
        words += ["model.width=8", "model.inner_width=8", "model.inner_blocks=1", "model.embedding=8", "batch_size=16"]
        words += ["evaluation.samples=8", "evaluation.final_samples=8"]
    if dataset in ("array", "torch"):
        words.append("dataloaders.epoch_size=null")
    if dataset in IMAGE_SETS:  # finite: an epoch is all of it
        size = OmegaConf.load(CONFIG_DIR / f"dataloaders/{dataset}.yaml").epoch_size
        words.append(f"dataloaders.epoch_size={'null' if size is None else size}")
    folder = small_run("x", *words)
    status = json.loads((folder / "runs/x/status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 2), f"dataloaders={dataset} ended as {status}, not at step 2"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_to_a_lower_loss(precision, small_run):
    folder = small_run("x", f"precision={precision}", "epochs=8", "optimizer.lr=0.02", "ema.decay=0.5")
    rows = [json.loads(line) for line in (folder / "runs/x/metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("debug", groups()["debug"])
def test_every_debug_recipe_runs(debug, small_run, capsys):
    folder = small_run("x", f"debug={debug}", "max_steps=55")
    assert json.loads((folder / "runs/x/status.json").read_text())["state"] == "finished"
    if debug == "profile":
        assert "aten::addmm" in (folder / "runs/x/trace.json").read_text() and "Self CPU %" in capsys.readouterr().out


def objective_of(loss: str, *overrides: str) -> FlowObjective:
    config = resolved(compose_config(["run_name=x", f"loss={loss}", "model.width=16", "model.depth=2", *overrides]))
    objective = build_objective(config, torch.device("cpu"))
    assert isinstance(objective, FlowObjective)
    return objective


@pytest.mark.parametrize("conditional", ["false", "true"])
@pytest.mark.parametrize("loss", [name for name in groups()["loss"] if name not in CLASSIFIER_LOSSES])
def test_every_objective_keeps_its_contract(loss, conditional, tmp_path):
    """Drawn from its generator alone, named finite scalars with a gradient for every parameter, a velocity to follow."""
    words = companions("loss", loss, tmp_path)
    objective = objective_of(loss, f"conditional={conditional}", *words)
    if words:  # the pairs that a teacher's checkpoint would give
        ends = torch.randn(2, 50_000, 2)
        objective.coupling.made = Paths(ends, torch.tensor([0.0, 1.0]), torch.arange(50_000) % 5)
    if isinstance(objective, FlowMapObjective) and objective.teacher:
        objective.follow(lambda z, r, label: 1 - z)
    x0, x1, label = torch.randn(64, 2), torch.randn(64, 2) + 1, torch.arange(64) % 5
    first, again, other = (objective.draw(x0, x1, label, torch.Generator().manual_seed(s), 0.5) for s in (1, 1, 2))
    repeats = torch.equal(first.unified_input, again.unified_input)
    assert repeats, f"loss={loss} draws otherwise from the same generator; draw from the one given, from nothing else"
    draws = objective.learns == "generator" or not torch.equal(first.unified_input, other.unified_input)
    assert draws, f"loss={loss} draws nothing from its generator"
    assert (first.r <= first.t).all(), f"loss={loss} draws times r > t; r is the time of the state, t the later one"
    kind, rows = first.unified_input.dtype, len(first)
    assert (kind, rows) == (torch.float32, 64), f"loss={loss} draws {rows} rows of {kind} for 64 of torch.float32"
    teacher = averaged_objective(objective, ConstantEMA())
    terms = named_terms(objective(first, teacher), {})
    infinite = [name for name, term in terms.items() if not term.isfinite()]
    assert not infinite, f"loss={loss} gives {infinite} that are NaN or infinite on plain Gaussian data"
    terms["loss"].backward()
    of = {name: p.grad for name, p in objective.network.named_parameters()}
    without = [name for name, grad in of.items() if grad is None or not grad.isfinite().all()]
    assert not without, f"loss={loss} gives {without} no finite gradient; every parameter of the network is to learn"
    second = objective.second_time
    assert second in ("end", "state"), f"loss={loss} has second_time={second!r}; it takes 'end' or 'state'"
    said = OmegaConf.load(CONFIG_DIR / f"loss/{loss}.yaml").training.learns
    assert said == objective.learns, f"loss={loss} says training.learns={said}, and its class has learns={objective.learns}"
    shape = list(objective.velocity(x0, torch.tensor(0.3)).shape)
    assert shape == [64, 2], f"loss={loss} gives velocities of shape {shape} for states of [64, 2]"


def test_a_configuration_that_is_changed_leaves_the_next_one_alone():
    compose_config(["run_name=x"]).model.width = 1
    assert compose_config(["run_name=y"]).model.width != 1


def test_a_part_that_may_be_left_out_is_left_out_by_null():
    config = resolved(compose_config(["run_name=x", "guidance=null", "loss=meanflow", "loss/guidance=null"]))
    assert config.get("guidance") is None and config["loss"].get("guidance") is None
    with pytest.raises(UserError, match="add guidance="):
        compose_config(["run_name=x", "guidance.scale=2"])
    with pytest.raises(UserError, match="cannot do without"):
        compose_config(["run_name=x", "solver=null"])


@pytest.mark.parametrize("words, named", [
    ("solver=dopri5 solver.rtol=0", "solver.rtol"),
    ("solver/grid=dense solver.grid.power=nan", "solver.grid.power"),
    ("solver/grid=dense solver.grid.dense=middle", "solver.grid.dense takes noise or data"),
    ("loss/coupling=minibatch_ot loss.coupling.group=0", "loss.coupling.group"),
    ("loss=meanflow conditional=true loss/guidance=meanflow loss.guidance.omega=0", "loss.guidance.omega"),
    ("loss=meanflow conditional=true loss/guidance=meanflow loss.guidance.kappa=1", "loss.guidance.kappa"),
    ("loss=alpha_flow loss.alpha.end=1.1", "loss.alpha.end"),
    ("dataloaders=celeba model=cnn dataloaders.centre=179", "dataloaders.centre takes a whole number from 1 to 178"),
    ("loss=meanflow loss.jvp=fast", "loss.jvp takes auto, func, separate or finite_difference"),
    ("loss=shortcut loss.time_sampler.levels=0", "loss.time_sampler.levels"),
    ("loss/coupling=reflow loss.coupling.teacher=x loss.coupling.count=0", "loss.coupling.count"),
    ("dataloaders=digits loss=cross_entropy model=resnet18 loss.label_smoothing=1", "loss.label_smoothing"),
    ("dataloaders=digits loss=cross_entropy model=resnet18 model.norm=layer", "model.norm takes batch or group"),
])  # fmt: skip
def test_a_value_that_a_constructor_does_not_take_is_refused_at_launch(words, named):
    with pytest.raises(UserError, match=named):
        compose_config(["run_name=x", *words.split()])
