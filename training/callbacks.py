"""Observers of a run: they watch, draw and write, and may vote to stop, but never change what is trained."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.progress import Progress
from common.ranges import Count, CountOr0, Steps
from evaluation.report import per_dimension
from run_files.experiment_log import ExperimentLog
from run_files.metrics_file import higher_is_better
from run_files.telemetry import NoTelemetry, Telemetry, telemetry_for
from training.run import Callback

if TYPE_CHECKING:
    from training.run import Run


class ProgressBar(Callback):
    """How far training is: a bar with loss, rate and time left on a terminal, else a line now and then where it takes long.
    Either way a line for each evaluation."""

    def __init__(self, every: Count = 10) -> None:
        """every: steps between two looks, unless they take more than a second."""
        self.every = every
        self.shown: Progress | None = None
        self.looked = 0.0

    def fit_begin(self, run: Run) -> None:
        self.shown = Progress("training", run.total_steps, run.state.step, unit="step")

    def step_end(self, run: Run) -> None:
        assert self.shown is not None
        step, now = run.state.step, time.perf_counter()
        if step % self.every == 0 or step == run.total_steps or now - self.looked > 1:
            self.looked = now
            if "train/loss" in run.last_values:
                self.shown.bar.set_postfix(loss=f"{run.last_values['train/loss']:.4g}", refresh=False)
            self.shown.advance(step - self.shown.done)

    def evaluation_end(self, run: Run) -> None:
        if self.shown is not None and run.evaluation is not None:
            values = run.evaluation.values
            shown = [
                f"{k.partition('/')[2]} {values[k]:.4g}{per_dimension(run.evaluation) if k == 'eval/loss' else ''}"
                for k in ("eval/loss", "eval/energy_distance", "eval/accuracy")
                if k in values
            ]
            line = f"epoch {run.epoch}, step {run.state.step}/{run.total_steps}: {', '.join(shown)}"
            self.shown.bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self.shown is not None:
            self.shown.bar.close()


class SamplePictures(Callback):
    """At each evaluation, a picture of the samples beside real data, to samples/ and to the tracker; at the last one also of
    the samples nearest to training images, beside those."""

    def __init__(self, images: Count = 100) -> None:
        self.images = images

    def evaluation_end(self, run: Run) -> None:
        from evaluation.report import draw_neighbours, draw_picture

        assert run.evaluation is not None
        path = run.folder.sample_picture(run.state.step)
        title = f"{run.config['run_name']}, step {run.state.step}"
        if draw_picture(path, run.evaluation, title, self.images) and run.state.step:
            run.tracker.log_image("samples", path, run.state.step)
        beside = run.folder.neighbours_picture(run.state.step)
        if draw_neighbours(beside, run.evaluation, run.config["run_name"]) and run.state.step:
            run.tracker.log_image("neighbours", beside, run.state.step)


class DeviceTelemetry(Callback):
    """Adds what the accelerator is doing to each logged line."""

    def __init__(self) -> None:
        self.telemetry: Telemetry = NoTelemetry()

    def fit_begin(self, run: Run) -> None:
        self.telemetry = telemetry_for(run.device.type)

    def extra_metrics(self, run: Run) -> dict[str, float]:
        return self.telemetry.read()

    def close(self) -> None:
        self.telemetry.close()


class ExperimentNotes(Callback):
    """Writes the run's log.md, and its section of EXPERIMENT_LOG.md when log.expect says what is expected."""

    def __init__(self) -> None:
        self.logs: list[ExperimentLog] = []

    def fit_begin(self, run: Run) -> None:
        log = run.config["log"]
        self.logs = [ExperimentLog(run.folder.log_path)]
        if log["expect"]:
            self.logs.append(ExperimentLog(Path(log["file"])))
            print(f"log: this run states what it expects, so it writes its section of {log['file']} (log.file=)")
        if run.state.step == 0:
            choices = ", ".join(f"{group}={choice}" for group, choice in run.config["choices"].items() if choice)
            for notes in self.logs:
                notes.begin(
                    run.config["run_name"], run.config["command"], f"Configuration: {choices}",
                    log["expect"] or "", log["source"] or "", log["reason"] or "",
                )  # fmt: skip
        for notes in self.logs:
            if run.state.step:
                notes.drop_results_after(run.config["run_name"], run.state.step)
            for key, (old, new) in run.config["changed"].items():
                notes.add_change(run.config["run_name"], key, old, new, log["reason"] or "")

    def evaluation_end(self, run: Run) -> None:
        if run.evaluation is not None and run.state.step:
            scores = ", ".join(f"{score.name} {score.value:.4g}" for score in run.evaluation.scores)
            for notes in self.logs:
                notes.add_result(run.config["run_name"], f"epoch {run.epoch}, step {run.state.step}: {scores}")

    def fit_end(self, run: Run) -> None:
        if run.evaluation is None or run.interrupted:
            return
        from evaluation.classifier_evaluator import ClassifierEvaluation
        from evaluation.report import class_table, provenance_lines, score_rows

        rows = [f"| {name} | {value} | {floor} |" for name, value, floor in score_rows(run.evaluation)]
        facts = f"{run.state.step} steps, {run.elapsed():.0f} s in the loop, seed {run.config['seed']}."
        facts = "\n\n".join([facts, *provenance_lines(run.evaluation.scores)])
        table = "\n".join(["| score | value | noise floor |", "|---|---|---|", *rows, "", facts])
        if isinstance(run.evaluation, ClassifierEvaluation):
            table += "\n\n" + class_table(run.evaluation) + compared_table(run)
        targets = run.config["log"].get("targets")
        if targets:
            table += "\n\n" + target_table(run.evaluation.values, targets)
        for notes in self.logs:
            notes.finish(run.config["run_name"], table)


