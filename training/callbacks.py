"""Observers of a run: they watch, draw and write, and may vote to stop, but never change what is trained."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from common.errors import UserError
from common.files import replacing
from common.progress import Progress
from common.ranges import Count, CountOr0, Steps
from evaluation.classifier_evaluator import ClassifierEvaluation
from evaluation.milestones import milestones_for
from evaluation.report import class_table, draw_neighbours, draw_picture, per_dimension, provenance_lines, score_rows
from run_files.experiment_log import ExperimentLog
from run_files.metrics_file import higher_is_better
from run_files.provenance import made_with
from run_files.result import markdown
from run_files.run_folder import run_folders
from run_files.telemetry import Telemetry, telemetry_for
from training.run import Callback

if TYPE_CHECKING:
    from training.run import Run


class ProgressBar(Callback):
    """A bar with loss, rate and time left on a terminal, else a line now and then; and a line for each evaluation."""

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
    """Samples beside real data, drawn at each evaluation; at the last also those nearest to training images, beside them."""

    def __init__(self, images: Count = 100) -> None:
        self.images = images

    def evaluation_end(self, run: Run) -> None:
        assert run.evaluation is not None
        name, step, records = run.notes.run_name, run.state.step, run.records
        path, beside = records.folder.sample_picture(step), records.folder.sample_picture(step, "_neighbours")
        with TemporaryDirectory() as place:  # drawing takes a while, in which the run's folder may be deleted
            picture, neighbours = Path(place) / path.name, Path(place) / beside.name
            made = draw_picture(picture, run.evaluation, f"{name}, step {step}", self.images)
            made_beside = draw_neighbours(neighbours, run.evaluation, name)
            records.folder.lock.check()
            for file in Path(place).iterdir():
                with replacing(path.with_name(file.name)) as kept:
                    kept.write(file.read_bytes())
        if made and step:
            records.tracker.log_image("samples", path, step)
        if made_beside and step:
            records.tracker.log_image("neighbours", beside, step)


class DeviceTelemetry(Callback):
    """Adds what the accelerator is doing to each logged line."""

    def __init__(self) -> None:
        self.telemetry = Telemetry()

    def fit_begin(self, run: Run) -> None:
        self.telemetry = telemetry_for(run.shared_device.type)

    def extra_metrics(self, run: Run) -> dict[str, float]:
        return self.telemetry.read()

    def close(self) -> None:
        self.telemetry.close()


class ExperimentNotes(Callback):
    """Writes the run's log.md, and its section of EXPERIMENT_LOG.md when log.expect says what is expected."""

    def __init__(self) -> None:
        self.logs: list[ExperimentLog] = []

    def fit_begin(self, run: Run) -> None:
        notes, step = run.notes, run.state.step
        self.logs = [ExperimentLog(run.records.folder.log_path)]
        if notes.expect:
            self.logs.append(ExperimentLog(Path(notes.file)))
            print(f"log: this run states what it expects, so it writes its section of {notes.file} (log.file=)")
        choices = ", ".join(f"{group}={choice}" for group, choice in notes.choices.items() if choice)
        reasons = notes.expect or "", notes.source or "", notes.reason or ""
        for log in self.logs:
            if step:
                log.drop_results_after(notes.run_name, step)
            else:
                log.begin(notes.run_name, notes.command, f"Configuration: {choices}", *reasons)
            for key, (old, new) in notes.changed.items():
                log.add_change(notes.run_name, key, old, new, reasons[-1])

    def evaluation_end(self, run: Run) -> None:
        if run.evaluation is not None and run.state.step:
            scores = ", ".join(f"{score.name} {score.value:.4g}" for score in run.evaluation.scores)
            for log in self.logs:
                log.add_result(run.notes.run_name, f"epoch {run.epoch}, step {run.state.step}: {scores}")

    def fit_end(self, run: Run) -> None:
        if run.evaluation is None or run.interrupted:
            return
        step, _, seconds = run.now
        parts = [markdown(("score", "value", "noise floor"), score_rows(run.evaluation))]
        parts.append(f"{step} steps, {seconds:.0f} s in the loop, seed {run.notes.seed}.")
        parts += provenance_lines(run.evaluation.scores)
        if isinstance(run.evaluation, ClassifierEvaluation):
            parts += [class_table(run.evaluation), *compared_table(run)]
        if run.notes.targets:
            parts.append(target_table(run.evaluation.values, run.notes.targets))
        for log in self.logs:
            log.finish(run.notes.run_name, "\n\n".join(parts))


