"""What a run needs of the disk: its files, folders it may write to, and a name that is free."""

import os
import tempfile
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import end_of
from common.stores import check_file, check_reachable, is_address
from configuration.checks import begins_at_teacher
from configuration.nodes import lookup
from run_files.experiment_log import ExperimentLog
from run_files.run_folder import RunFolder, saves_of

FILES = {
    **dict.fromkeys(("init_from", "eval_checkpoint"), "the path of a checkpoint such as outputs/ckpts/mlp/last.pt"),
    "loss.coupling.teacher": "the checkpoint of a trained flow",
    "loss.teacher": "exact, or the checkpoint of a trained flow",
    "guidance.checkpoint": "the path of a weaker model's checkpoint",
}


def check_files(config: dict[str, Any]) -> None:
    """Raise UserError for a file that should be there, or an output folder that cannot be written."""
    unneeded = {"init_from"} if config["resume"] else {"loss.coupling.teacher"} if config.get("teacher") else set()
    unneeded |= {"init_from"} if begins_at_teacher(config) else set()
    for key, wanted in FILES.items():
        path = None if key in unneeded else lookup(config, key)
        if is_address(path):
            check_file(str(path))
        elif path is not None and (key, path) != ("loss.teacher", "exact") and not Path(path).is_file():
            raise UserError(f"{key}={path} is not a file; give {wanted}")
    if config["mirror"] and not config["eval_checkpoint"]:
        check_reachable(config["mirror"])
    saves = f"ckpts/{config['choices']['model']}"
    for below in ("",) if config["eval_checkpoint"] else ("", saves, f"{saves}/archive"):
        check_writable("output_dir", Path(config["output_dir"]), below)
    if config["log"]["expect"]:
        log = ExperimentLog(Path(config["log"]["file"]))
        log.read()
        check_writable("log.file", end_of(log.path).parent)


def check_writable(key: str, folder: Path, below: str = "") -> None:
    """Raise UserError unless the folder `below` in `folder` is there, or can be made, and can be written to."""
    place = (folder / below).absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    if not existing.is_dir() or not takes_folders(existing):
        raise UserError(f"{key}={folder} cannot be written: {existing} is not a folder this user may write to; give another")


def check_folder(key: str, folder: Path) -> None:
    """Raise UserError for the path of a file where files go under their own names, or a folder that cannot be written."""
    if folder.suffix in (".png", ".gif", ".mp4") or folder.is_file():
        raise UserError(f"{key} takes a folder, which the files go to under their own names, not {str(folder)!r}")
    check_writable(key, folder)


def takes_folders(folder: Path) -> bool:
    """Return whether a folder can be made in `folder`. Tried where the file system has no room of its own, as /proc."""
    if os.statvfs(folder).f_blocks:
        return os.access(folder, os.W_OK | os.X_OK)
    try:
        Path(tempfile.mkdtemp(prefix=".tried-", dir=folder)).rmdir()
    except OSError:
        return False
    return True


def check_run_is_new(config: dict[str, Any], run_folder: Path) -> None:
    """Raise UserError when the name is taken and nothing says what to do about it, or is another run's but for the case."""
    name, there = config["run_name"], [path.name for path in run_folder.parent.glob("*")]
    alike = [] if name in there else [other for other in there if other.lower() == name.lower()]
    why: str | None
    if alike:
        where = f"the run {alike[0]} in {run_folder.parent}"
        why = f"differs from {where} only in capitals, which not every disk tells apart; write {alike[0]}"
    else:
        decided = config["resume"] or config["overwrite"] is True or config["eval_checkpoint"]
        why = None if decided else taken(config, RunFolder(run_folder))
    if why:
        raise UserError(f"run_name={name} {why}, or choose another name")


def taken(config: dict[str, Any], folder: RunFolder) -> str | None:
    """Return what of an earlier run a new one would overwrite, and what to do about it; None for nothing."""
    left, status = saves_of(Path(config["output_dir"]), folder.name), folder.status.read()
    failed, interrupted = (status.get("state") == state for state in ("failed", "interrupted"))
    unbegun = failed or (interrupted and status.get("step") == 0) or config["overwrite"] == "unsaved"
    if folder.config_path.exists() and (left or not unbegun):
        replace = "replace it (the old run is moved aside) by overwrite=true"
        return f"exists already in {folder.path}; go on with it by resume=true, {replace}"
    if left:
        return f"has saves already, such as {left[0]}, of a run whose folder is gone; move them aside by overwrite=true"
    return None
