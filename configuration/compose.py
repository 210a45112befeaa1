"""From the words of a command line to a checked configuration, without importing torch.

A command line is composed once: Hydra composes the groups, then each `key=value` is laid over them here, so that an
unknown key, a wrong type or a value out of range becomes one sentence that names the nearest right word.
"""

import difflib
import re
import sys
from collections.abc import Collection, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from common.errors import UserError, first_line
from configuration.nodes import CONFIG_DIR, check_known, groups, lookup, named_in_configs, nearest
from configuration.resolvers import register_resolvers
from configuration.values import as_typed, check_run_name, check_value, declared

UNREADABLE = re.compile("[\ud800-\udfff]")  # what stands for a byte of the command line that is no text
Own = Mapping[str, tuple[str, dict[str, Any]]]  # key of a configuration -> what stands there is called, and its node


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Hydra's own reading of each override. UserError for one it cannot read."""
    return [parsed(text) for text in overrides]


@cache
def parsed(text: str) -> Override:
    """Return Hydra's reading of one override, which takes it some milliseconds. UserError where it cannot be read."""
    if UNREADABLE.search(text):
        raise UserError(
            f"{text!a} holds bytes that are no text in {sys.getfilesystemencoding()}; rename the file or folder, or set "
            "LC_ALL=C.UTF-8 if its name is in UTF-8"
        )
    if re.fullmatch(r"run_name=[\w.+\-]+=[\w.=+\-]*", text):  # a sweep's run_name holds =, which Hydra wants quoted
        text = f"run_name='{text.removeprefix('run_name=')}'"
    if re.fullmatch(r"trust=[\w.]+(,[\w.]+)+", text):  # a list, not the jobs of a sweep
        text = f"trust=[{text.removeprefix('trust=')}]"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        override = None
    if override is None and text.startswith("run_name="):
        check_run_name(text.removeprefix("run_name="))
    if override is None or not override.key_or_group:
        raise UserError(f"cannot read {text!r}: write key=value or group=choice, special characters as in 'key=\"a, b\"'")
    return override


def typed_keys(overrides: list[str]) -> list[str]:
    """Return the key or group of each override."""
    return [override.key_or_group for override in parse_overrides(overrides)]


def without(overrides: list[str], keys: Collection[str]) -> list[str]:
    """Return the overrides but those of these keys, or of what is below them."""
    typed = zip(overrides, typed_keys(overrides), strict=True)
    return [word for word, key in typed if key.split(".")[0] not in keys]


def is_group(override: Override) -> bool:
    """Whether it chooses a file of configs/ (or one of Hydra's own) rather than sets a value."""
    key = override.key_or_group.split("@")[0]
    return ((CONFIG_DIR / key).is_dir() and not isinstance(override.value(), dict)) or key.startswith("hydra/")


def check_choice(override: Override) -> None:
    """Raise UserError for a choice that its group does not have."""
    choices, value = groups().get(override.key_or_group.split("@")[0]), override.value()
    if choices is not None and not override.is_delete() and value is not None:
        check_known(override.key_or_group, str(value), choices)


@cache
def composed(configs: Path, *words: str) -> DictConfig:
    """Return what Hydra composes of these choices, the same object each time. UserError where it cannot."""
    outer = get_gh_backup()  # Hydra's own, while it runs the jobs of a sweep
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configs), version_base=None):
            cfg = compose("train", list(words), return_hydra_config=True)
    except HydraException as error:
        raise UserError(f"cannot compose these choices: {first_line(error)}") from error
    finally:
        restore_gh_from_backup(outer)
    choices = {key: value for key, value in cfg.hydra.runtime.choices.items() if "hydra" not in key and "@" not in key}
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    cfg["choices"] = choices
    return cfg


def compose_config(overrides: list[str], own: Own | None = None) -> DictConfig:
    """Return the configuration a command line means, its choices under `choices`. UserError where it means none.

    own: parts that were given from Python, in the place of those that are chosen.
    """
    register_resolvers()
    typed = [override for override in parse_overrides(overrides) if not override.key_or_group.startswith("hydra")]
    for override in typed:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line} lists several values; add -m to run one job for each")
    chosen = [override for override in typed if is_group(override)]
    for override in chosen:
        check_choice(override)
    words = [str(override.input_line) for override in chosen if override.value() is not None]
    cfg = deepcopy(composed(CONFIG_DIR, *words))
    for override in chosen:
        if override.value() is None and cfg.choices.get(override.key_or_group) is not None:
            raise UserError(f"{override.input_line}: a run cannot do without it; choose one of its files, see --help")
    for key, (choice, node) in (own or {}).items():
        OmegaConf.update(cfg, key, node, merge=False, force_add=True)
        cfg.choices[key] = choice
    for override in typed:
        if override not in chosen:
            check_added(cfg, override, typed)
            lay_over(cfg, override)
    return cfg


