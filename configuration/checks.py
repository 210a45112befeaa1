"""What is wrong with a configuration, said before anything is imported, made or overwritten. No torch here."""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from common.errors import UserError
from common.own_objects import is_own
from configuration.nodes import lookup
from configuration.values import check_all, check_run_name

COPIES = 5  # of a row's state at once: noise, data, what is between, its velocity, and the network's input


def check_values(config: dict[str, Any]) -> None:
    """Raise UserError for the first value that may not stand where it does."""
    check_run_name(config["run_name"])
    check_all(config)


def begins_at_teacher(config: dict[str, Any]) -> bool:
    """Return whether init_from is the run that teacher= trains first: its name, or the save that it will leave."""
    start, name = config["init_from"], f"{config['run_name']}_teacher"
    return bool(start and config.get("teacher")) and start.rpartition("/")[2] in (name, f"{name}_last.pt")


def check_devices(config: dict[str, Any]) -> None:
    """Raise UserError for a batch that several devices cannot share evenly, or a kind of device that comes alone."""
    devices, rows = config["devices"], config["batch_size"]
    if rows % devices:
        use = f"use batch_size={max(devices, rows - rows % devices)}, or another number of devices"
        raise UserError(f"batch_size={rows} rows cannot be shared evenly by devices={devices}; {use}")
    if devices > 1 and config["device"] == "mps":
        raise UserError(f"devices={devices} needs CUDA devices or the CPU, and a machine has one MPS device; use device=cpu")


def check_contradictions(config: dict[str, Any]) -> None:
    """Raise UserError for settings that cannot both hold; of a resumed run only its own command counts."""
    new = not (config["resume"] or config["eval_checkpoint"])
    for holds, sentence in [*of_any_run(config), *(of_new_runs(config) if new else ())]:
        if holds:
            raise UserError(sentence)


def of_any_run(config: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield each contradiction that any command may have: whether it has it, and the sentence."""
    yield bool(config["resume"] and config["overwrite"]), "resume and overwrite contradict each other; give one of them"
    yield (
        bool(config["resume"] and config["init_from"] and not begins_at_teacher(config)),
        "resume and init_from contradict each other: a resumed run has its own weights; give one of them",
    )
    own = [key for key, node in config.items() if is_own(node)]
    alone = config["devices"] == 1 and config["choices"]["backend"] == "local" and not config["teacher"]
    yield (
        bool(own and not alone),
        "objects given from Python are in this process alone; leave out devices=, backend= and teacher=, or write files of "
        "configs/ for them (docs/architecture.md says how)",
    )
    yield (
        bool(lookup(config, "dataloaders.augment")) and lookup(config, "model.augment_dim") is None,
        "dataloaders.augment turns and stretches pictures, and this model has no input that says so and would draw them "
        "turned; use model=unet or model=unet_small, or dataloaders.augment=0",
    )


def of_new_runs(config: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield each contradiction of the parts of a new run: whether it has it, and the sentence."""
    choices, guidance = config["choices"], lookup(config, "guidance._target_")
    classifies = config["model"]["_target_"].startswith("models.classifier.") or choices["loss"] == "cross_entropy"
    what = "a classifier" if classifies else "loss/coupling=reflow, whose pairs its teacher makes,"
    yield (
        bool(config["dataloaders"].get("standardize") and (classifies or lookup(config, "loss.coupling.teacher"))),
        f"dataloaders.standardize is undone in samples, and {what} does not learn from standardised data; leave it out",
    )
    yield bool(guidance and classifies), "guidance steers samples, and a classifier makes none; leave guidance out"
    yield (
        any(kind in str(guidance) for kind in ("ClassifierFree", "ZeroStar")) and not config["conditional"],
        "guidance=cfg requires a class-conditional model; add conditional=true, or leave guidance out",
    )
    walks_map, training = config["solver"]["_target_"].endswith(".FlowMapSolver"), config["loss"]["training"]
    yield (
        walks_map and (training.get("learns") == "velocity" or not training.get("learns_flow_map", True)),
        f"solver=flow_map walks a learned flow map, and loss={choices['loss']} teaches only the velocity at an instant; use "
        "solver=midpoint, or train with loss=meanflow",
    )
    shape, of_source = config["dataloaders"].get("state_shape"), lookup(config, "source.dataset.state_shape")
    yield (
        None not in (shape, of_source) and list(of_source) != list(shape),
        f"source={choices['source']} has states of shape {of_source}, but the data has {shape}; use source=gaussian, which "
        "takes the data's shape",
    )


def check_memory(config: dict[str, Any]) -> None:
    """Raise UserError for a batch, or samples, that cannot fit, before the system kills the process."""
    shape = config["dataloaders"].get("state_shape") or [1]
    epoch = config["dataloaders"].get("epoch_size") or float("inf")
    check_rows_fit("batch_size", min(config["batch_size"], epoch), shape)
    for key in ("evaluation.samples", "evaluation.final_samples"):
        check_rows_fit(key, lookup(config, key), shape)


def check_rows_fit(key: str, count: int, shape: Sequence[int]) -> None:
    """Raise UserError for rows that cannot fit: by a low estimate, COPIES fp32 states for each, and no network."""
    remedy = f"a smaller {key}" + ", with gradient_accumulation_steps to make up for it" * (key == "batch_size")
    check_fits(f"{key}={count} rows of shape {list(shape)}", 4 * COPIES * math.prod(shape) * count, remedy)


def check_fits(what: str, needed: float, remedy: str) -> None:
    """Raise UserError when so many bytes are more than all the memory of this machine."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(f"{what} need at least {needed / 2**30:,.0f} GiB, and there are {there / 2**30:,.0f}; use {remedy}")
