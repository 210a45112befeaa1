"""Parts of a run that were given from Python as objects: a configuration names them, and holds none of their content."""

from collections.abc import Callable
from typing import Any

from common.errors import UserError

TARGET = f"{__name__}.own_object"  # the `_target_` that stands for such a part
makers: dict[tuple[str, str], Callable[..., Any]] = {}  # of the parts given in this process, by (run_name, part)


def own_object(run: str, part: str, name: str, **settings: Any) -> Any:
    """Return the object given as a part of a run, called `name`, made with its settings. UserError where none was given."""
    if (run, part) not in makers:
        raise UserError(
            f"the {part} of run {run} ({name}) was given from Python and is in no file; give it again, as in "
            f'Experiment(run_name={run!r}, {part}=...), whose fit("resume=true"), evaluate() and sample() use its saves'
        )
    return makers[run, part](**settings)


def is_own(node: Any) -> bool:
    """Return whether a node of a configuration stands for an object that was given from Python."""
    return isinstance(node, dict) and node.get("_target_") == TARGET
