"""The run: assemble what the configuration names, train it, judge it, and leave it resumable. One file for 1..N devices.

Called by a backend with a resolved, checked configuration; `python launcher.py` is the way in, for torchrun too.
`torchrun ... train.py run_name=...` is `torchrun ... launcher.py run_name=...`.
"""

import itertools
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from common.device import own_turn
from common.distributed import explained_lost_ranks, rank
from common.errors import UserError, first_line
from common.files import DISK_ERRORS, disk_sentence
from common.signals import handled_by, stop_signals, when_asked_again
from configuration.stored import allow_for
from evaluation.eval_checkpoint import evaluate_checkpoint
from run_files.checks import check_run_is_new
from run_files.mirror import Mirror
from run_files.run_folder import run_folder_of, saves_of
from training.assemble import assemble
from training.loop import fit
from training.records import Records
from training.run import Run, Stop
from training.summary import print_end, print_start, print_times
from training.trial import RowSeconds, try_parts

MEMORY_WORDS = (  # in errors of a full memory, of torch, then of MLX
    "out of memory", "can't allocate memory", "unable to allocate", "attempting to allocate",
)  # fmt: skip


def carry_out(config: dict[str, Any]) -> float | None:
    """Train, or score a checkpoint. Returns the best monitored value, if any was found.

    UserError for what the user can correct. SystemExit 130, 143 or 129 after SIGINT, SIGTERM or SIGHUP, the run being saved.
    """
    allow_for(config)
    with explained_memory_errors():
        if config["eval_checkpoint"]:
            with explained_disk_errors(None):
                evaluate_checkpoint(config)
            return None
        folder = run_folder_of(config)
        if config["resume"] and rank() == 0:
            folder.lock.acquire()  # before its save is read: whoever still trains it would save a newer one
        try:
            run = assemble(config)
            run.records.folder = folder
            return start_or_resume(run)
        finally:
            folder.release()


def start_or_resume(run: Run) -> float | None:
    """Take the run's name, and train. Returns the best monitored value, if any was found."""
    with mirrored(run.records) as mirror:
        return trained(run, mirror)


def trained(run: Run, mirror: Mirror | None) -> float | None:
    """Do what start_or_resume says. mirror: copies the run to a store."""
    records, resume = run.records, run.records.config["resume"]
    if resume and mirror is not None:
        mirror.go_on()
    if resume and run.state.step >= run.total_steps:
        say_finished(run)
        return run.state.best
    turn = own_turn(run.shared_device, records.config["wait"])
    with turn, handled_by(partial(ask_to_stop, run)), explained_disk_errors(records):
        row = try_parts(run)
        if run.rank == 0 and not resume:
            claim_run_name(records, mirror)
        return run_training(run, row)


def claim_run_name(records: Records, mirror: Mirror | None) -> None:
    """Hold the folder of a new run; one that failed unsaved is moved aside. UserError when another process began it."""
    folder = records.folder
    folder.lock.acquire()
    check_run_is_new(records.config, folder.path)
    if folder.status.read().get("step"):
        records.config["overwrite"] = records.config["overwrite"] or "unsaved"
    if mirror is not None:
        mirror.claim(new_name(records) if records.config["overwrite"] is True else None)
    if records.config["overwrite"]:
        move_aside(records)
        folder.lock.acquire()
    else:
        folder.clear()


def say_finished(run: Run) -> None:
    """Say that nothing is left to do, and complete what a kill at the very end may have left out."""
    key, value = ("max_steps", run.settings.max_steps) if run.settings.max_steps else ("epochs", run.settings.epochs)
    print(f"{run.notes.run_name} has done its {run.state.step:,} steps; give a larger {key}= (it has {value}) to go on")
    with explained_disk_errors(run.records):
        run.records.remove_temporaries()
        status = run.records.folder.status.read()
        if status.get("state") != "finished":
            run.records.export(run.payload())
            run.last_values |= status.get("scores", {})
            run.write_status("finished")


