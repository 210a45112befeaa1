"""A run end to end, small: determinism, exact resume, accumulation, guards, and the files it leaves."""

import json
import math
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher
from backends.submission import prepare
from common.errors import UserError
from evaluation.evaluator import GeneratorEvaluator
from evaluation.sample import load
from run_files.checkpoint import load_checkpoint
from run_files.run_folder import RunFolder
from tests.training.helpers import ONE_STEP, assert_equal_runs, metric_rows, weights
from training.assemble import assemble
from training.loop import epoch_groups, fit, train_step
from training.run import Callback, Run
from training.summary import scored


def test_the_same_seed_gives_bit_identical_runs_and_another_seed_does_not(small_run):
    first, second = small_run("x", output="a"), small_run("x", output="b")
    assert_equal_runs(first, second, "x")
    other = small_run("x", "seed=1", output="c")
    assert not torch.equal(weights(first, "x")["network.layers.0.weight"], weights(other, "x")["network.layers.0.weight"])


LOSSES = (Path(__file__).resolve().parents[2] / "configs/loss").glob("*.yaml")
OBJECTIVES = sorted(path.stem for path in LOSSES if path.stem != "cross_entropy")  # that one: test_classifiers.py


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*OBJECTIVES, "cross_entropy"])
def test_every_objective_trains_in_bf16_and_compiled_as_in_fp32(small_run, shared_run, loss, monkeypatch):
    """From the same seed: in bf16 to within 5 % of fp32's held-out loss, compiled to within 1e-4 of eager.

    Compiled are one objective of each kind of step here; each of them by itself in losses/test_compiled_losses.py.
    """
    words = [f"loss={loss}", "max_steps=10", "epochs=1", "batch_size=32", "dataloaders.epoch_size=320", "optimizer.lr=1e-3"]
    if loss == "cross_entropy":
        words += ["dataloaders=digits", "model=small_cnn_classifier", "evaluation=classifier", "model.width=8"]
        words += ["dataloaders.epoch_size=1438"]
    if loss in ("reflow", "distillation"):
        teacher = shared_run("plain", "max_steps=2") / "ckpts/mlp/plain_last.pt"
        words += [f"loss.coupling.teacher={teacher}", "loss.coupling.count=200", "loss.coupling.points=3"]

    words += ["solver.steps=1"] * (loss in ONE_STEP and loss != "distillation")

    def held_out(name: str, *extra: str) -> float:
        rows = (small_run(name, *words, *extra) / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        return [row["eval/loss"] for row in map(json.loads, rows) if "eval/loss" in row][-1]

    compile_fully, compiled = torch.compile, []

    def quickly(module: Any, mode: str, dynamic: bool) -> Any:
        compiled.append(mode)
        return compile_fully(module, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", quickly)
    exact = held_out("fp32")
    assert held_out("bf16", "precision=bf16") == pytest.approx(exact, rel=0.05)
    if loss in ("meanflow", "shortcut", "cross_entropy"):  # a derivative, a teacher, no flow
        assert held_out("compiled", "compile=true") == pytest.approx(exact, rel=1e-4) and compiled == ["default"]


def small_config(tmp_path: Path, *overrides: str) -> dict:
    base = ["run_name=x", f"output_dir={tmp_path / 'o'}", "trackio.enabled=false", "callbacks=none", "device=cpu"]
    return prepare([*base, "model.width=16", "dataloaders.epoch_size=250", *overrides])


def test_a_weight_of_a_term_follows_its_course_over_the_run(tmp_path):
    run = assemble(small_config(tmp_path, "batch_size=50", "max_steps=4"))
    run.settings = replace(run.settings, loss_weights={"one": [[0, 2], [1, 0]]})
    run.forward = lambda batch, teacher: {"one": 1 + 0 * run.state.objective.network(batch.unified_input).sum()}
    losses = [float(train_step(run, group)["loss"]) for group in islice(epoch_groups(run), 4)]
    assert losses == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_a_ragged_last_group_weighs_each_row_alike(tmp_path):
    """250 rows as batches of 100, 100, 50 in one step: the gradient is that of the 250 rows at once."""
    run = assemble(small_config(tmp_path, "batch_size=100", "gradient_accumulation_steps=3", "grad_clip=null"))
    (group,) = list(epoch_groups(run))
    assert [len(batch) for batch in group] == [100, 100, 50]
    z, u, v = (torch.cat([getattr(b, n) for b in group]) for n in ("input", "unified_input", "conditional_velocity"))
    losses = (run.state.objective.network(u) - v).square().sum(1)
    expected = torch.autograd.grad(losses.mean(), list(run.state.objective.network.parameters()))
    norm = torch.cat([g.flatten() for g in expected]).norm()
    values = train_step(run, group)
    torch.testing.assert_close(values["loss"], losses.mean().detach())
    torch.testing.assert_close(values["grad_norm"], norm)
    assert z.shape == (250, 2)


def test_clipping_bounds_the_step(tmp_path):
    """Plain SGD with rate 1: the weights move by at most the clipped norm."""
    settings = ["optimizer=sgd", "optimizer.lr=1.0", "optimizer.momentum=0", "optimizer.nesterov=false", "schedule=constant"]
    run = assemble(small_config(tmp_path, *settings, "grad_clip=0.01"))
    before = [p.clone() for p in run.state.objective.network.parameters()]
    values = train_step(run, next(iter(epoch_groups(run))))
    moved = torch.cat([(p - b).flatten() for p, b in zip(run.state.objective.network.parameters(), before, strict=True)])
    assert values["grad_norm"] > 0.01
    torch.testing.assert_close(moved.norm(), torch.tensor(0.01), rtol=1e-3, atol=0)


def test_each_step_sees_fresh_noise_and_ranks_see_their_own(tmp_path):
    run = assemble(small_config(tmp_path, "batch_size=50", "epochs=2"))
    first = torch.cat([g[0].raw_source for g in epoch_groups(run)])
    run.state.step = run.steps_per_epoch
    second = torch.cat([g[0].raw_source for g in epoch_groups(run)])
    run.state.step, run.world = 0, 2
    ranks = []
    for run.rank in (0, 1):
        ranks.append(torch.cat([g[0].raw_source for g in epoch_groups(run)]))
    for draws in (torch.cat([first, second]), torch.cat(ranks)):
        assert len(torch.unique(draws, dim=0)) == len(draws)
    assert len(first) == 250 and len(ranks[0]) == len(ranks[1]) == 125


def test_each_epoch_of_a_finite_set_has_its_own_order(tmp_path):
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(100, 2)))
    data = ["dataloaders=array", f"dataloaders.path={tmp_path / 'x.npy'}", "dataloaders.epoch_size=null", "batch_size=90"]
    run = assemble(small_config(tmp_path, *data))
    (first,) = [g[0].raw_target for g in epoch_groups(run)]
    run.state.step = 1
    (second,) = [g[0].raw_target for g in epoch_groups(run)]
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_overfit_shows_the_same_batch_every_step(tmp_path):
    run = assemble(small_config(tmp_path, "debug=overfit"))
    batches = [g[0] for g in epoch_groups(run)]
    assert len(batches) > 1
    assert all(torch.equal(batches[0].unified_input, b.unified_input) for b in batches)