class MilestoneNotes(Callback):
    """Says at an evaluation that the run is behind what seeds of its recipe scored there (evaluation/milestones.py)."""

    def evaluation_end(self, run: Run) -> None:
        if run.evaluation is None or not run.state.step:
            return
        found, _ = milestones_for(run.records.config)
        words = found and found.said(run.state.step, run.evaluation.values, made_with(run.device_words))
        if words:
            print(f"note: {words}", file=sys.stderr)


def target_table(values: dict[str, float], targets: dict[str, float]) -> str:
    """Return metrics beside their acceptable values: some are to be reached, such as accuracy, the others not passed."""
    rows = []
    for name, wanted in targets.items():
        sign = ">=" if higher_is_better(name) else "<="
        if name in values:
            met = values[name] >= wanted if sign == ">=" else values[name] <= wanted
            rows.append((name, f"{sign} {wanted:g}", f"{values[name]:.4g}", "yes" if met else "no"))
        else:
            rows.append((name, f"{wanted:g}", "not measured", "no"))
    return markdown(("target", "acceptable", "reached", "met"), rows)


def compared_table(run: Run) -> list[str]:
    """Return the difference to the last finished run of the same data, model and loss, of the same experiment where there is
    one, as a table; none without one.
    """
    assert run.evaluation is not None
    last = None
    for same_experiment, name, scores in runs_like(run):
        last = (name, scores) if same_experiment or last is None else last
        if same_experiment:
            break
    if last is None:
        return []
    known = [(score, last[1][score.name]) for score in run.evaluation.scores if last[1].get(score.name) is not None]
    rows = [(s.name, f"{before:.4g}", f"{s.value:.4g}", f"{s.value - before:+.2g}") for s, before in known]
    return [markdown(("score", last[0], "here", "difference"), rows)]


def runs_like(run: Run) -> Iterator[tuple[bool, str, dict[str, float]]]:
    """Yield the finished runs of the same data, model and loss, the newest first: whether of the same experiment, too, the
    name and the scores.
    """
    folders = run_folders(run.records.folder.path.parents[1]).values()
    others = [folder for folder in folders if folder.name != run.notes.run_name and folder.config_path.is_file()]
    found = [(folder, status) for folder in others if (status := folder.status.read()).get("state") == "finished"]
    for folder, status in sorted(found, key=lambda pair: str(pair[1].get("updated", "")), reverse=True):
        try:
            choices = folder.read_config().get("choices", {})
        except UserError:  # of another run, whose files are damaged
            continue
        same = {group for group in run.notes.choices if choices.get(group) == run.notes.choices[group]}
        if same >= {"dataloaders", "model", "loss"}:
            yield "experiment" in same, folder.name, status.get("scores", {})


class Profiler(Callback):
    """torch.profiler over `steps` steps after `skip`: a table on the console, a trace in the run's folder."""

    def __init__(self, skip: CountOr0 = 10, steps: Steps = 40) -> None:
        self.skip, self.steps = skip, steps
        self.begun = 0
        self.profiler: Any = None

    def fit_begin(self, run: Run) -> None:
        self.begun = run.state.step

    def step_end(self, run: Run) -> None:
        done = run.state.step - self.begun
        if done == self.skip:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif done == self.skip + self.steps:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(run.records.folder.path / "trace.json"))
            print(self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
