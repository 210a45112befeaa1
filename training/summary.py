"""What a run says before it starts and after it ends."""

import copy
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from common.command_line import ROOT
from common.files import in_working_folder
from common.progress import LONG, duration, seconds_a_row
from configuration.compose import CONFIG_DIR, twice_as_long
from configuration.stored import trust_word
from dataloaders.stream import Rows, StreamDataset
from dataloaders.tensor_dataset import TensorDataset
from evaluation.evaluator import GeneratorEvaluator
from evaluation.metrics.base_metric import number
from evaluation.milestones import standing
from evaluation.report import print_scores
from losses.couplings import MinibatchOTCoupling, SinkhornCoupling
from losses.objective import FlowObjective
from run_files.provenance import made_with
from run_files.run_folder import RunFolder, saves_of
from training.run import Run
from training.sharding import is_sharded
from training.trial import RowSeconds

USUAL = (0.2, 5.0)  # sizes of data that are learned well from noise of standard deviation 1
BESIDE = ("eval/energy_distance", "eval/between_clusters", "oracle/flow_map_error")  # of a teacher, beside its student
READ = 16  # pictures that are read to see how long it takes
COPIED = 10**7  # weights, at most, that are copied to see how long an update takes
MANY_PAIRED = 256  # rows whose exact assignment takes longer than a step of a small network
# Commands are shown as they can be typed again, from where this one was typed.
RUNNER = "uv run " if "UV" in os.environ else ""
PLACE = Path() if Path.cwd() == ROOT else ROOT
LAUNCH, SAMPLE = f"{RUNNER}python {PLACE / 'launcher.py'}", f"{RUNNER}python {PLACE / 'scripts/sample.py'}"