def test_overfit_drives_the_loss_down(small_run):
    words = ("model.width=64", "batch_size=16", "max_steps=250", "log_every=50", "grad_clip=null")
    folder = small_run("x", "debug=overfit", *words)
    losses = [row["train/loss"] for row in metric_rows(folder, "x") if "train/loss" in row]
    assert losses[-1] < 0.05 * losses[0]


def test_a_nan_loss_stops_the_run_and_saves_nothing_broken(small_run, tmp_path, monkeypatch):
    class Poison(Callback):
        def step_end(self, run: Run) -> None:
            if run.state.step == 12:
                with torch.no_grad():
                    next(run.state.objective.network.parameters()).fill_(float("nan"))

    monkeypatch.setattr("training.callbacks.DeviceTelemetry", Poison)
    with pytest.raises(UserError, match=r"train/loss became NaN.*last good save is .*x_last\.pt"):
        small_run("x")
    status = json.loads((tmp_path / "outputs/runs/x/status.json").read_text())
    assert status["state"] == "failed" and "NaN" in status["why"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "outputs", "x").values())


def test_running_out_of_memory_names_what_to_turn(small_run, monkeypatch):
    class Greedy(Callback):
        def step_end(self, run: Run) -> None:
            torch.empty(2**50)

    monkeypatch.setattr("training.callbacks.DeviceTelemetry", Greedy)
    with pytest.raises(UserError, match=r"batch_size.*gradient_accumulation_steps.*precision"):
        small_run("x")