def run_training(run: Run, row: RowSeconds) -> float:
    """Train to the end or a stop, the status file saying which throughout. Returns the best monitored value."""
    records, begun_at = run.records, run.state.step
    resumed_at = begun_at if records.config["resume"] else None
    records.begin(resumed_at)
    run.write_status("running")
    print_start(run)
    records.start_tracker(resumed_at)
    with closed_whatever_comes(run), explained_disk_errors(records), explained_lost_ranks():
        print_times(run, row)
        fit(run)
        if run.state.step != begun_at:
            records.check_saved(run.state.step)
    records.export(run.payload())
    run.write_status("interrupted" if run.interrupted else "finished", run.stop.why if run.stop else "")
    print_end(run)
    stop = run.stop or run.asked  # asked for after the last step
    if stop is not None and stop.signal:
        raise SystemExit(128 + stop.signal)
    return run.state.best


@contextmanager
def closed_whatever_comes(run: Run) -> Iterator[None]:
    """Close what watches a run at the end of the block; where that fails, the status file says so."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # the disk may be what failed
            run.records.settle()
        with suppress(OSError, UserError):  # or the folder is gone
            run.write_status("failed", first_line(error))
        raise
    finally:
        for callback in run.callbacks:
            callback.close()
        run.records.tracker.finish()


def ask_to_stop(run: Run, number: int, _: object) -> None:
    """Stop the loop after its step; a second signal ends the process at once, unless it is the first one again."""
    for either in stop_signals():
        signal.signal(either, when_asked_again())
    name = signal.Signals(number).name
    run.asked = run.asked or Stop(f"stopped by {name}", signal=number)
    alone = run.world == 1  # else torchrun sends SIGTERM also to those whose fellow has died
    if run.rank == 0 and (alone or number == signal.SIGINT):
        step = "this" if alone else "the next"
        print(f"\nstopping after {step} step and saving ({name} again leaves at once)", file=sys.stderr)


@contextmanager
def explained_disk_errors(records: Records | None) -> Iterator[None]:
    """Turn the errors of a full, read-only or broken disk into a UserError: where it is, and what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        remedy = "make room, and try again"
        if records is not None and records.folder.config_path.is_file():
            remedy = f"{records.last_save()}; make room, then go on with resume=true"
        raise UserError(f"{disk_sentence(error)}; {remedy}") from error


@contextmanager
def explained_memory_errors() -> Iterator[None]:
    """Turn the errors of a full memory into a UserError: which settings to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in MEMORY_WORDS):
            raise
        raise UserError(
            "out of memory; use a smaller model, a smaller batch_size with gradient_accumulation_steps to make up for it, "
            "precision=bf16, or fewer evaluation.samples"
        ) from error


def move_aside(records: Records) -> None:
    """Rename the files of an earlier run, so that overwrite=true loses nothing; releases its folder.

    The saves go first: a kill in between leaves a folder that asks for overwrite=true again, never saves without one.
    """
    folder, output_dir, new = records.folder, Path(records.config["output_dir"]), new_name(records)
    for path in saves_of(output_dir, folder.name):
        path.rename(path.with_name(path.name.replace(folder.name, new, 1)))
    if any(path.exists() for path in (folder.config_path, folder.status.path, folder.metrics.path)):
        folder.path.rename(folder.path.with_name(new))
    folder.release()


def new_name(records: Records) -> str:
    """Return the name under which an earlier run of this name is kept, which no other has."""
    folder, stamp = records.folder, time.strftime("%Y%m%d-%H%M%S")
    numbered = (f"{folder.name}.old-{stamp}" + (f".{n}" if n > 1 else "") for n in itertools.count(1))
    taken = {path.name for path in folder.path.parent.iterdir()}
    return next(new for new in numbered if new not in taken and not saves_of(Path(records.config["output_dir"]), new))


@contextmanager
def mirrored(records: Records) -> Iterator[Mirror | None]:
    """Have a run copied to its mirror= in the block, if it has one, the newest of it at the end whatever comes."""
    if rank() or not records.config["mirror"]:
        yield None
        return
    mirror = Mirror(records.config, records.folder, records.checkpoints)
    records.checkpoints.written = mirror.offer
    try:
        yield mirror
    finally:
        mirror.close()


if __name__ == "__main__":  # torchrun train.py is torchrun launcher.py
    runpy.run_path(str(Path(__file__).with_name("launcher.py")), run_name="__main__")
