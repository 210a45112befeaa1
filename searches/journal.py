"""The journal of a search: Optuna's own rows, one JSON object a line, and what may stand in them.

Optuna unpickles the state that its CmaEsSampler keeps in a journal, so that someone else's journal could run code. Nothing
is unpickled here: searches/samplers.py works CMA-ES out from the trials, and every row is checked before Optuna sees it.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages.journal import BaseJournalBackend

from common.errors import UserError
from common.files import read_own
from run_files.stored_values import MOST_NUMBER, as_object, is_number
from searches.space import Varied

MOST_BYTES = 2**26
CREATE_STUDY, STUDY_ATTRIBUTE, CREATE_TRIAL, PARAMETER = 0, 2, 4, 5  # Optuna's numbers of what a row does
STATE, INTERMEDIATE, TRIAL_ATTRIBUTE, TRIAL_SYSTEM = 6, 7, 8, 9
STATES = (1, 2, 3)  # complete, pruned, failed
TIME = re.compile(r"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\d\.\d{6}\+00:00")
OF_HALVING = re.compile(r"completed_rung_\d{1,3}")
Row = dict[str, Any]


class Journal(BaseJournalBackend):
    """The rows of one search, in memory and in a file that one process writes: whoever holds the lock of its folder.

    Optuna's own backend takes a lock that a killed process leaves behind, and cannot go on after a line that a kill tore.
    """

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path, self.rows = path, rows
        self.waiting: list[Row] | None = None

    def read_logs(self, log_number_from: int) -> list[Row]:
        return self.rows[log_number_from:]

    def append_logs(self, logs: list[Row]) -> None:
        own = [json.loads(json.dumps(log)) for log in logs if not of_tpe(log)]
        self.rows += own
        if self.waiting is None:
            self.write(own)
        else:
            self.waiting += own

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write the rows that are appended in the block at its end, by one call."""
        self.waiting = []
        yield
        rows, self.waiting = self.waiting, None
        self.write(rows)

    def write(self, rows: list[Row]) -> None:
        """Append rows to the file. OSError, naming it, when the disk refuses."""
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise


def of_tpe(log: Row) -> bool:
    """Return whether a row repeats a trial's parameters for TPE, which reads them where they are."""
    return log["op_code"] == TRIAL_SYSTEM and all(key.startswith("tpe:") for key in log["system_attr"])


def opened(path: Path, settings: dict[str, Any], space: tuple[Varied, ...]) -> Journal:
    """Return the journal of a search, empty where there is none yet; what a kill has left of an unfinished row is cut off.

    The folder is locked. UserError for a file that is not this search's, or not what a search writes; nothing in it is
    executed.
    """
    content = read_own(path, path.parent, MOST_BYTES) or b""
    lines = content.split(b"\n")[:-1]
    rows: list[Row] = []
    check = RowCheck(settings, space)
    for number, line in enumerate(lines, start=1):
        row = as_object(line.decode("ascii", errors="replace"))
        if row is None or not check.allows(row):
            raise UserError(f"line {number} of {path} is not this search's; put back a copy, or choose another run_name")
        rows.append(row)
    rows = rows[: check.whole]
    whole = sum(len(line) + 1 for line in lines[: check.whole])
    if whole < len(content):
        with path.open("rb+") as file:
            file.truncate(whole)
    return Journal(path, rows)


