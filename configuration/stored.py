"""What a configuration may have built and called, wherever it comes from: a command, a run's folder, a checkpoint.

No torch here: the launcher's checks use it.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.own_objects import TARGET, is_own
from common.stores import is_address, local_copy
from configuration.build import found_class
from configuration.compose import parse_overrides
from configuration.nodes import CONFIG_DIR, flat, interpolation_in, named_in_configs, nodes_in, rebuilt, targets_in
from configuration.signatures import derives

NEEDED_PARTS = ("model", "loss", "dataloaders", "source", "solver", "evaluation", "choices")
BUILT_PARTS = (*NEEDED_PARTS, "guidance", "vae")
FILE_KEYS = ("path", "root", "held_out_root", "teacher", "checkpoint", "network")  # of settings that may name files
CHOICE = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")  # the model's names a folder of saves
AS_TYPED = ("command", "overrides", "changed", "log")  # of a configuration: what the user typed, never built from

# Where the modules of stored `_target_`s are today.
MOVED = {
    "training.trackers.": "run_files.trackers.",
    "training.trackio_tracker.": "run_files.trackio_tracker.",
    "helpers_cfg.MeanFlowGuidance": "losses.meanflow_guidance.MeanFlowGuidance",
}

# What the part under a key must be; ".*" stands for each of its entries.
BASES = {
    "model": "models.network.Network",
    "loss": "losses.objective.Objective",
    "loss.path": "losses.paths.ProbabilityPath",
    "loss.coupling": "losses.couplings.Coupling",
    "loss.time_sampler": "losses.time_samplers.TimeSampler",
    "loss.weighting": "losses.weightings.Weighting",
    "loss.alpha": "losses.alpha_schedules.AlphaSchedule",
    "loss.prediction": "losses.predictions.Prediction",
    "dataloaders": "dataloaders.base_dataloaders.FlowDataset",
    "source": "dataloaders.sources.Source",
    "solver": "solvers.base_solver.Sampler",
    "solver.grid": "solvers.time_grids.TimeGrid",
    "solver.diffusion": "solvers.sde.Diffusion",
    "guidance": "helpers_cfg.Guidance",
    "vae": "torch.nn.Module",
    "optimizer": "torch.optim.Optimizer",
    "schedule": "training.schedules.Schedule",
    "evaluation": "evaluation.evaluator.Evaluator",
    "evaluation.metrics.*": "evaluation.metrics.base_metric.Metric",
    "callbacks.*": "training.run.Callback",
    "trackio": "run_files.trackers.Tracker",
    "backend": "backends.base_backend.Backend",
}

# What people call the part under a key, where that is not the key's own last word.
KINDS = {
    "loss": "loss (objective)", "loss.path": "probability path", "loss.time_sampler": "time sampler",
    "loss.alpha": "schedule of alpha", "dataloaders": "data set", "source": "source of noise", "solver.grid": "time grid",
    "vae": "autoencoder", "evaluation": "evaluation", "evaluation.metrics.*": "metric", "callbacks.*": "callback",
    "trackio": "tracker",
}  # fmt: skip

# Classes and whole modules that the command being carried out allows, beside what configs/ names, and addresses it says.
allowed: list[str] = []
addresses: list[str] = []


def allow_for(config: dict[str, Any]) -> None:
    """Let stored configurations name what this command, composed to `config`, types as a `_target_` or trusts."""
    allow(config["trust"])
    addresses.clear()
    for override in parse_overrides(config["overrides"]):
        value = None if override.is_delete() else override.value()
        typed = {override.key_or_group.rpartition(".")[2]: value}
        allowed.extend(targets_in(typed))
        addresses.extend(filter(is_address, nodes_in(typed)))


def allow(trust: str | list[str] | None) -> None:
    """Let stored configurations name what trust= names, a list or `a,b`, and nothing that an earlier command trusted."""
    allowed[:] = re.findall(r"[^\s,\[\]'\"]+", trust) if isinstance(trust, str) else trust or []


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with what older versions named otherwise under its name of today."""
    return rebuilt(config, upgraded_node) if is_plain(config) else config


