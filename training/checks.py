"""What is wrong with a configuration, said before anything is imported, made or overwritten. No torch here."""

import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.experiment_log import ExperimentLog
from training.files import end_of
from training.run_folder import RunFolder
from training.values import check_all, check_run_name

COPIES = 5  # of a row's state at once: noise, data, what is between, its velocity, and the network's input


def lookup(config: dict[str, Any], key: str) -> Any:
    """The value at a dotted key. KeyError if there is none."""
    node: Any = config
    for part in key.split("."):
        node = node[part]
    return node


def has(config: dict[str, Any], key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def check_values(config: dict[str, Any]) -> None:
    """UserError for the first value that may not stand where it does."""
    check_run_name(config["run_name"])
    check_all(config)


def check_devices(config: dict[str, Any]) -> None:
    """UserError for a batch that several devices cannot share evenly, or a kind of device that comes alone."""
    devices, rows = config["devices"], config["batch_size"]
    if rows % devices:
        fitting = max(devices, rows - rows % devices)
        raise UserError(
            f"batch_size={rows} rows cannot be shared evenly by devices={devices}; use batch_size={fitting}, "
            "or another number of devices"
        )
    if devices > 1 and config["device"] == "mps":
        raise UserError(f"devices={devices} needs CUDA devices or the CPU, and a machine has one MPS device; use device=cpu")


def check_contradictions(config: dict[str, Any]) -> None:
    """UserError for words of one command that cannot both hold; what a resumed run was once started with is no matter."""
    if config["resume"] and config["overwrite"]:
        raise UserError("resume and overwrite contradict each other; give one of them")
    if config["resume"] and config["init_from"]:
        raise UserError("resume and init_from contradict each other: a resumed run has its own weights; give one of them")
    if has(config, "dataloaders.augment") and lookup(config, "dataloaders.augment") and not has(config, "model.augment_dim"):
        raise UserError(
            "dataloaders.augment turns and stretches pictures, and this model cannot be told of it and would draw them so; "
            "use model=unet or model=unet_small, or dataloaders.augment=0"
        )

    if config["resume"] or config["eval_checkpoint"]:
        return
    classifies = config["model"]["_target_"].startswith("models.classifier.")
    if config["dataloaders"].get("standardize") and (classifies or has(config, "loss.coupling.teacher")):
        what = "a classifier" if classifies else "loss/coupling=reflow, whose pairs its teacher makes,"
        raise UserError(
            f"dataloaders.standardize is undone in samples, and {what} does not learn from standardised data; leave it out"
        )
    if has(config, "guidance._target_") and classifies:
        raise UserError("guidance steers samples, and a classifier makes none; leave guidance out")
    if has(config, "guidance._target_") and "ClassifierFree" in config["guidance"]["_target_"] and not config["conditional"]:
        raise UserError("guidance=cfg needs a model that is told the class; add conditional=true, or leave guidance out")
    walks_map = config["solver"]["_target_"].endswith(".FlowMapSolver")
    if walks_map and not config["loss"]["training"].get("learns_flow_map", True):
        raise UserError(
            f"solver=flow_map walks a learned flow map, and loss={config['choices']['loss']} teaches only the velocity at "
            "an instant; use solver=midpoint, or train with loss=meanflow"
        )
    shape, source = config["dataloaders"].get("state_shape"), config["source"]
    if has(source, "dataset.state_shape") and shape is not None and list(source["dataset"]["state_shape"]) != list(shape):
        raise UserError(
            f"source={config['choices']['source']} has states of shape {list(source['dataset']['state_shape'])}, "
            f"but the data has {list(shape)}; use source=gaussian, which takes the data's shape"
        )


def check_memory(config: dict[str, Any]) -> None:
    """UserError for a batch, or samples, that cannot fit: better a sentence now than the system killing the process."""
    shape = config["dataloaders"].get("state_shape") or [1]
    epoch = config["dataloaders"].get("epoch_size") or float("inf")
    check_rows_fit("batch_size", min(config["batch_size"], epoch), shape)
    for key in ("evaluation.samples", "evaluation.final_samples"):
        check_rows_fit(key, lookup(config, key), shape)


def check_rows_fit(key: str, count: int, shape: Sequence[int]) -> None:
    """UserError for so many rows that they cannot fit.

    The estimate is low on purpose: COPIES fp32 states for each row, and no network, against all the memory there is.
    """
    remedy = ", with gradient_accumulation_steps to make up for it" if key == "batch_size" else ""
    check_fits(
        f"{key}={count} rows of shape {list(shape)}", 4 * COPIES * math.prod(shape) * count, f"a smaller {key}{remedy}"
    )


def check_fits(what: str, needed: float, remedy: str) -> None:
    """UserError when so many bytes are more than all the memory of this machine."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{what} need at least {needed / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}; use {remedy}"
        )


def check_files(config: dict[str, Any]) -> None:
    """UserError for a file that should be there, or an output folder that cannot be written."""
    for key in ("init_from", "eval_checkpoint"):
        path = None if key == "init_from" and config["resume"] else config[key]
        if path is not None and not Path(path).is_file():
            raise UserError(f"{key}={path} is not a file; give the path of a checkpoint such as outputs/ckpts/mlp/last.pt")
    teacher = lookup(config, "loss.coupling.teacher") if has(config, "loss.coupling.teacher") else None
    if teacher is not None and not Path(teacher).is_file():
        raise UserError(f"loss.coupling.teacher={teacher} is not a file; give the checkpoint of a trained flow")
    guide = lookup(config, "guidance.checkpoint") if has(config, "guidance.checkpoint") else None
    if guide is not None and not Path(guide).is_file():
        raise UserError(f"guidance.checkpoint={guide} is not a file; give the path of a weaker model's checkpoint")
    check_writable("output_dir", Path(config["output_dir"]))
    if config["log"]["expect"]:
        log = ExperimentLog(Path(config["log"]["file"]))
        log.read()
        check_writable("log.file", end_of(log.path).parent)


def check_writable(key: str, folder: Path) -> None:
    """UserError unless `folder` is there, or can be made, and can be written to."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not takes_folders(existing):
        raise UserError(
            f"{key}={folder} cannot be written: {existing} is not a folder this user may write to; give another {key}"
        )


def takes_folders(folder: Path) -> bool:
    """Whether a folder can be made in `folder`. It is tried where the file system has no room of its own, as /proc."""
    if os.statvfs(folder).f_blocks:
        return os.access(folder, os.W_OK | os.X_OK)
    try:
        Path(tempfile.mkdtemp(prefix=".tried-", dir=folder)).rmdir()
    except OSError:
        return False
    return True


def check_run_is_new(config: dict[str, Any], run_folder: Path) -> None:
    """UserError when the name is taken and nothing says what to do about it, or is another run's but for the case."""
    name, there = config["run_name"], [path.name for path in run_folder.parent.glob("*")]
    alike = next((other for other in there if other.lower() == name.lower()), name)
    if name not in there and alike != name:
        raise UserError(
            f"run_name={name} differs from the run {alike} in {run_folder.parent} only in capitals, which not every disk "
            f"tells apart; write {alike}, or choose another name"
        )
    if config["resume"] or config["overwrite"] or config["eval_checkpoint"]:
        return
    left = first_save(config)
    if (run_folder / "config.yaml").exists() and (left or not ended_unbegun(RunFolder(run_folder))):
        raise UserError(
            f"run_name={name} exists already in {run_folder}; go on with it by resume=true, "
            "replace it (the old run is moved aside) by overwrite=true, or choose another name"
        )
    if left is not None:
        raise UserError(
            f"run_name={name} has saves already, such as {left}, of a run whose folder is gone; "
            "move them aside by overwrite=true, or choose another name"
        )


def first_save(config: dict[str, Any]) -> Path | None:
    """A save of a run of this name, or None."""
    name, saves = config["run_name"], Path(config["output_dir"]) / "ckpts"
    epoch_save = re.compile(re.escape(name) + r"_epoch_\d{4,}\.pt")
    archived = (path for path in saves.glob("*/archive/*.pt") if epoch_save.fullmatch(path.name))
    return next((path for path in (*saves.glob(f"*/{name}_last.pt"), *archived)), None)


def ended_unbegun(folder: RunFolder) -> bool:
    """Whether the run there came to its end before its first step."""
    status = folder.read_status()
    return status.get("state") in ("failed", "interrupted") and status.get("step") == 0