def print_lines(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def megabytes(paths: list[Path]) -> str:
    """Return the space they take; one file under several names counts once."""
    sizes = {(status.st_dev, status.st_ino): status.st_size for status in (path.stat() for path in paths)}
    return f"{sum(sizes.values()) / 1e6:.1f} MB"


def recipe_batch(config: dict[str, Any]) -> int | None:
    """Return rows of an optimizer step in the chosen experiment's recipe, or the data's own; None for debugging."""
    if config["choices"].get("debug"):
        return None
    experiment = config["choices"].get("experiment")
    recipe: Any = OmegaConf.load(CONFIG_DIR / "experiment" / f"{experiment}.yaml") if experiment else {}
    rows = recipe.get("batch_size") or config["dataloaders"].get("training", {}).get("batch_size")
    return rows and int(rows) * int(recipe.get("gradient_accumulation_steps") or 1)


def notes(run: Run) -> Iterator[str]:
    """Yield what is unusual: other rows in a step than the recipe's, data far from unit size, slow or biased pairs."""
    loop, dataset, config, flow = run.settings, run.dataset, run.records.config, run.inputs.flow
    rows = loop.batch_size * loop.gradient_accumulation_steps
    if (recipe := recipe_batch(config)) not in (None, rows):
        how = f" ({rows_of_step(run)})" * (loop.gradient_accumulation_steps > 1)
        yield f"a step sees {rows:,} rows{how}, the recipe of this data {recipe:,}"
    if flow is None:
        return
    if isinstance(dataset, TensorDataset) and dataset.states.dtype != torch.uint8:
        scale = dataset.train_states.square().mean().sqrt().item()
        plain = config["dataloaders"].get("standardize") is False
        if plain and scale and not USUAL[0] <= scale <= USUAL[1]:
            yield (
                f"the data's root mean square is {scale:.3g}, and flows from standard noise learn best near 1; add "
                "dataloaders.standardize=true: samples and scores stay in the data's units"
            )
    yield from notes_on_pairs(flow, loop.batch_size // run.world)


def notes_on_pairs(flow: FlowObjective, rows: int) -> Iterator[str]:
    """Yield what is slow, or biased, in how a flow's noise is paired with this many rows of data."""
    coupling = flow.coupling
    paired = min(coupling.group or rows, rows) if isinstance(coupling, MinibatchOTCoupling) else 0
    if paired > MANY_PAIRED:
        yield (
            f"{paired:,} rows are paired exactly in each step, which takes time cubic in "
            "their number; batch_size=256 or loss.coupling.group=128, pairs within groups of so many, is faster"
        )
    if not isinstance(coupling, (MinibatchOTCoupling, SinkhornCoupling)):
        return
    if flow.network.condition_shape and not flow.network.num_classes:
        yield (
            "noise is paired with data whatever its condition, and samples of a condition start from all noise, which "
            "biases them; loss.coupling.label_weight is of classes and changes nothing here: use loss/coupling=independent"
        )
    if flow.network.num_classes and not coupling.label_weight:
        yield (
            "noise is paired with data whatever its class, and samples of a class start from all noise, which biases "
            "them; loss.coupling.label_weight=1e6 pairs within classes"
        )


def rows_of_step(run: Run) -> str:
    batches = run.settings.gradient_accumulation_steps
    return f"{run.settings.batch_size} rows" + (f" x {batches} batches" if batches > 1 else "")


def print_start(run: Run) -> None:
    """Print a dozen lines: what is about to happen, where, and what it leaves."""
    loop, choices, network, dataset = run.settings, run.notes.choices, run.state.objective.network, run.dataset
    learning_rate, keep = run.state.optimizer.param_groups[0]["initial_lr"], run.records.checkpoints.keep
    flow, many, config = isinstance(run.state.objective, FlowObjective), run.world > 1, run.records.config
    for note in notes(run):
        print(f"note: {note}")
    print(f"{run.notes.run_name}: {choices['model']} learns {choices['dataloaders']} by {choices['loss']}")
    share = f"{loop.batch_size} rows, {loop.batch_size // run.world} on each device"
    model = f"{choices['model']}, {network.parameter_count():,} parameters"
    model += f", {network.num_classes} classes" if network.num_classes else ""
    model += f", conditions {'x'.join(map(str, network.condition_shape))}" if network.condition_shape else ""
    frequencies = config["model"].get("time_frequencies")
    parts = f", path {choices.get('loss/path')}, coupling {choices.get('loss/coupling')}" if flow else ""
    begun = f", from step {run.state.step:,}" if run.state.step else ""
    kept = f"newest {keep} epoch saves" if keep else "every epoch save"
    lines = {
        "device": f"{run.world} x " * many + f"{run.device_words}, {loop.precision}" + ", compiled" * config["compile"],
        "global batch": f"{share}; lr {learning_rate:g} is that of the global batch, as typed" * many,
        "sharding": f"each device keeps 1/{run.world} of weights, average and optimizer, and gathers a block at a time"
        * is_sharded(network),
        "data": f"{choices['dataloaders']}, states {'x'.join(map(str, dataset.state_shape))}, {dataset.epoch_size:,} draws "
        "an epoch",
        "model": model + (f", time frequencies {frequencies}" if frequencies else ""),
        "objective": choices["loss"] + parts,
        "optimizer": f"{choices['optimizer']}, lr {learning_rate:g}, schedule {choices['schedule']}",
        "steps": f"{run.total_steps:,} of {rows_of_step(run)}, {run.steps_per_epoch:,} an epoch{begun}",
        "evaluation": f"every {loop.eval_every} epoch(s): {scored(run)}",
        "run folder": str(run.records.folder.path),
        "checkpoints": f"{run.records.checkpoints.folder} ({kept}, last and best)",
    }
    print_lines([(name, words) for name, words in lines.items() if words])


def scored(run: Run) -> str:
    """Return what an evaluation is of, in words."""
    evaluator, solver = run.evaluator, run.inputs.solver
    if not isinstance(evaluator, GeneratorEvaluator):
        return "accuracy on held-out images"
    samples = f"{evaluator.samples:,} samples, {evaluator.final_samples:,} at the end"
    if not evaluator.metrics:
        states = int(min(evaluator.loss_samples, run.dataset.held_out_size))
        samples = f"eval/loss on {states:,} held-out states, no scores; a picture of {evaluator.samples:,} samples"
    return f"{samples}; {run.notes.choices['solver']}, {solver.steps} steps"


def print_times(run: Run, row: RowSeconds) -> None:
    """Print how long an epoch and the run will take, as the rows tried before show; and evaluations, if they are long."""
    left = run.total_steps - run.state.step
    rows = run.dataset.epoch_size / run.world
    epoch = beside_reading(run, row.training) * rows + seconds_of_update(run) * run.steps_per_epoch
    words = f"about {duration(epoch)} an epoch, {duration(epoch * left / run.steps_per_epoch)} of training"
    flow, evaluator = run.inputs.flow, run.evaluator
    if flow is not None and isinstance(evaluator, GeneratorEvaluator):
        rows_of = [evaluator.all_rows(flow, run.dataset, run.inputs.solver, final) for final in (False, True)]
        each, last = (row.sampling * count / run.world for count in rows_of)
        if max(each, last) > LONG:
            words += f"; an evaluation {duration(each)}, the last one {duration(last)}"
    print_lines([(f"{'time':<11}", words)])


def beside_reading(run: Run, trained: float) -> float:
    """Return what a row that trains in so many seconds takes in all: others are read meanwhile, as far as cores allow."""
    dataset, cores = run.dataset, os.cpu_count() or 1
    if not isinstance(dataset, StreamDataset):
        return trained
    rows = min(READ, len(dataset.train))
    begun = time.perf_counter()
    dataset.train[Rows(dataset.numbers(range(rows)), 0)]
    read = (time.perf_counter() - begun) / rows
    if not dataset.num_workers:
        return trained + read
    busy = trained * torch.get_num_threads() if run.device.type == "cpu" else 0.0
    return max(trained, read / dataset.num_workers, (busy + read) / cores)


def seconds_of_update(run: Run) -> float:
    """Return what an update takes in a step, tried on copies; 0 of large networks, whose passes take far longer."""
    network, state = run.state.objective.network, run.state
    if network.parameter_count() > COPIED or is_sharded(network):
        return 0.0
    copied, optimizer = copy.deepcopy((network, state.optimizer))
    for weight in copied.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    average = state.ema.average_of(copied)

    def update(_: int) -> None:
        optimizer.step()
        state.ema.update(average, copied, 1)

    update(1)  # makes what the optimizer keeps
    return seconds_a_row(update, 1, run.device)


def print_end(run: Run) -> None:
    """Print the closing block: scores, picture, dashboard, how to go on."""
    how, (step, _, seconds) = "interrupted" if run.interrupted else "finished", run.now
    why = f" ({run.stop.why})" if run.stop is not None else ""
    print(f"{run.notes.run_name} {how}{why} at step {step:,} of {run.total_steps:,}, {seconds:.1f} s")
    if run.evaluation is not None and how == "finished":
        print_scores(run.evaluation, run.inputs.solver.evaluations)
    print_lines(end_lines(run))
    picture = run.records.folder.sample_picture(step)
    if run.records.config.get("show") and picture.exists():
        from evaluation.thumbnail import thumbnail

        print(thumbnail(picture))


def scores_of_teacher(folder: RunFolder) -> str:
    """Return the scores of a run's teacher that its own stand beside, by its own solver."""
    scores = folder.status.read().get("scores", {})
    return ", ".join([folder.name, *(f"{name} {number(scores[name])}" for name in BESIDE if name in scores)])


def end_lines(run: Run) -> list[tuple[str, str]]:
    """Return what the run left, and the commands that go on from it."""
    name, records = run.notes.run_name, run.records
    saves, folder, output_dir = records.checkpoints, records.folder, records.config["output_dir"]
    picture, beside = folder.sample_picture(run.state.step), folder.sample_picture(run.state.step, "_neighbours")
    files, lines = saves_of(saves.output_dir, name), []
    if records.config.get("teacher"):
        lines.append(("teacher", scores_of_teacher(RunFolder(folder.path.with_name(f"{name}_teacher")))))
    if words := standing(records.config, folder.metrics.read(), made_with(run.device_words)):
        lines.append(("milestones", words))
    if picture.exists():
        lines.append(("picture", str(picture)))
    if beside.exists():
        lines.append(("copies?", f"{beside} (samples beside their nearest training images)"))
    if files:
        lines.append(("checkpoint", f"{saves.last} ({len(files)} saves, {megabytes(files)})"))
    if records.config["trackio"]["enabled"]:
        lines.append(("dashboard", f"{RUNNER}trackio show --project {records.config['trackio']['project']}"))
    place = "" if output_dir == "outputs" else f" output_dir={shlex.quote(output_dir)}"
    log = Path(run.notes.file)
    place += f" log.file={shlex.quote(str(log))}" if run.notes.expect and not in_working_folder(log) else ""
    place += f" mirror={shlex.quote(mirror)}" if (mirror := records.config.get("mirror")) else ""
    trust = trust_word(records.config)
    longer = "" if run.interrupted else f" {twice_as_long(records.config)}"
    from_python = not run.notes.command.startswith("python ")
    go_on = (
        f'fit("{longer.strip()}")'.replace('""', "")
        if from_python
        else f"{LAUNCH} run_name={name} resume=true{longer}{place}{trust}"
    )
    lines.append(("go on", go_on))
    if not run.interrupted and isinstance(run.state.objective, FlowObjective):
        lines.append(("sample", "sample(1000)" if from_python else f"{SAMPLE} ckpt={saves.last} n=1000{trust}"))
    return lines