def target_table(values: dict[str, float], targets: dict[str, float]) -> str:
    """Metrics beside their acceptable values: some are to be reached, such as accuracy, the others not passed."""
    lines = ["| target | acceptable | reached | met |", "|---|---|---|---|"]
    for name, wanted in targets.items():
        if name not in values:
            lines.append(f"| {name} | {wanted:g} | not measured | no |")
            continue
        higher = higher_is_better(name)
        met = values[name] >= wanted if higher else values[name] <= wanted
        lines.append(f"| {name} | {'>=' if higher else '<='} {wanted:g} | {values[name]:.4g} | {'yes' if met else 'no'} |")
    return "\n".join(lines)


def compared_table(run: Run) -> str:
    """Return the difference to the last finished run of the same data, model and loss, as a Markdown table; empty without
    one.
    """
    from run_files.run_folder import RunFolder

    assert run.evaluation is not None
    same, found = ("dataloaders", "model", "loss"), []
    for path in run.folder.path.parent.glob("*/status.json"):
        folder = RunFolder(path.parent)
        status = folder.status.read()
        if path.parent != run.folder.path and status.get("state") == "finished" and folder.config_path.is_file():
            found.append((status.get("updated", ""), folder, status.get("scores", {})))
    for _, folder, scores in sorted(found, key=lambda item: str(item[0]), reverse=True):
        try:
            choices = folder.read_config().get("choices", {})
        except UserError:  # what is damaged there is not this run's to tell
            continue
        if all(choices.get(group) == run.config["choices"][group] for group in same):
            lines = [f"| score | {folder.name} | here | difference |", "|---|---|---|---|"]
            for score in run.evaluation.scores:
                before = scores.get(score.name)
                if before is not None:
                    lines.append(f"| {score.name} | {before:.4g} | {score.value:.4g} | {score.value - before:+.2g} |")
            return "\n\n" + "\n".join(lines)
    return ""


class Profiler(Callback):
    """torch.profiler over `steps` steps after `skip`: a table on the console, a trace in the run's folder."""

    def __init__(self, skip: CountOr0 = 10, steps: Steps = 40) -> None:
        self.skip, self.steps = skip, steps
        self.begun = 0
        self.profiler: Any = None

    def fit_begin(self, run: Run) -> None:
        self.begun = run.state.step

    def step_end(self, run: Run) -> None:
        import torch

        done = run.state.step - self.begun
        if done == self.skip:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif done == self.skip + self.steps:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(run.folder.path / "trace.json"))
            print(self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
