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
from pathlib import Path
from typing import Any

from common.device import wait_for_device
from common.distributed import explained_lost_ranks, rank
from common.errors import UserError
from common.files import DISK_ERRORS, disk_sentence
from configuration.stored import allow_for
from evaluation.sample import evaluate_checkpoint
from run_files.checkpoint import saves_of
from run_files.checks import check_run_is_new
from run_files.run_folder import RunFolder, SilentRunFolder, run_folder_of
from training.assemble import assemble
from training.loop import fit
from training.run import Run, Stop
from training.summary import print_end, print_start, print_times

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def carry_out(config: dict[str, Any]) -> float | None:
    """Train, or score a checkpoint. Returns the best monitored value, if any was found.

    UserError for what the user can mend. SystemExit 130, 143 or 129 after SIGINT, SIGTERM or SIGHUP, the run being saved.
    """
    allow_for(config)
    with explained_memory_errors():
        if config["eval_checkpoint"]:
            with explained_disk_errors(None):
                evaluate_checkpoint(config)
            return None
        folder = open_run_folder(config)
        if config["resume"]:
            folder.lock.acquire()  # before its save is read: whoever still trains it would save a newer one
        try:
            run = assemble(config)
            run.folder = folder
            return start_or_resume(run)
        finally:
            folder.release()


def open_run_folder(config: dict[str, Any]) -> RunFolder:
    """Return the run's folder; only the first process writes there."""
    folder = run_folder_of(config)
    return folder if rank() == 0 else SilentRunFolder(folder.path)


def start_or_resume(run: Run) -> float | None:
    """Take the run's name, and train. Returns the best monitored value, if any was found."""
    config = run.config
    if config["resume"] and run.state.step >= run.total_steps:
        say_finished(run)
        return run.state.best
    wait_for_device(run.device, config["wait"])
    with stop_signals(run), explained_disk_errors(run):
        if run.rank == 0 and not config["resume"]:
            claim_run_name(run)
        return run_training(run)


def claim_run_name(run: Run) -> None:
    """Hold the folder of a new run. UserError when another process has begun it meanwhile."""
    run.folder.lock.acquire()
    if run.config["overwrite"]:
        move_aside(run)
        run.folder.lock.acquire()
    else:
        check_run_is_new(run.config, run.folder.path)
        run.folder.clear()


def say_finished(run: Run) -> None:
    """Say that nothing is left to do, and complete what a kill at the very end may have left out."""
    config = run.config
    key = "max_steps" if config["max_steps"] else "epochs"
    print(
        f"{config['run_name']} has done its {run.state.step:,} steps already; give a larger {key}= "
        f"(it has {config[key]}) to go on"
    )
    with explained_disk_errors(run):
        remove_temporaries(run)
        if run.folder.status.read().get("state") != "finished":
            run.export_weights(run.state.ema_objective.network.state_dict())
            run.folder.status.write("finished", run.state.step, run.epoch, run.elapsed())


def remove_temporaries(run: Run) -> None:
    """Half-written files of processes of this run that were killed; its lock is held."""
    run.folder.remove_temporaries()
    run.checkpoints.remove_temporaries()


def run_training(run: Run) -> float:
    """Return one sitting: from the summary before to the closing block after, with the status file telling the truth
    throughout.
    """
    config = run.config
    remove_temporaries(run)
    run.write_config()
    begun_at = run.state.step
    resumed_at = begun_at if config["resume"] else None
    if resumed_at is not None:
        run.folder.metrics.trim(resumed_at)
    run.write_status("running")
    print_start(run)
    run.tracker.start(config["run_name"], public(config), run.folder.path, resumed_at, overwrite=config["overwrite"])
    try:
        with explained_disk_errors(run), explained_lost_ranks():
            print_times(run)
            fit(run)
            check_saved(run, begun_at)
    except BaseException as error:
        with suppress(OSError):  # the disk may be what failed
            run.settle()
        with suppress(OSError, UserError):  # or the folder is gone
            run.write_status("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    finally:
        for callback in run.callbacks:
            callback.close()
        run.tracker.finish()
    run.export_weights(run.state.ema_objective.network.state_dict())
    run.write_status("interrupted" if run.interrupted else "finished", run.stop.why if run.stop else "")
    picture = run.folder.sample_picture(run.state.step)
    print_end(run, picture if picture.exists() else None)
    stop = run.stop or run.asked  # asked for after the last step
    if stop is not None and stop.signal:
        raise SystemExit(128 + stop.signal)
    return run.state.best


def check_saved(run: Run, begun_at: int) -> None:
    """Raise UserError when on_save_error=continue has trained from step `begun_at` to an end that no save holds."""
    run.settle()
    if run.state.step != begun_at and run.checkpoints.saved_step != run.state.step:
        raise UserError(
            f"{run.refusal}; step {run.state.step} is in no save, {run.last_save()}; make room, then go on with resume=true"
        )


def public(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration as the tracker shows it."""
    return {key: value for key, value in config.items() if key not in ("changed", "overrides")}


@contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP ask the loop to stop after its step; a second one ends the process at once.

    A SIGHUP that is ignored, as under nohup, stays so.
    """
    heeded = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]

    def ask(number: int, _: object) -> None:
        for either in heeded:
            signal.signal(either, signal.SIG_DFL)
        run.asked = run.asked or Stop(f"stopped by {signal.Signals(number).name}", signal=number)
        alone = run.world == 1  # else torchrun sends SIGTERM also to those whose fellow has died
        if run.rank == 0 and (alone or number == signal.SIGINT):
            print(
                f"\nstopping after this step and saving ({signal.Signals(number).name} again leaves at once)",
                file=sys.stderr,
            )

    before = {number: signal.signal(number, ask) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def explained_disk_errors(run: Run | None) -> Iterator[None]:
    """A full, read-only or broken disk is the user's to mend: say where it is, and what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        begun = run is not None and run.folder.config_path.is_file()
        what = f"{run.last_save()}; make room, then go on with resume=true" if run and begun else "make room, and try again"
        raise UserError(f"{disk_sentence(error)}; {what}") from error


@contextmanager
def explained_memory_errors() -> Iterator[None]:
    """Out of memory is the user's to mend: say what to turn."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error).lower()
        if isinstance(error, RuntimeError) and "out of memory" not in words and "can't allocate memory" not in words:
            raise
        raise UserError(
            "out of memory; use a smaller model, a smaller batch_size with gradient_accumulation_steps to make up for it, "
            "precision=bf16, or fewer evaluation.samples"
        ) from error


def move_aside(run: Run) -> None:
    """Rename the files of an earlier run of this name, so that overwrite=true loses nothing; lets go of its folder.

    The saves go first: a kill in between leaves a folder that asks for overwrite=true again, never saves without one.
    """
    name, output_dir = run.config["run_name"], Path(run.config["output_dir"])
    stamp = time.strftime("%Y%m%d-%H%M%S")
    numbered = (f"{name}.old-{stamp}" + (f".{n}" if n > 1 else "") for n in itertools.count(1))
    taken = {path.name for path in run.folder.path.parent.iterdir()}
    new_name = next(new for new in numbered if new not in taken and not saves_of(output_dir, new))
    for path in saves_of(output_dir, name):
        path.rename(path.with_name(path.name.replace(name, new_name, 1)))
    if run.folder.config_path.exists():
        run.folder.path.rename(run.folder.path.with_name(new_name))
    run.folder.release()


if __name__ == "__main__":  # torchrun train.py is torchrun launcher.py
    runpy.run_path(str(Path(__file__).with_name("launcher.py")), run_name="__main__")
