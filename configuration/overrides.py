"""A stored configuration with newly typed overrides laid over it, and what changed."""

import re
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from common.errors import UserError
from configuration.checks import check_values
from configuration.compose import compose_config, delete, is_group, resolved, typed_keys
from configuration.nodes import flat, lookup
from configuration.stored import check_new_parts
from configuration.values import NEUTRAL

# What no result hangs on, or only by chance, or what follows from the data.
PAIRS_PLACE = "loss.coupling.make_pairs.cache"
MEANINGLESS = {*NEUTRAL, "run_name", "seed", "device", "engine", "standardized", PAIRS_PLACE} - {"guidance"}


def laid_over(stored: dict[str, Any], config: dict[str, Any], typed: list[Override]) -> dict[str, Any]:
    """`stored` with each typed override's value, or chosen group, taken from `config`."""
    merged = OmegaConf.create(stored)
    for override in typed:
        if override.key_or_group.startswith("hydra"):
            continue
        key = override.key_or_group.split("@")[0]
        if is_group(override):
            if merged["choices"].get(key) == config["choices"].get(key):
                continue  # the same choice again: the stored settings of it stand
            if key in ("experiment", "debug"):
                raise UserError(f"{key}={config['choices'].get(key)} can only be given when a run starts; leave it out here")
            merged["choices"][key] = config["choices"].get(key)
            key = "trackio" if key == "tracker" else key.replace("/", ".")
        if key == "conditional" and stored.get(key) != config[key]:
            raise UserError("whether a network is class-conditional is decided when a run starts; leave conditional out")
        if override.is_delete():
            if lookup(stored, key) is not None:
                delete(merged, key)
            continue
        OmegaConf.update(merged, key, lookup(config, key), merge=False, force_add=True)
    for key in ("resume", "overwrite", "command", "overrides", "changed", "output_dir", "trust"):
        merged[key] = config[key]
    plain = OmegaConf.to_container(merged)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return key -> (old, new) for every leaf that differs."""
    before, after = flat(old), flat(new)
    keys = [*before, *(key for key in after if key not in before)]
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def meaningful(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that results hang on, by dotted key; the run's seed, and where its own teacher lies, left open."""
    leaves = {key: value for key, value in flat(config).items() if not MEANINGLESS & {key, key.split(".")[0]}}
    own, teacher = re.compile(rf"seed={config['seed']}(?!\d)"), f"{config.get('run_name')}_teacher"
    opened = lambda text: "*_teacher" if teacher in text else own.sub("seed=*", text)  # noqa: E731
    return {key: opened(value) if isinstance(value, str) else value for key, value in leaves.items()}


def settings_from_overrides(words: list[str]) -> dict[str, Any]:
    """Return the nodes that words name, e.g. {"solver": ...} of ["solver=rk4", "solver.steps=8"]. UserError if wrong."""
    config = resolved(compose_config(["run_name=sample", *words]))
    check_values(config)
    check_new_parts(config)
    named = {key.split(".")[0].split("/")[0] for key in typed_keys(words)}
    return {name: config.get(name) for name in named}
