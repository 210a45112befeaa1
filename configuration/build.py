"""Objects from configuration nodes."""

from collections.abc import Iterator
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from common.errors import UserError
from configuration.compose import RECOMMENDATIONS
from configuration.values import check_all


def without_recommendations(node: Any) -> Any:
    """Return the node without the settings it only hands on to other parts."""
    if isinstance(node, dict):
        return {key: without_recommendations(value) for key, value in node.items() if key != RECOMMENDATIONS}
    return node


def words_in(node: Any) -> Iterator[str]:
    """Yield every text among the values of a nested configuration."""
    if isinstance(node, str):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from words_in(inner)


def interpolation_in(node: Any) -> str | None:
    """Return a text that OmegaConf would work out, at which any `_target_` may appear; None in a resolved configuration."""
    return next((word for word in words_in(node) if "${" in word), None)


def build(node: dict[str, Any], **parts: Any) -> Any:
    """Return the object a node's `_target_` names, nested ones first, with `parts` as further arguments.

    UserError when a setting is not what its constructor declares, when that raises one or does not know a setting, and for
    an interpolation, never worked out here.
    """
    unresolved = interpolation_in(node)
    if unresolved is not None:
        raise UserError(f"{node.get('_target_')} is given {unresolved!r}, which is no value; write the value itself there")
    check_all(node, str(node.get("_target_", "")))
    try:
        return instantiate(without_recommendations(node), _convert_="all", **parts)
    except HydraException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (UserError, TypeError, ValueError, RuntimeError, MemoryError)):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, (TypeError, ValueError)):
            raise UserError(f"{node.get('_target_')} does not take these settings: {cause}") from error
        if cause is not None:
            raise cause from error
        raise