def test_a_wrong_monitor_costs_no_training(small_run):
    with pytest.raises(UserError, match=r"monitor=eval/loss_x .*eval/loss"):
        small_run("x", "monitor=eval/loss_x")
    folder = small_run("x", "resume=true", "monitor=eval/loss")
    assert_equal_runs(folder, small_run("x", output="right"), "x")


@pytest.mark.parametrize("error, length, step", [(UserError, "epochs=3", 8), (ZeroDivisionError, "max_steps=3", 3)])
def test_an_evaluation_that_fails_costs_no_training(small_run, monkeypatch, capsys, error, length, step):
    def fail(*_, **__):
        raise error("this score fails")

    whole = small_run("x", "schedule=constant", "max_steps=10", output="whole")
    monkeypatch.setattr(GeneratorEvaluator, "evaluate", fail)
    with pytest.raises(error, match="this score fails"):
        small_run("x", "schedule=constant", length)
    monkeypatch.undo()
    assert f"note: the evaluation after step {step} failed; the last good save is" in capsys.readouterr().err
    folder = small_run("x", "resume=true", "max_steps=10")
    assert "beginning it again" not in capsys.readouterr().out
    one, two = weights(whole, "x"), weights(folder, "x")
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(("mode", "best"), [("auto", 3), ("min", 0), ("max", 3)])
def test_patience_and_the_best_save_know_that_accuracy_is_better_when_higher(small_run, monkeypatch, mode, best):
    def evaluate(run, final):
        return {"eval/accuracy": [0.5, 0.6, 0.7, 0.8, 0.6, 0.65, 0.7][run.epoch - 1]}

    monkeypatch.setattr("training.loop.evaluate", evaluate)
    monkeypatch.setattr(GeneratorEvaluator, "names", list)
    folder = small_run("x", "monitor=eval/accuracy", f"monitor_mode={mode}", "patience=2", "epochs=7", "schedule=constant")
    saved, last = (load_checkpoint(folder / f"ckpts/mlp/x_{name}.pt") for name in ("best", "last"))
    assert saved["epoch"] == best + 1 and last["epoch"] == best + 3
    assert last["best"] == pytest.approx([0.5, 0.6, 0.7, 0.8][best])


def test_a_finished_run_says_which_setting_would_extend_it(small_run, capsys):
    small_run("x", "max_steps=5")
    small_run("x", "resume=true", "epochs=9")
    assert "give a larger max_steps= (it has 5)" in capsys.readouterr().out


def test_a_run_leaves_its_files(small_run, tmp_path):
    folder = small_run("x", 'log.expect="the loss falls below 5"', "epochs=5")
    run = folder / "runs/x"
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        "config.yaml", "overrides.txt", "status.json", "metrics.jsonl", "log.md", "model.safetensors"
    }  # fmt: skip
    assert {path.name for path in (folder / "ckpts/mlp/archive").iterdir()} == {
        f"x_epoch_{epoch:04d}.pt" for epoch in (3, 4, 5)
    }
    assert {path.name for path in (folder / "ckpts/mlp").glob("*.pt")} == {"x_last.pt", "x_best.pt", "last.pt"}
    names = set().union(*metric_rows(folder, "x"))
    assert {"train/loss", "train/grad_norm", "train/lr", "epoch", "eval/loss", "eval/nfe"} <= names
    exported, saved = (load(path, device="cpu") for path in (run / "model.safetensors", folder / "ckpts/mlp/x_last.pt"))
    assert exported.step == saved.step and torch.equal(exported.sample(4), saved.sample(4))
    small_run("next", f"init_from={run / 'model.safetensors'}", "max_steps=1")
    assert "the loss falls below 5" in (tmp_path / "EXPERIMENT_LOG.md").read_text()


def test_a_run_from_python_is_a_number_with_scores_and_paths(small_run, tmp_path, capsys):
    folder = small_run("x", "optimizer.lr=0.5", "schedule=constant")
    words = [f"output_dir={folder}", "trackio.enabled=false"]
    again = launcher.run("run_name=x", "resume=true", *words)  # has nothing left to do
    evaluated = [row["eval/loss"] for row in metric_rows(folder, "x") if "eval/loss" in row]
    assert RunFolder(folder / "runs/x").status.read()["epochs"] == 3
    assert again == min(evaluated) < again.scores["eval/loss"] == evaluated[-1] and again.state == "finished"
    assert again.path == folder / "runs/x" and again.checkpoint == folder / "ckpts/mlp/x_last.pt"
    scored = launcher.run("run_name=any", f"eval_checkpoint={again.checkpoint}", *words)
    assert scored == scored.scores["eval/loss"] == pytest.approx(evaluated[-1]) and scored.checkpoint == again.checkpoint
    assert json.loads(scored.path.read_text()) == scored.scores and scored.path == folder / "evaluations/any.json"
    other = launcher.run("run_name=any", f"eval_checkpoint={again.checkpoint}", "monitor=eval/fid", *words)
    assert other == math.inf and pickle.loads(pickle.dumps(other)).scores == other.scores


