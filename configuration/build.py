"""Objects from configuration nodes."""

from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from common.errors import UserError
from configuration.compose import RECOMMENDATIONS
from configuration.nodes import interpolation_in, rebuilt
from configuration.values import check_all


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
            raise UserError(f"{node.get('_target_')} does not take these settings: {cause}") from error
        if cause is not None:
            raise cause from error
        raise
