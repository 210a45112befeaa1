"""Reading what a run has stored: text of bounded size, plain and printable, numbers that can be drawn. Anyone may have
changed the files, so nothing in them is trusted, worked out or built.
"""

import json
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import UserError, first_line, printable
from common.files import check_own, read_own

MOST_BYTES = {"config.yaml": 2**19, "status.json": 2**22, "overrides.txt": 2**19, "metrics.jsonl": 2**31}
LONGEST_LINE = 2**24  # bytes of a line that are held at once
MOST_NUMBER = 1e300  # in size, that a score or a step may be
DEEPEST = 50  # settings within settings of a configuration
CONFIG_KINDS = {
    "run_name": str, "output_dir": str, "command": str, "overrides": list, "changed": dict, "choices": dict, "log": dict,
    "trackio": dict, "callbacks": dict, "epochs": int, "max_steps": int | None, "seed": int, "monitor": str,
    "dataloaders": dict, "source": dict, "model": dict, "loss": dict, "solver": dict, "optimizer": dict, "schedule": dict,
    "ema": dict, "evaluation": dict, "backend": dict,
}  # fmt: skip
CONFIG_REMEDY = "put back a copy of it, or start the run again with overwrite=true, which moves its files aside"


def read_text(path: Path) -> str | None:
    """Return the text of a file of a run's folder, None where there is none. UserError for what read_own refuses."""
    content = read_own(path, path.parent, MOST_BYTES[path.name])
    return None if content is None else content.decode(errors="replace")


def lines_of(path: Path) -> Iterator[str]:
    """Yield the whole lines of a file of a run's folder, one in memory at a time; what follows the last break is torn.

    UserError for what check_own refuses.
    """
    check_own(path, path.parent, MOST_BYTES[path.name])
    if path.exists():
        with path.open("rb") as file:
            for line in iter(lambda: file.readline(LONGEST_LINE), b""):
                if line.endswith(b"\n") or len(line) == LONGEST_LINE:  # what is longer comes in parts, which are no rows
                    yield line.removesuffix(b"\n").decode(errors="replace")


def as_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is, its texts printable; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return all_printable(value) if "\\u" in text or not text.isascii() else value


def all_printable(node: Any) -> Any:
    """Return the nested value with every key and text printable."""
    if isinstance(node, dict):
        return {all_printable(key): all_printable(value) for key, value in node.items()}
    if isinstance(node, list):
        return [all_printable(value) for value in node]
    return printable(node) if isinstance(node, str) else node


def is_number(value: Any) -> bool:
    """Return whether a value is a number that can be drawn, or null, which stands for one that was not finite."""
    return value is None or (isinstance(value, int | float) and abs(value) < MOST_NUMBER)


def numbers_in(values: dict[str, Any], *also: str) -> dict[str, Any]:
    """Return the entries that are numbers or null, each under its name in one line, and those of the keys `also`."""
    return {" ".join(key.splitlines()): value for key, value in values.items() if key in also or is_number(value)}


def json_number(value: float | None) -> float | None:
    """Return the value, or None (null in JSON) where it is not a finite number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


@cache
def note_once(note: str) -> None:
    """Print a line on stderr, once in a process."""
    print(f"note: {note}", file=sys.stderr)


def parsed_config(text: str, where: str) -> dict[str, Any]:
    """Return the settings in the text of a config.yaml, no interpolation worked out.

    UserError, naming `where`, for another text, and for one that takes long to read, see `endless`.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        wrong = endless(text)
        config: Any = None if wrong else all_printable(OmegaConf.to_container(OmegaConf.create(text)))
        wrong = wrong or wrong_config(config)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        wrong = f"cannot be read ({yaml_fault(error)})"
    if wrong:
        raise UserError(f"{where} {wrong}; {CONFIG_REMEDY}")
    return {str(key): value for key, value in config.items()}


def yaml_fault(error: Exception) -> str:
    """Return what is wrong with a YAML text, and in which line where that is known."""
    import yaml

    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return first_line(error)
    return f"{error.problem} in line {error.problem_mark.line + 1}"


def endless(text: str) -> str | None:
    """Return why a few lines of YAML would take long to read, or None: aliases stand for any number of values, and each
    depth of nesting is looked at again at every further one.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            return "has YAML aliases, which no run writes"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            return f"nests its settings more than {DEEPEST} deep, which no run does"
    return None


def wrong_config(config: Any) -> str | None:
    """Return what a run's configuration could not be, in words, or None."""
    if not isinstance(config, dict) or not config:
        return "holds no settings"
    for key, kind in CONFIG_KINDS.items():
        value = config.get(key)
        words = key != "overrides" or not isinstance(value, list) or all(isinstance(word, str) for word in value)
        if key in config and not (isinstance(value, kind) and words):
            return f"holds {str(value)[:60]!r} as its {key}, which no run writes"
    return None
