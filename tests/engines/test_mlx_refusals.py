"""What engine=mlx does not have, or needs, is one sentence before a file is touched; without it MLX is never imported."""

import ast
import json
from pathlib import Path

import pytest
import torch

import launcher
from backends.submission import prepare
from common.errors import UserError
from configuration import engines
from configuration.compose import CONFIG_DIR, groups
from configuration.signatures import parameters
from experiment import Experiment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("common.errors.find_spec", lambda name: name)


@pytest.mark.parametrize("words", [
    "ema=power", "optimizer=muon", "precision=fp16", "on_nan=skip", "deterministic=true", "devices=2",
    "compile_mode=max-autotune", "checkpoint_activations=true", "device=cuda", "loss=drifting", "loss/prediction=x1",
    "loss=meanflow loss.teacher=exact", "init_from=${run_name}_teacher teacher='loss=mse'", "backend=modal",
    "model.dropout=0.1",
    "dataloaders=digits loss=cross_entropy loss.superloss=1",
])  # fmt: skip
def test_what_mlx_does_not_have_is_refused_and_named(words, installed, tmp_path):
    with pytest.raises(UserError) as refusal:
        prepare(["run_name=x", f"output_dir={tmp_path / 'out'}", "engine=mlx", *words.split(" ")])
    said = str(refusal.value).replace("loss.teacher='exact'", "loss.teacher=exact")
    assert said == f"engine=mlx does not have {words.split()[-1]}; leave that out, or use engine=torch"
    assert not (tmp_path / "out").exists()


def test_a_network_of_ones_own_is_refused_and_named(installed, tmp_path):
    own = Experiment(f"output_dir={tmp_path / 'out'}", "engine=mlx", network=torch.nn.Linear(4, 2), data=torch.randn(99, 2))
    with pytest.raises(UserError, match="engine=mlx does not have model=own-Linear; leave that out, or use engine=torch"):
        own.fit()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, engine", [([], "torch"), (["engine=mlx"], "mlx")])
def test_a_dry_run_names_the_engine(words, engine, installed, tmp_path, capsys):
    assert launcher.main(["run_name=x", f"output_dir={tmp_path}", "--dry-run", *words]) == 0
    assert f"\n  engine       {engine}\n" in capsys.readouterr().out


def test_without_mlx_the_sentence_names_the_extra_but_for_what_torch_does(monkeypatch, small_run):
    monkeypatch.setattr("common.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match="engine=mlx needs mlx, which is not installed; install it by `uv sync --extra mlx`"):
        small_run("x", "engine=mlx")
    folder = small_run("x", "max_steps=2")
    config = folder / "runs/x/config.yaml"
    config.write_text(config.read_text().replace("engine: torch", "engine: mlx"))
    with pytest.raises(UserError, match="engine=mlx needs mlx"):
        small_run("x", "resume=true", "max_steps=4")
    small_run("x", "resume=true", "max_steps=4", "engine=torch")
    assert json.loads((folder / "runs/x/status.json").read_text())["step"] == 4
    prepare(["run_name=y", "engine=mlx", f"eval_checkpoint={folder / 'ckpts/mlp/x_last.pt'}"])


def test_the_classes_that_are_let_through_are_those_of_configs():
    files = [path for group in ("model", "loss", "optimizer") for path in (CONFIG_DIR / group).rglob("*.yaml")]
    texts = {path: path.read_text() for path in files}
    for target in engines.MODELS | engines.LOSSES | engines.OPTIMIZERS:
        assert any(f"_target_: {target}\n" in text for text in texts.values()), target
    assert groups()["ema"] == ["constant", "none", "power"]


# What engines/ has read in torch's classes: their settings.
WRITTEN = {
    "MLP": "width depth time_frequencies dropout activation",
    "SmallCNN": "width inner_width inner_blocks embedding time_frequencies dropout",
    "UNet": "width multipliers blocks attention_up_to embedding time_frequencies dropout augment_dim patch_size",
    "DiT": "patch_size hidden_size depth heads mlp_ratio qk_norm time_frequencies dropout",
    "ResidualClassifier": "width multipliers blocks block norm dropout",
    "ResNet9": "width norm dropout",
    "LeNet": "width dropout",
    "VisionTransformer": "width depth patch dropout",
    "FlowMatchingLoss": "second_time",
    "MeanFlowLoss": "guidance variance_reduction jvp teacher",
    "ImprovedMeanFlowLoss": "guidance variance_reduction jvp teacher",
    "AlphaFlowLoss": "alpha switch guidance variance_reduction jvp teacher",
    "ShortcutLoss": "teacher",
    "SplitMeanFlowLoss": "teacher",
    "CrossEntropyLoss": "label_smoothing focusing superloss mixup rotation elastic blur cutout",
}
ALWAYS = "state_shape num_classes network path coupling time_sampler prediction weighting label_dropout"
OF_ALL = set(ALWAYS.split())


@pytest.mark.parametrize("target", sorted(engines.MODELS | engines.LOSSES))
def test_no_setting_of_torch_s_classes_goes_unread_in_mlx(target):
    """One that is new is to be written there, or refused in configuration/engines.py, and named above."""
    known = set(WRITTEN[target.rpartition(".")[2]].split())
    assert parameters(target).keys() - OF_ALL == known


def test_only_the_engines_import_mlx_and_nothing_imports_them_before_a_run_asks():
    for path in ROOT.glob("*/**/*.py"):
        folder = path.relative_to(ROOT).parts[0]
        if folder in ("tests", "engines") or folder.startswith("."):
            continue
        at_import = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name for node in at_import for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
        )}  # fmt: skip
        assert not [name for name in names if name.split(".")[0] in ("mlx", "engines")], path