def test_init_from_starts_at_the_other_runs_average(small_run, tmp_path):
    folder = small_run("x", "epochs=1")
    path = folder / "ckpts/mlp/x_last.pt"
    run = assemble(small_config(tmp_path, f"init_from={path}", "model.depth=2"))
    saved = load_checkpoint(path)["ema"]
    assert all(torch.equal(value, saved[name]) for name, value in run.state.objective.network.state_dict().items())
    with pytest.raises(UserError, match="another network"):
        assemble(small_config(tmp_path, f"init_from={path}", "model.depth=2", "model.width=17"))


def test_patience_ends_a_run_early_as_finished(small_run):
    folder = small_run("x", "epochs=50", "patience=2", "optimizer.lr=1e-12")
    status = json.loads((folder / "runs/x/status.json").read_text())
    assert status["state"] == "finished" and "has not improved" in status["why"] and status["epoch"] < 50


def test_best_is_the_save_with_the_lowest_monitored_value(small_run):
    folder = small_run("x", "epochs=6", "optimizer.lr=0.5", "schedule=constant")
    losses = {row["step"]: row["eval/loss"] for row in metric_rows(folder, "x") if "eval/loss" in row}
    assert load_checkpoint(folder / "ckpts/mlp/x_best.pt")["step"] == min(losses, key=losses.__getitem__)


def test_max_steps_may_end_inside_an_epoch_with_a_last_evaluation_and_save(small_run):
    folder = small_run("x", "max_steps=5")
    saved = load_checkpoint(folder / "ckpts/mlp/x_last.pt")
    assert saved["step"] == 5 and saved["epoch"] == 1
    assert metric_rows(folder, "x")[-1]["step"] == 5 and "eval/loss" in metric_rows(folder, "x")[-1]


def test_eval_checkpoint_scores_without_a_run(small_run, capsys):
    folder = small_run("x", "epochs=1")
    capsys.readouterr()
    small_run("any_name", f"eval_checkpoint={folder / 'ckpts/mlp/x_last.pt'}", "evaluation.samples=32", "device=cpu")
    assert "eval/loss" in capsys.readouterr().out
    assert not (folder / "runs/any_name").exists()


def test_the_loop_leaves_the_objective_bare_under_compile(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda module, mode, **given: seen.append((type(module).__name__, mode)) or module)
    run = assemble(small_config(tmp_path, "compile=true", "compile_mode=reduce-overhead", "max_steps=2"))
    assert seen == [("FlowMatchingLoss", "reduce-overhead")]
    assert not any("_orig_mod" in name for name in run.state.state_dict()["network"])
    assert callable(fit)


def test_without_scores_only_the_picture_is_sampled(tmp_path):
    run = assemble(small_config(tmp_path, "evaluation=loss_only", "evaluation.samples=64", "evaluation.final_samples=200"))
    assert scored(run).startswith("eval/loss on 200 held-out states, no scores; a picture of 64 samples; ")
    values = run.evaluate(final=True)
    assert len(run.evaluation.generation.samples) == 64 and values["eval/loss"] > 0
    run.evaluator.samples, run.evaluator.loss_samples = 10, 100
    assert run.evaluate(final=True)["eval/loss"] != values["eval/loss"]  # which is of held-out states of their own number


@pytest.mark.parametrize("words", [[], ["dataloaders=digits", "loss=cross_entropy", "dataloaders.epoch_size=1438"]])
def test_no_score_is_of_no_held_out_state(words, tmp_path, monkeypatch):
    classifier = ["model=small_cnn_classifier", "evaluation=classifier"] if words else []
    run = assemble(small_config(tmp_path, *words, *classifier))
    held_out = type(run.dataset).held_out
    monkeypatch.setattr(type(run.dataset), "held_out", lambda self, count, generator: [
        part if part is None else part[:0] for part in held_out(self, count, generator)
    ])  # fmt: skip
    with pytest.raises(UserError, match="no held-out states to score"):
        run.evaluate(final=True)
