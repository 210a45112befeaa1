"""What is wrong with a configuration, said before anything is imported, made or overwritten. No torch here."""

import math
import os
from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from configuration.values import check_all, check_run_name

COPIES = 5  # of a row's state at once: noise, data, what is between, its velocity, and the network's input


def lookup(config: dict[str, Any], key: str) -> Any:
    """Return the value at a dotted key. KeyError if there is none."""
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
    """Raise UserError for the first value that may not stand where it does."""
    check_run_name(config["run_name"])
    check_all(config)


def check_devices(config: dict[str, Any]) -> None:
    """Raise UserError for a batch that several devices cannot share evenly, or a kind of device that comes alone."""
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
    """Raise UserError for words of one command that cannot both hold; what a resumed run was once
    started with is no matter.
    """
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
        raise UserError("guidance=cfg requires a class-conditional model; add conditional=true, or leave guidance out")
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
    """Raise UserError for a batch, or samples, that cannot fit: better a sentence now than the system
    killing the process.
    """
    shape = config["dataloaders"].get("state_shape") or [1]
    epoch = config["dataloaders"].get("epoch_size") or float("inf")
    check_rows_fit("batch_size", min(config["batch_size"], epoch), shape)
    for key in ("evaluation.samples", "evaluation.final_samples"):
        check_rows_fit(key, lookup(config, key), shape)


def check_rows_fit(key: str, count: int, shape: Sequence[int]) -> None:
    """Raise UserError for so many rows that they cannot fit.

    The estimate is low on purpose: COPIES fp32 states for each row, and no network, against all the memory there is.
    """
    remedy = ", with gradient_accumulation_steps to make up for it" if key == "batch_size" else ""
    check_fits(
        f"{key}={count} rows of shape {list(shape)}", 4 * COPIES * math.prod(shape) * count, f"a smaller {key}{remedy}"
    )


def check_fits(what: str, needed: float, remedy: str) -> None:
    """Raise UserError when so many bytes are more than all the memory of this machine."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{what} need at least {needed / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}; use {remedy}"
        )
