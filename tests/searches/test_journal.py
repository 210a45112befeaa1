"""A journal is a file of a run's folder: someone else's is refused in a sentence, and nothing in it is executed."""

import json
import math
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from searches.journal import RowCheck
from searches.search import search_of
from tests.searches.fake_runs import carried_out, moved

SCORE = {"op_code": 6, "worker_id": "w", "trial_id": 2, "state": 1, "values": [0.1],
         "datetime_complete": "2026-01-01T00:00:00.000000+00:00"}  # fmt: skip


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploded",)


@pytest.fixture
def plan(planned, runs, tmp_path, monkeypatch):
    """The plan of a search of three trials that has ended; the working folder is empty."""
    made = planned("n=3", "sampler=random")
    carried_out(made)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return made


def refusal(plan) -> str:
    with pytest.raises(UserError) as refused:
        carried_out(plan)
    assert not list(Path().iterdir())
    return str(refused.value)


HOSTILE = {
    "a pickle": pickle.dumps(Bomb()) + b"\n",
    "a pickle as CMA-ES of Optuna stores it": json.dumps({
        "op_code": 9, "worker_id": "w", "trial_id": 0, "system_attr": {"cma:optimizer:0": pickle.dumps(Bomb()).hex()},
    }),
    "no object": "[1]", "no row": "{}", "an unknown operation": json.dumps({"op_code": 77, "worker_id": "w"}),
    "true as an operation": json.dumps({"op_code": True, "worker_id": "w"}),
    "a study deleted": json.dumps({"op_code": 1, "worker_id": "w", "study_id": 0}),
    "a second study": json.dumps({"op_code": 0, "worker_id": "w", "study_name": "t", "directions": [1]}),
    "a value that is no number": json.dumps(SCORE | {"values": ["0.1"]}),
    "a value of NaN": json.dumps(SCORE | {"values": [float("nan")]}),
    "no value": json.dumps(SCORE | {"values": None}), "two values": json.dumps(SCORE | {"values": [1, 2]}),
    "a trial that there is not": json.dumps(SCORE | {"trial_id": 99}), "a key too many": json.dumps(SCORE | {"more": 1}),
    "a time that is none": json.dumps(SCORE | {"datetime_complete": "yesterday"}),
    "a state that is none": json.dumps(SCORE | {"state": 9}),
    "a parameter twice": json.dumps({"op_code": 5, "worker_id": "w", "trial_id": 2, "param_name": "optimizer.lr",
                                     "param_value_internal": 0.001, "distribution": "{}"}),
    "too deep": "[" * 100_000, "not ASCII": json.dumps(SCORE, ensure_ascii=False).replace("w", "\u00fc"),
}  # fmt: skip


def test_rows_that_no_search_writes_are_refused_and_nothing_is_executed(plan):
    journal = plan.folder / "journal.jsonl"
    whole = journal.read_bytes()
    for what, row in HOSTILE.items():
        content = row if isinstance(row, bytes) else row.encode() + b"\n"
        for place in (0, whole.index(b"\n") + 1, len(whole)):
            journal.write_bytes(whole[:place] + content + whole[place:])
            assert "is not this search" in refusal(plan) or what == "a second study", (what, place)
    journal.write_bytes(whole)
    carried_out(plan)


CHANGED = [  # of a row of this kind: a key and a value of it that no search writes
    (0, "directions", [2]), (2, "study_id", 1), (4, "study_id", 1), (4, "datetime_start", "now"), (4, "worker_id", 3),
    (5, "trial_id", 0), (5, "param_value_internal", 1e9), (5, "param_value_internal", 2.5), (5, "distribution", "{}"),
    (6, "trial_id", 3), (6, "values", None), (6, "state", True),
]  # fmt: skip
ADDED = [  # after the last row: allowed, or not
    ({"op_code": 7, "step": 10, "intermediate_value": 0.5}, True),
    ({"op_code": 7, "step": 2**63, "intermediate_value": 0.5}, False),
    ({"op_code": 7, "step": 10, "intermediate_value": math.nan}, False),
    ({"op_code": 7, "step": 10, "intermediate_value": 0.5, "trial_id": 3}, False),
    ({"op_code": 8, "user_attr": {"why": "it diverged"}}, True),
    ({"op_code": 8, "user_attr": {"how": "it diverged"}}, False),
    ({"op_code": 8, "user_attr": {"why": "x" * 2001}}, False),
    ({"op_code": 9, "system_attr": {"completed_rung_0": 0.5}}, True),
    ({"op_code": 9, "system_attr": {"completed_rung_0": math.inf}}, False),
    ({"op_code": 9, "system_attr": {"completed_rung_x": 0.5}}, False),
]


def test_each_number_name_and_time_of_a_row_is_checked(plan):
    lines = (plan.folder / "journal.jsonl").read_text().splitlines()

    def allowed(rows: list[dict]) -> bool:
        check = RowCheck(plan.settings(), plan.space)
        return all(check.allows(row) for row in rows)

    rows = [json.loads(line) for line in lines]
    assert allowed(rows)
    for kind, key, value in CHANGED:
        last = max(place for place, row in enumerate(rows) if row["op_code"] == kind and key in row)
        assert not allowed([*rows[:last], rows[last] | {key: value}, *rows[last + 1 :]]), (kind, key, value)
    for row, holds in ADDED:
        assert allowed([*rows, {"worker_id": "w", "trial_id": 2} | row]) == holds, row
    begun = next(place for place, row in enumerate(rows) if row["op_code"] == 5)
    assert not allowed([*rows[:begun], rows[begun - 1]]) and not allowed([*rows[:begun], SCORE | {"trial_id": 0}])


@pytest.mark.parametrize("name", ["journal.jsonl", "s_0000.lock", "s_0001.log", ".lock"])
def test_links_and_pipes_are_refused_and_not_followed(plan, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    place = plan.folder / name
    place.unlink(missing_ok=True)
    place.symlink_to(outside)
    assert "is a link that leads out of its folder" in refusal(plan)
    place.unlink()
    os.mkfifo(place)
    assert "is neither a file nor a folder" in refusal(plan)
    assert outside.read_text() == "precious"


def test_a_folder_that_is_a_link_is_refused(plan, tmp_path):
    shutil.move(plan.folder, tmp_path / "elsewhere")
    plan.folder.symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out" in refusal(plan)


def test_another_search_is_named_by_what_differs(plan, planned):
    journal = (plan.folder / "journal.jsonl").read_bytes()
    for words, named in (
        (["optimizer.lr=interval(1e-4,1e-1)"], "with space .*1e-2.* and this command has .*1e-1"),
        (["epochs=7"], "with words nothing, .*epochs=7"),
        (["sampler=tpe"], "with sampler random, and this command has tpe"),
        (["seed=3"], "with seed 0, and this command has 3"),
    ):
        other = moved(planned("n=3", *({"sampler=random"} - {w for w in words if "sampler" in w}), *words), "a")
        with pytest.raises(UserError, match=f"the search s was begun {named}.*choose another run_name"):
            carried_out(other)
    renamed = replace(plan, name="t")
    renamed.folder.mkdir()
    (renamed.folder / "journal.jsonl").write_bytes(journal)
    assert "line 1 of" in refusal(renamed)


def test_a_search_goes_on_in_one_process_at_a_time(plan):
    with search_of(plan):
        assert "search s is being carried out by another process right now" in refusal(plan)
    carried_out(plan)