def check_added(cfg: DictConfig, override: Override, typed: list[Override]) -> None:
    """Raise UserError for +lr=0.1 where optimizer.lr is a setting and no word reads ${lr}."""
    key = override.key_or_group
    added = (override.is_add() or override.is_force_add()) and key not in cfg and "." not in key
    if added and inner_settings(cfg, key) and not any("${" + key in str(other.input_line) for other in typed):
        raise UserError(f"nothing reads {override.input_line}: {unknown_setting(cfg, key)}")


def inner_settings(cfg: DictConfig, key: str) -> list[str]:
    """Return the settings of parts whose name is this, the outermost first."""
    return sorted((name for name in flat_keys(cfg) if name.endswith(f".{key}")), key=lambda name: name.count("."))


def flat_keys(cfg: Any, prefix: str = "") -> list[str]:
    """Return every key of a nested configuration, dotted, inner nodes included."""
    keys = []
    for key in map(str, cfg if isinstance(cfg, DictConfig) else ()):
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(cfg, key) and isinstance(cfg._get_node(key), DictConfig):
            keys += flat_keys(cfg[key], f"{prefix}{key}.")
    return keys


def has_key(cfg: Any, key: str) -> bool:
    """Whether a nested configuration has the dotted key, which may still lack its value."""
    first, _, rest = key.partition(".")
    if not isinstance(cfg, DictConfig) or first not in map(str, cfg):
        return False
    return not rest or (not OmegaConf.is_missing(cfg, first) and has_key(cfg._get_node(first), rest))


def lay_over(cfg: DictConfig, override: Override) -> None:
    """Set, add (+key) or delete (~key) one value. UserError for an unknown key or a value of another type."""
    key = override.key_or_group
    if not override.is_add() and not override.is_force_add() and not has_key(cfg, key):
        raise UserError(unknown_setting(cfg, key))
    if not override.is_delete():
        value = checked(cfg, key, override.value(), str(override.input_line).partition("=")[2].strip("'\""))
        OmegaConf.update(cfg, key, value, merge=isinstance(value, dict), force_add=True)
    elif "." in key or key in groups():
        delete(cfg, key)
    else:
        raise UserError(f"{key} cannot be left out, every run has one; set it, as in {key}={cfg._get_node(key)}")


def unknown_setting(cfg: DictConfig, key: str) -> str:
    """Return why there is no such key in this configuration, and what to write instead, in a sentence."""
    group, _, rest = key.partition(".")
    choices = groups().get(group, [])
    if group == "tracker":
        return f"there is no setting {key}; a tracker's settings are those of trackio: trackio.{rest}"
    if choices and group not in cfg:
        return f"{key} is a setting of a chosen {group}; add {group}={choices[0]} or another choice"
    owner = held(cfg, f"{key.rpartition('.')[0]}._target_")
    if owner is not None and owner not in named_in_configs("_target_"):
        return f"{key} is in no file of configs/; write +{key}=... for what the constructor of {owner} takes"
    owners = [choice for choice in choices if has_setting(group, choice, key)]
    if owners:
        own = [name for name in map(str, cfg[group]) if not name.startswith("_")]
        here = f"{group}={cfg.choices[group]}, " + (
            f"whose settings are {', '.join(own)}" if own else "which has no settings"
        )
        return (
            f"{key} is a setting of {group}={' or '.join(owners)}, and this run has {here}; choose another {group}, or "
            "leave it out"
        )
    known = [*flat_keys(cfg), *(group for group in groups() if "/" in group)]
    inner = inner_settings(cfg, key)
    hint = f" (did you mean {inner[0]}?)" if inner else nearest(key, known)
    return f"there is no setting {key}{hint}; `python launcher.py --cfg job` lists them all"


