"""Walks through configs/, and through nested configurations: dicts, lists and plain values."""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from common.errors import UserError

T = TypeVar("T")

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
RECOMMENDATIONS = "training"  # a group's node of settings that other parts take from it; no constructor sees it


def groups() -> dict[str, list[str]]:
    """Return every config group ("loss", "loss/path", ...) and its choices."""
    found: dict[str, list[str]] = {}
    for place, _, names in os.walk(CONFIG_DIR):  # a fifth of the time of rglob, and every command line asks several times
        choices = sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
        if choices and (group := place.removeprefix(str(CONFIG_DIR))):
            found[group.strip(os.sep).replace(os.sep, "/")] = choices
    return dict(sorted(found.items(), key=lambda item: [*item[0].split("/"), item[1][0]]))


@cache
def named_in_configs(key: str, files: str = "**/*.yaml") -> set[str]:
    """Return every value of a key, such as `_target_` or `url`, in those files of configs/."""
    texts = (file.read_text(encoding="utf-8") for file in CONFIG_DIR.glob(files))
    return {value for text in texts for value in re.findall(rf"\b{key}:\s*([^\s,}}]+)", text)}


def nodes_in(node: Any) -> Iterator[Any]:
    """Yield a node, then everything nested in it."""
    yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from nodes_in(inner)


def rebuilt(node: T, change: Callable[[dict[str, Any]], dict[str, Any]]) -> T:
    """Return a copy of a node with `change` applied to every dict in it, inner ones first."""
    same: Any = node
    if isinstance(node, dict):
        same = change({key: rebuilt(inner, change) for key, inner in node.items()})
    elif isinstance(node, list | tuple):
        same = [rebuilt(inner, change) for inner in node]
    return cast(T, same)


def lookup(config: dict[str, Any], key: str) -> Any:
    """Return the value at a dotted key; None where there is none."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by dotted key, such as {"optimizer.lr": 1} of {"optimizer": {"lr": 1}}."""
    if not isinstance(config, dict) or not config:
        return {prefix.rstrip("."): config} if prefix else {}
    return {k: v for key, value in config.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def nearest(word: str, known: list[str]) -> str:
    """' (did you mean x?)' or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def check_known(key: str, word: str, known: Sequence[str]) -> None:
    """Raise UserError, which names the nearest, for a word that is none of those known."""
    if word not in known:
        raise UserError(f"{key}={word} does not exist{nearest(word, list(known))}; choices: {', '.join(known)}")


def interpolation_in(node: Any) -> str | None:
    """Return a text that OmegaConf would work out, at which any `_target_` may appear; None in a resolved configuration."""
    return next((word for word in nodes_in(node) if isinstance(word, str) and "${" in word), None)


def targets_in(node: Any) -> Iterator[str]:
    """Yield every `_target_` of a nested configuration, as text."""
    return (str(inner["_target_"]) for inner in nodes_in(node) if isinstance(inner, dict) and "_target_" in inner)