class RowCheck:
    """Goes through the rows of a journal in order. whole: how many of them, from the first, leave no trial half-made."""

    def __init__(self, settings: dict[str, Any], space: tuple[Varied, ...]) -> None:
        self.settings, self.space = settings, {varied.key: varied for varied in space}
        self.seen = self.trials = self.whole = 0
        self.lacking: set[str] = set()
        self.kinds: dict[int, tuple[set[str], Callable[[Row], bool]]] = {
            CREATE_TRIAL: ({"study_id", "datetime_start"}, self.is_trial),
            PARAMETER: ({"trial_id", "param_name", "param_value_internal", "distribution"}, self.is_parameter),
            STATE: ({"trial_id", "state", "values", "datetime_complete"}, self.is_state),
            INTERMEDIATE: ({"trial_id", "step", "intermediate_value"}, self.is_intermediate),
            TRIAL_ATTRIBUTE: ({"trial_id", "user_attr"}, self.is_attribute),
            TRIAL_SYSTEM: ({"trial_id", "system_attr"}, self.is_rung),
        }

    def allows(self, row: Row) -> bool:
        """Return whether the row may come next. UserError where it is of another search."""
        self.seen += 1
        if self.seen <= 2:
            allowed = self.is_study(row) if self.seen == 1 else self.is_settings(row)
        else:
            keys, holds = self.kinds.get(row["op_code"] if type(row.get("op_code")) is int else -1, (set(), lambda _: False))
            allowed = row.keys() == keys | {"op_code", "worker_id"} and isinstance(row["worker_id"], str) and holds(row)
        if not self.lacking and self.seen >= 2:
            self.whole = self.seen
        return allowed

    def is_study(self, row: Row) -> bool:
        directions = row.get("directions")
        named = isinstance(row.get("worker_id"), str) and row.get("study_name") == self.settings["name"]
        return row.get("op_code") == CREATE_STUDY and named and directions == [2 if self.settings["higher"] else 1]

    def is_settings(self, row: Row) -> bool:
        stored = row.get("user_attr", {}).get("search") if isinstance(row.get("user_attr"), dict) else None
        if row.get("op_code") != STUDY_ATTRIBUTE or row.get("study_id") != 0 or not isinstance(stored, dict):
            return False
        for key, value in self.settings.items():
            if stored.get(key) != value:
                raise UserError(
                    f"the search {self.settings['name']} was begun with {key} {in_words(stored.get(key))}, and this command "
                    f"has {in_words(value)}; give it as it was, or choose another run_name"
                )
        return stored.keys() == self.settings.keys() and isinstance(row.get("worker_id"), str)

    def is_trial(self, row: Row) -> bool:
        if self.lacking or row["study_id"] != 0 or not is_time(row["datetime_start"]):
            return False
        self.trials, self.lacking = self.trials + 1, set(self.space)
        return True

    def is_known(self, row: Row) -> bool:
        return type(row["trial_id"]) is int and 0 <= row["trial_id"] < self.trials and not self.lacking

    def is_parameter(self, row: Row) -> bool:
        varied, value = self.space.get(str(row["param_name"])), row["param_value_internal"]
        if varied is None or varied.key not in self.lacking or row["trial_id"] != self.trials - 1:
            return False
        self.lacking.discard(varied.key)
        low, high = (0, len(varied.texts) - 1) if varied.texts else (varied.low, varied.high)
        number = is_finite(value) and low <= value <= high and (value == int(value) or not (varied.texts or varied.whole))
        return number and row["distribution"] == distribution_to_json(varied.distribution)

    def is_state(self, row: Row) -> bool:
        values, known = row["values"], self.is_known(row) and row["state"] in STATES and type(row["state"]) is int
        one = isinstance(values, list) and len(values) == 1 and is_finite(values[0])
        return known and is_time(row["datetime_complete"]) and (one or (values is None and row["state"] != 1))

    def is_intermediate(self, row: Row) -> bool:
        step = type(row["step"]) is int and 0 <= row["step"] < 2**63
        return self.is_known(row) and step and is_finite(row["intermediate_value"])

    def is_attribute(self, row: Row) -> bool:
        attribute = row["user_attr"]
        why = attribute.get("why") if isinstance(attribute, dict) and attribute.keys() == {"why"} else None
        return self.is_known(row) and is_text(why)

    def is_rung(self, row: Row) -> bool:
        attribute = row["system_attr"]
        if not (self.is_known(row) and isinstance(attribute, dict) and len(attribute) == 1):
            return False
        ((key, value),) = attribute.items()
        return bool(OF_HALVING.fullmatch(key)) and is_finite(value)


def is_time(value: Any) -> bool:
    return isinstance(value, str) and bool(TIME.fullmatch(value))


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 2000


def is_finite(value: Any) -> bool:
    return type(value) in (int, float) and is_number(value) and math.isfinite(value) and abs(value) < MOST_NUMBER


def in_words(value: Any) -> str:
    """Return a setting of a search as it was typed, cut where it is long."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:200]}{'...' * (len(text) > 200)}" or "nothing"