def upgraded_node(node: dict[str, Any]) -> dict[str, Any]:
    target = str(node.get("_target_", ""))
    old = next((prefix for prefix in MOVED if target.startswith(prefix)), None)
    if old is not None:
        node["_target_"] = MOVED[old] + target.removeprefix(old)
    pairs = {"make_pairs": {"_target_": "evaluation.reflow.TeacherPairs"}}
    return pairs | node if target == "losses.couplings.ReflowCoupling" else node


def strange_targets(config: dict[str, Any], parts: Any) -> list[tuple[str, str]]:
    """Return each `_target_` under one of the keys `parts` that no file in configs/ names, after its key."""
    known = {*named_in_configs("_target_"), TARGET}
    return [(part, target) for part in parts for target in targets_in(config.get(part)) if target not in known]


def modules_word(targets: list[tuple[str, str]], beside: Iterable[str] = ()) -> str:
    """Return the word that trusts the modules of targets, beside others."""
    modules = dict.fromkeys([*beside, *(target.rpartition(".")[0] or target for _, target in targets)])
    return f"trust={','.join(modules)[:200]}"


def trust_word(config: dict[str, Any]) -> str:
    """Return, after a space, the word by which a command may take up a stored configuration; "" where it needs none."""
    found = strange_targets(config, set(config) - {*AS_TYPED})
    return f" {modules_word(found)}" if found else ""


def check_targets(config: dict[str, Any], where: Path, parts: Any) -> None:
    """Raise UserError for a stored `_target_` under one of the keys `parts` that neither configs/ nor this command names."""
    found = [
        (part, target)
        for part, target in strange_targets(config, parts)
        if not any(f"{target}.".startswith(f"{name}.") for name in allowed)
    ]
    if found:
        part, target = found[0]
        raise UserError(
            f"{where} wants {target[:80]} called as its {part}, which no file in configs/ names; add "
            f"{modules_word(found, allowed)} if you trust what is named there, or use another file"
        )


def check_plain(config: dict[str, Any], where: Path) -> None:
    """Raise UserError for a stored configuration with parts missing or of another kind, or with an interpolation."""
    unresolved = interpolation_in({key: value for key, value in config.items() if key not in AS_TYPED})
    if is_plain(config) and unresolved is not None:
        raise UserError(f"{where} has {unresolved[:80]!r} as a setting, where runs store values only; use a file you trust")
    if not is_plain(config) or not is_whole(config):
        raise UserError(f"{where} holds no whole configuration, so its model cannot be built; use another save")


