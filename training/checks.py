"""What is wrong with a configuration, said before anything is imported, made or overwritten. No torch here."""

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.experiment_log import ExperimentLog
from training.files import end_of

COPIES = 5  # of a row's state at once: noise, data, what is between, its velocity, and the network's input
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+\-]{0,199}")

Rule = tuple[str, Callable[[Any], bool], str]


def whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def optional(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def one_of(*words: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is word or (value == word and type(value) is type(word)) for word in words)


def two_shares(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) and 0 <= v < 1 for v in value)


def times_in_order(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(v == 0 or positive(v) for v in value)
        and value[0] <= value[1] <= 1
    )


def numbers_by_name(value: Any) -> bool:
    named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return named and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value.values())


RULES: list[Rule] = [
    ("epochs", whole(1), "a whole number of at least 1"),
    ("max_steps", optional(whole(1)), "a whole number of at least 1, or null"),
    ("devices", whole(1), "a whole number of at least 1"),
    ("batch_size", whole(1), "a whole number of at least 1"),
    ("gradient_accumulation_steps", whole(1), "a whole number of at least 1"),
    ("limit_data", optional(whole(1)), "a whole number of at least 1, or null"),
    ("num_workers", whole(0), "a whole number of at least 0"),
    ("optimizer.betas", two_shares, "two numbers of at least 0 and below 1"),
    ("trackio.project", lambda v: isinstance(v, str) and v != "", "a name"),
    ("seed", lambda v: whole(0)(v) and v < 2**63, "a whole number from 0 to 2^63 - 1"),
    ("device", one_of("auto", "cpu", "cuda", "mps"), "auto, cpu, cuda or mps"),
    ("precision", one_of("fp32", "bf16", "fp16"), "fp32, bf16 or fp16"),
    ("compile_mode", one_of("default", "reduce-overhead", "max-autotune"), "default, reduce-overhead or max-autotune"),
    ("grad_clip", optional(positive), "a number above 0, or null"),
    ("eval_every", whole(1), "a whole number of epochs, at least 1"),
    ("save_every", whole(1), "a whole number of epochs, at least 1"),
    ("log_every", whole(1), "a whole number of steps, at least 1"),
    ("on_nan", one_of("stop", "skip"), "stop or skip"),
    ("async_save", one_of("auto", "always", "never"), "auto, always or never"),
    ("on_save_error", one_of("stop", "continue"), "stop or continue"),
    ("keep_saves", whole(0), "a whole number, 0 for all"),
    ("patience", optional(whole(1)), "a whole number of at least 1, or null"),
    ("resume", one_of(True, False, "force"), "true, false or force"),
    ("output_dir", lambda v: isinstance(v, str) and v != "", "the path of a folder"),
    ("init_from", optional(lambda v: isinstance(v, str)), "the path of a checkpoint, or null"),
    ("eval_checkpoint", optional(lambda v: isinstance(v, str)), "the path of a checkpoint, or null"),
    ("show", one_of(True, False), "true or false"),
    ("monitor", lambda v: isinstance(v, str) and v != "", "the name of an evaluation metric such as eval/loss"),
    ("log.targets", numbers_by_name, "numbers by the names of metrics, such as {eval/accuracy: 0.98}"),
    ("optimizer.lr", positive, "a number above 0"),
    ("optimizer.weight_decay", lambda v: v == 0 or positive(v), "a number of at least 0"),
    ("ema.decay", lambda v: isinstance(v, (int, float)) and 0 <= v < 1, "a number from 0 up to, not including, 1"),
    ("evaluation.samples", whole(2), "a whole number of at least 2"),
    ("evaluation.final_samples", whole(2), "a whole number of at least 2"),
    ("loss.label_dropout", lambda v: isinstance(v, (int, float)) and 0 <= v <= 1, "a number from 0 to 1"),
    ("loss.time_sampler.ratio", lambda v: isinstance(v, (int, float)) and 0 <= v <= 1, "a number from 0 to 1"),
    ("loss.weighting.p", lambda v: isinstance(v, (int, float)) and 0 <= v <= 2, "a number from 0 to 2"),
    ("loss.weighting.c", positive, "a number above 0"),
    ("loss.time_sampler.std", positive, "a number above 0"),
    ("model.width", whole(1), "a whole number of at least 1"),
    ("model.depth", whole(1), "a whole number of at least 1"),
    ("model.dropout", lambda v: isinstance(v, (int, float)) and 0 <= v < 1, "a number from 0 up to, not including, 1"),
    ("dataloaders.epoch_size", optional(whole(1)), "a whole number of at least 1, or null for the data's own"),
    ("dataloaders.std", positive, "a number above 0"),
    ("dataloaders.noise", lambda v: v == 0 or positive(v), "a number of at least 0"),
    ("solver.steps", whole(1), "a whole number of at least 1"),
    ("guidance.scale", lambda v: v == 0 or positive(v), "a number of at least 0 (1 is no guidance)"),
    ("guidance.interval", times_in_order, "two times such as [0.2,0.9], rising from 0 (noise) to 1 (data)"),
]


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
    """UserError for the first value out of its range."""
    check_run_name(config["run_name"])
    for key, holds, words in RULES:
        if has(config, key) and not holds(lookup(config, key)):
            raise UserError(f"{key} takes {words}, not {lookup(config, key)!r}")
    for key, value in leaves(config):
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{key} takes a whole number below 2^63, not {value}")


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What a nested dict holds, by dotted keys."""
    if not isinstance(node, dict):
        yield key, node
        return
    for name, inner in node.items():
        yield from leaves(inner, f"{key}.{name}".strip("."))


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
    if has(config, "guidance._target_") and config["model"]["_target_"].startswith("models.classifier."):
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
    """UserError for a batch, or samples, that cannot fit: better a sentence now than the system killing the process.

    The estimate is low on purpose: COPIES fp32 states for each row, and no network, against all the memory there is.
    """
    shape = config["dataloaders"].get("state_shape") or [1]
    epoch = config["dataloaders"].get("epoch_size") or float("inf")
    rows = {
        "batch_size": min(config["batch_size"], epoch),
        "evaluation.samples": lookup(config, "evaluation.samples"),
        "evaluation.final_samples": lookup(config, "evaluation.final_samples"),
    }
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for key, count in rows.items():
        needed = 4 * COPIES * math.prod(shape) * count
        if needed > there:
            raise UserError(
                f"{key}={count} rows of shape {list(shape)} need at least {needed / 2**30:,.0f} GiB, and this machine "
                f"has {there / 2**30:,.0f}; use a smaller {key}"
                + (", with gradient_accumulation_steps to make up for it" if key == "batch_size" else "")
            )


def check_run_name(name: Any) -> None:
    """UserError for a run_name that cannot name files safely."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"run_name={str(name)[:60]!r} cannot name files; use letters, digits and . _ = + - only, "
            "beginning with a letter or digit, at most 200 characters"
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
    """UserError when the name is taken and nothing says what to do about it."""
    if config["resume"] or config["overwrite"] or config["eval_checkpoint"]:
        return
    name = config["run_name"]
    if (run_folder / "config.yaml").exists():
        raise UserError(
            f"run_name={name} exists already in {run_folder}; go on with it by resume=true, "
            "replace it (the old run is moved aside) by overwrite=true, or choose another name"
        )
    saves = Path(config["output_dir"]) / "ckpts"
    epoch_save = re.compile(re.escape(name) + r"_epoch_\d{4,}\.pt")
    archived = (path for path in saves.glob("*/archive/*.pt") if epoch_save.fullmatch(path.name))
    left = next((path for path in (*saves.glob(f"*/{name}_last.pt"), *archived)), None)
    if left is not None:
        raise UserError(
            f"run_name={name} has saves already, such as {left}, of a run whose folder is gone; "
            "move them aside by overwrite=true, or choose another name"
        )
