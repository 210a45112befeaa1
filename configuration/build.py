"""Objects from configuration nodes."""

import inspect
import pkgutil
import re
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from common.errors import UserError
from configuration.nodes import RECOMMENDATIONS, interpolation_in, named_in_configs, nearest, nodes_in, rebuilt
from configuration.signatures import parameters
from configuration.values import check_all

PARTS = ("network", "params")  # that other code hands over, no settings


def build(node: dict[str, Any], **parts: Any) -> Any:
    """Return the object a node's `_target_` names, nested ones first, with `parts` as further arguments.

    UserError when a setting is not what its constructor declares, when that raises one or does not know a setting, and for
    an interpolation, never worked out here.
    """
    unresolved = interpolation_in(node)
    if unresolved is not None:
        raise UserError(f"{node.get('_target_')} is given {unresolved!r}, which is no value; write the value itself there")
    check_all(node, str(node.get("_target_", "")))
    own = rebuilt(node, lambda inner: {key: value for key, value in inner.items() if key != RECOMMENDATIONS})
    try:
        return instantiate(own, _convert_="all", **parts)
    except HydraException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (UserError, TypeError, ValueError, RuntimeError, MemoryError)):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, (TypeError, ValueError)):
            raise UserError(refused(node, str(error), str(cause))) from error
        own_class = own_failure(error)
        if own_class is not None and "memory" not in str(cause):
            raise own_class from error
        if cause is not None:
            raise cause from error
        raise


def own_failure(error: HydraException) -> UserError | None:
    """Return what went wrong in a class that no file of configs/ names, a user's own, in a sentence; None for another."""
    said = re.search(r"(?:call to|locating) target '([^']+)'", str(error))
    if said is None or said[1] in named_in_configs("_target_"):
        return None
    cause = error.__cause__ or error
    return UserError(f"{said[1]} cannot be made: {type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}")


def found_class(key: str, path: str) -> type:
    """Return the class at a dotted path. UserError, naming the key that asks for it, where there is none."""
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(f"{key}._target_={path} cannot be imported from here ({error}); give module.Class") from error
    if not inspect.isclass(found):
        raise UserError(f"{key}._target_={path} is not a class; give module.Class")
    return found


def refused(node: dict[str, Any], said: str, cause: str) -> str:
    """Return why a class of a node does not take its settings, in a sentence: those it does not know, or lacks.

    said: Hydra's words, which name the class; cause: the constructor's.
    """
    named = re.search(r"call to target '(?:[^']*\.)?(\w+)'", said)
    ends = f".{named[1] if named else ''}"
    fitting = (inner for inner in nodes_in(node) if isinstance(inner, dict) and str(inner.get("_target_")).endswith(ends))
    own = next(fitting, node)
    target = str(own.get("_target_"))
    takes = [name for name in parameters(target) if name not in PARTS]
    unknown = [key for key in own if not key.startswith("_") and key != RECOMMENDATIONS and key not in takes]
    lacking = re.findall(r"'(\w+)'", cause) if "required" in cause else []
    settings = f"its settings are {', '.join(takes)}" if takes else "it takes no settings"
    if lacking:
        return f"{target} needs {', '.join(lacking)}, which nothing gives; add it to its file in configs/; {settings}"
    if takes and unknown:
        return f"{target} takes no {unknown[0]}{nearest(unknown[0], takes)}; {settings}"
    return f"{target} does not take these settings: {cause}"