def has_setting(group: str, choice: str, key: str) -> bool:
    """Whether the file of a choice has the dotted key of its group, such as backend.gpu."""
    node = OmegaConf.load(CONFIG_DIR / group / f"{choice}.yaml")
    return isinstance(node, DictConfig) and key.removeprefix(f"{group}.") in flat_keys(node)


def delete(cfg: DictConfig, key: str) -> None:
    """Remove the node at a dotted key."""
    parent, _, leaf = key.rpartition(".")
    del (OmegaConf.select(cfg, parent) if parent else cfg)[leaf]


def held(cfg: DictConfig, key: str) -> Any:
    """Return what a dotted key holds; None where that is missing or not known yet."""
    try:
        return OmegaConf.select(cfg, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return None


def checked(cfg: DictConfig, key: str, value: Any, text: str) -> Any:
    """Return the value that was typed as `text`, for the key, ${...} unchecked. UserError where it may not stand there."""
    if isinstance(value, str) and value.startswith("${"):
        return value
    setting, before = declared(key, held(cfg, f"{key.rpartition('.')[0]}._target_")), held(cfg, key)
    needed = "." not in key and key not in groups() and bool(before)  # log, trackio: every run has them
    if isinstance(before, DictConfig) and isinstance(value, str) and key.replace(".", "/") in groups():
        raise UserError(chosen_by_slash(key, text))
    if setting is not None:
        value = as_typed(value, text, setting)
        check_value(key, value, setting)
    elif isinstance(before, DictConfig) and not isinstance(value, dict) and (value is not None or needed):
        inner = [*flat_keys(before), "x"][0]
        raise UserError(f"{key} takes a group of settings: set one of its keys, such as {key}.{inner}, not {text!r}")
    return value


def chosen_by_slash(key: str, text: str) -> str:
    """Return that a part of a part is chosen as loss/coupling=x, not loss.coupling=x, in a sentence."""
    group = key.replace(".", "/")
    choices = groups()[group]
    choice = (difflib.get_close_matches(text, choices, n=1) or choices)[0]
    return f"{key} is chosen with a slash: write {group}={choice}; the choices are {', '.join(choices)}"


def twice_as_long(config: dict[str, Any]) -> str:
    """Return the override with which a finished run goes on to twice its length."""
    return f"max_steps={2 * config['max_steps']}" if config["max_steps"] else f"epochs={2 * config['epochs']}"


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain values, every interpolation resolved. UserError for what is missing."""
    unset: Any = OmegaConf.to_container(cfg)
    missing = [key for key in flat_keys(cfg) if lookup(unset, key) == "???"]
    if missing:
        own_teacher = f"'{missing[0]}=${{run_name}}_teacher'" if unset.get("teacher") and "teacher" in missing[0] else None
        example = "run_name=my_experiment" if missing[0] == "run_name" else own_teacher or f"{missing[0]}=..."
        raise UserError(f"{missing[0]} is missing; add it to the command, such as {example}")
    reading = [key for key in flat_keys(cfg) if re.search(r"\$\{\s*oc\.env\b", str(lookup(unset, key)))]
    if reading:
        raise UserError(
            f"{reading[-1]} reads the environment by ${{oc.env:...}}, and what it reads would be kept in config.yaml, saves "
            "and reports; write the value itself, and leave what is secret to the program that needs it, as WANDB_API_KEY is"
        )
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise explained(error, cfg) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def explained(error: OmegaConfBaseException, cfg: DictConfig) -> UserError:
    """Return what a value that cannot be worked out means for the user; a resolver's own sentence where it raised one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return cause
    group, _, rest = str(error.msg).partition("'")[2].partition("'")[0].partition(".")
    if not (isinstance(error, InterpolationKeyError) and rest and group in cfg["choices"]):
        if emptied := re.search("node `(.+)` is not a container", str(error)):
            return UserError(f"others are taken from inside {emptied[1]}, which has none; leave it as its file has it")
        return UserError(f"a setting cannot be worked out: {first_line(error)}")
    lacking, asked = f"configs/{group}/{cfg['choices'][group]}.yaml", error.full_key
    add = "`training: {lr: 1e-3}`" if rest == "training.lr" else rest
    return UserError(f"{asked} is taken from {group}.{rest}, which {lacking} lacks; add {add} there, or give {asked}=VALUE")
