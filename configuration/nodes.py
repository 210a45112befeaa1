"""Walks through nested configurations: dicts, lists and plain values."""

from collections.abc import Callable, Iterator
from typing import Any


def nodes_in(node: Any) -> Iterator[Any]:
    """Yield a node, then everything nested in it."""
    yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from nodes_in(inner)


def rebuilt(node: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Return a copy of a node with `change` applied to every dict in it, inner ones first."""
    if isinstance(node, list | tuple):
        return [rebuilt(inner, change) for inner in node]
    return change({key: rebuilt(inner, change) for key, inner in node.items()}) if isinstance(node, dict) else node


def lookup(config: dict[str, Any], key: str) -> Any:
    """Return the value at a dotted key; None where there is none."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def interpolation_in(node: Any) -> str | None:
    """Return a text that OmegaConf would work out, at which any `_target_` may appear; None in a resolved configuration."""
    return next((word for word in nodes_in(node) if isinstance(word, str) and "${" in word), None)


def targets_in(node: Any) -> Iterator[str]:
    """Yield every `_target_` of a nested configuration, as text."""
    return (str(inner["_target_"]) for inner in nodes_in(node) if isinstance(inner, dict) and "_target_" in inner)