def stored_config(path: Path, payload: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration in a checkpoint, which may be anyone's: it builds what is allowed, and fetches nothing.

    UserError for one with parts missing or of another kind, an interpolation, or a `_target_` that is not allowed.
    """
    config = upgraded(payload["config"])
    if is_plain(config):
        check_targets(config, path, BUILT_PARTS)
    check_plain(config, path)
    return with_files_found(without_addresses(without_downloads(config)), places_of(path, config))


def check_new_parts(config: dict[str, Any]) -> None:
    """Raise UserError for a part of a class that is not there, or not of its group; imports only what sources do not say."""
    for key, base in BASES.items():
        for name, node in nodes_at(config, key):
            target = node.get("_target_") if isinstance(node, dict) else None
            if target is None or is_own(node) or derives(str(target), base):
                continue
            asked, wanted = found_class(name, str(target)), found_class(name, base)
            if not issubclass(asked, wanted):
                kind = KINDS.get(key, key.rpartition(".")[2])
                example = next(one for one in sorted(targets_of(key)) if derives(one, base))
                raise UserError(f"{name}._target_={target} is no class of a {kind}; give one that is a {base}, as {example}")


def nodes_at(config: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    """Return (key, node) of what a configuration has under a dotted key of BASES; none where it has nothing."""
    found: list[tuple[str, Any]] = [("", config)]
    for part in key.split("."):
        inner = [(name, node) for name, node in found if isinstance(node, dict)]
        found = [(f"{name}.{k}".strip("."), node[k]) for name, node in inner for k in (node if part == "*" else [part])
                 if k in node]  # fmt: skip
    return found


@cache
def targets_of(key: str) -> set[str]:
    """Return what the files of configs/ for the part under a key of BASES name as a `_target_`."""
    parts = {"trackio": "tracker"}.get(key, key).split(".")
    own = "/".join(parts)
    return named_in_configs("_target_", f"{own if (CONFIG_DIR / own).is_dir() else parts[0]}/*.yaml")


def output_dir_of(path: Path) -> Path | None:
    """Return the output folder that a checkpoint, or the export of a run, lies in; None where it lies in none."""
    return next((folder.parent for folder in path.resolve().parents if folder.name in ("ckpts", "runs")), None)


def places_of(path: Path, config: dict[str, Any]) -> list[Path]:
    """Return where relative paths in a checkpoint's configuration may start: the run's working folder, this, the checkout.

    The first is known by where the run's output_dir lies, unless that was absolute.
    """
    outputs = output_dir_of(path)
    below = Path(str(config.get("output_dir", "outputs")))
    relative = outputs and not below.is_absolute() and outputs.parts[-len(below.parts) :] == below.parts
    made_in = outputs.parents[len(below.parts) - 1] if outputs and relative else Path.cwd()
    return [*([made_in] if made_in != Path.cwd() else []), Path(), CONFIG_DIR.parent]


def with_files_found(config: dict[str, Any], places: list[Path]) -> dict[str, Any]:
    """Return a configuration whose relative paths to files and folders that exist are from the working folder."""

    def with_found(node: dict[str, Any]) -> dict[str, Any]:
        files = {key: node[key] for key in FILE_KEYS if isinstance(node.get(key), str) and node[key]}
        there = {key: [place / file for place in places if exists(place / file)] for key, file in files.items()}
        return node | {key: str(found[0]) for key, found in there.items() if found}

    return rebuilt(config, with_found)


def exists(path: Path) -> bool:
    """Return whether there is a file or folder; False also for a text that no path can be."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_whole(config: dict[str, Any]) -> bool:
    """Whether it has every part a model is built from."""
    parts, choices = [config.get(part) for part in NEEDED_PARTS], config.get("choices")
    if not all(isinstance(node, dict) and ("_target_" in node or node is choices) for node in parts):
        return False
    chosen = [config["choices"].get(group) for group in ("model", "loss", "dataloaders")]
    named = all(isinstance(choice, str) and CHOICE.fullmatch(choice) for choice in chosen)
    shaped = isinstance(config["dataloaders"].get("state_shape"), list)
    return named and shaped and isinstance(config.get("seed"), int) and "limit_data" in config


def is_plain(node: Any, depth: int = 20) -> bool:
    """Whether nothing but dicts by name, lists and scalars is nested there, and no deeper than any configuration is."""
    if not isinstance(node, dict | list | tuple):
        return node is None or isinstance(node, str | int | float)
    named = not isinstance(node, dict) or all(isinstance(key, str) for key in node)
    inner = node.values() if isinstance(node, dict) else node
    return named and depth > 0 and all(is_plain(value, depth - 1) for value in inner)


def without_downloads(config: dict[str, Any]) -> dict[str, Any]:
    """Return the nested configuration with every `download` off, and every `url` empty that no file of configs/ names."""

    def changed(node: dict[str, Any]) -> dict[str, Any]:
        off = {"download": False} if "download" in node else {}
        return node | off | ({"url": ""} if "url" in node and str(node["url"]) not in named_in_configs("url") else {})

    return rebuilt(config, changed)


def without_addresses(config: dict[str, Any]) -> dict[str, Any]:
    """Return the nested configuration with every address that this command does not say as the path of its copy here."""
    here = lambda value: str(local_copy(value)) if is_address(value) and value not in addresses else value  # noqa: E731
    return rebuilt(config, lambda node: {key: here(value) for key, value in node.items()})


def check_addresses(config: dict[str, Any], where: Path) -> None:
    """Raise UserError for an address in a run's stored settings that this command does not say, unless what is there was
    fetched before; a run is copied to none that is not said again."""
    for key, value in flat({key: value for key, value in config.items() if key not in (*AS_TYPED, "init_from")}).items():
        if is_address(value) and value not in addresses and (key == "mirror" or not local_copy(value).exists()):
            leave = ", or mirror=null to go on without copies" if key == "mirror" else ""
            raise UserError(
                f"{where} has {key}={value[:200]}, and stored settings neither fetch nor send; add {key}={value[:200]} if "
                f"you trust it{leave}"
            )
