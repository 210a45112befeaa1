"""The run: assemble what the configuration names, train it, judge it, and leave it resumable. One file for 1..N devices.

Called by a backend with a resolved, checked configuration; `python launcher.py` is the way in.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from evaluation.sample import evaluate_checkpoint
from training.assemble import assemble
from training.checkpoint import CheckpointFolder
from training.checks import check_run_is_new
from training.errors import UserError
from training.loop import fit
from training.run import Run, Stop
from training.summary import print_end, print_start

SIGNAL_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def carry_out(config: dict[str, Any]) -> float | None:
    """Train, or score a checkpoint. Returns the best monitored value, if any was found.

    UserError for what the user can mend. SystemExit 130 or 143 after SIGINT or SIGTERM, the run being saved.
    """
    with explained_memory_errors():
        if config["eval_checkpoint"]:
            evaluate_checkpoint(config)
            return None
        run = assemble(config)
        if config["resume"] and run.state.step >= run.total_steps:
            key = "max_steps" if config["max_steps"] else "epochs"
            print(
                f"{config['run_name']} has done its {run.state.step:,} steps already; give a larger {key}= "
                f"(it has {config[key]}) to go on"
            )
            run.folder.write_status("finished", run.state.step, run.epoch, run.elapsed())  # if it was killed at the very end
            return run.state.best
        run.folder.lock()
        if config["overwrite"]:
            move_aside(run)
            run.folder.lock()
        elif not config["resume"]:
            check_run_is_new(config, run.folder.path)  # again: another process may have begun it meanwhile
        run.folder.write_config(OmegaConf.to_yaml(OmegaConf.create(config)), config["overrides"])
        return conduct(run)


def conduct(run: Run) -> float:
    """One sitting: from the summary before to the closing block after, with the status file telling the truth throughout."""
    config = run.config
    resumed_at = run.state.step if config["resume"] else None
    if resumed_at is not None:
        run.folder.trim_metrics(resumed_at)
    run.write_status("running")
    print_start(run)
    run.tracker.start(config["run_name"], public(config), run.folder.path, resumed_at, overwrite=config["overwrite"])
    try:
        with stop_signals(run):
            fit(run)
    except BaseException as error:
        run.write_status("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    finally:
        for callback in run.callbacks:
            callback.close()
        run.tracker.finish()
        run.folder.release()
    interrupted = run.stop is not None and not run.stop.early
    run.write_status("interrupted" if interrupted else "finished", run.stop.why if run.stop else "")
    run.export_weights(run.state.ema_objective.network.state_dict())
    picture = run.folder.sample_picture(run.state.step)
    print_end(run, picture if picture.exists() else None)
    if interrupted and run.stop is not None:
        raise SystemExit(128 + run.stop.signal)
    return run.state.best


def public(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as the tracker shows it."""
    return {key: value for key, value in config.items() if key not in ("changed", "overrides")}


@contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one ends the process at once."""

    def ask(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        run.stop = run.stop or Stop(f"stopped by {signal.Signals(number).name}", signal=number)
        print(
            f"\nstopping after this step and saving ({signal.Signals(number).name} again leaves at once)",
            file=sys.stderr,
        )

    before = {number: signal.signal(number, ask) for number in SIGNAL_STATUS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    """Rename the files of an earlier run of this name, so that overwrite=true loses nothing."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    new_name = f"{run.config['run_name']}.old-{stamp}"
    if run.folder.config_path.exists():
        run.folder.path.rename(run.folder.path.with_name(new_name))
        run.folder.release()
    for arch in (run.checkpoints.folder.parent).glob("*"):
        checkpoints = CheckpointFolder(Path(run.config["output_dir"]), arch.name, run.config["run_name"], keep=0)
        for path in checkpoints.all_files():
            path.rename(path.with_name(path.name.replace(run.config["run_name"], new_name, 1)))
