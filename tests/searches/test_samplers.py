"""What a search varies, and CMA-ES worked out from its trials: against closed forms, without a run."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from configuration.compose import parse_overrides
from configuration.values import Setting
from searches import space
from searches.samplers import costs, evolved
from searches.space import Varied, divided, varied_by


def varied(typed: str, kind: Any = float) -> Varied:
    (override,) = parse_overrides([typed])
    return varied_by(override, Setting(kind))


def trials(*values: float | None) -> Any:
    return [SimpleNamespace(values=None if value is None else [value]) for value in values]


def test_a_key_that_is_added_keeps_its_plus() -> None:
    assert varied("+optimizer.eps=interval(1e-8,1e-6)").word(1e-7) == "+optimizer.eps=1e-07"
    assert varied("++a=choice(x,y)").word("x") == "++a=x" and varied("a=choice(x,y)").word("x") == "a=x"


@pytest.mark.parametrize(
    ("typed", "kind", "log", "whole"),
    [
        ("a=interval(1e-4,1e-2)", float, True, False),
        ("a=interval(0.5,5.0)", float, True, False),
        ("a=interval(0.5,4.9)", float, False, False),
        ("a=interval(0.0,4.9)", float, False, False),
        ("a=interval(2,5)", int | None, False, True),
        ("a=interval(2.0,20.0)", int, True, True),
        ("a=interval(2.0,20.0)", int | float, True, False),
        ("a=tag(linear,interval(0.1,9.0))", float, False, False),
        ("a=tag(log,interval(1.0,2.0))", float, True, False),
    ],
)
def test_an_interval_has_the_scale_and_the_numbers_that_its_ends_key_and_tag_say(typed, kind, log, whole):
    found = varied(typed, kind)
    assert (found.log, found.whole) == (log, whole)
    assert (found.distribution.log, isinstance(found.distribution.low, int)) == (log, whole)


def test_places_of_an_interval_are_even_on_its_scale_and_whole_numbers_have_equal_shares():
    places = np.linspace(0, 1, 12_001)
    linear, log = varied("a=tag(linear,interval(0.1,9.1))"), varied("a=interval(1e-4,1e-2)")
    assert [linear.at(place) for place in (0, 0.25, 1)] == pytest.approx([0.1, 2.35, 9.1])
    assert [log.at(place) for place in (0, 0.25, 1)] == pytest.approx([1e-4, 10**-3.5, 1e-2])
    few, many = varied("a=interval(2,5)", int), varied("a=interval(1,15)", int)
    shares, logs = (Counter(whole.at(place) for place in places) for whole in (few, many))
    assert shares == {2: 3000, 3: 3000, 4: 3000, 5: 3001}
    assert min(logs) == 1 and max(logs) == 15 and logs[1] == 3000  # log 2 of log 16


def test_a_value_is_typed_with_all_its_digits():
    assert float(varied("a=interval(0.0,1.0)").word(1 / 3).removeprefix("a=")) == 1 / 3
    assert varied("a=interval(2,5)", int).word(3) == "a=3"


@pytest.mark.parametrize("typed", ["a=range(0,4)", "a=1,2,3,4", "a=range(3,3)", "a=1,2,1"])
def test_a_list_that_is_empty_too_long_or_repeats_itself_is_refused(typed, monkeypatch):
    monkeypatch.setattr(space, "MOST", 3)
    with pytest.raises(UserError, match=r"a value twice|lists no values, or more than 3"):
        varied(typed)
    assert varied("a=range(0,3)").texts == ("0", "1", "2")


def test_what_is_fixed_and_what_varies():
    fixed, found = divided(["b=1", "a=1,2", "c=x"])
    assert fixed == ["b=1", "c=x"] and [override.key_or_group for override in found] == ["a"]


def test_a_generations_costs_are_to_be_made_small_and_a_trial_without_a_value_has_its_worst():
    assert costs(trials(1.0, None, 3.0), higher=False) == [1, 3, 3]
    assert costs(trials(1.0, None, 3.0), higher=True) == [-1, -1, -3]
    assert costs(trials(None, None), higher=False) == [0, 0]


@pytest.mark.parametrize("higher", [False, True])
def test_cma_es_goes_where_the_score_is_best_and_each_number_has_its_own_parameters(higher):
    """The minimum of a bowl at (0.2, 0.9) of two intervals, and the maximum of the bowl upside down."""
    two, known, found = [varied("a=interval(0.0,1.0)"), varied("b=interval(0.0,2.0)")], trials(), []
    for number in range(90):
        found.append(evolved(two, 3, number, known, higher))
        score = (found[-1]["a"] - 0.2) ** 2 + (found[-1]["b"] - 1.8) ** 2
        known += trials(-score if higher else score)
    assert len({tuple(point.values()) for point in found}) == 90
    assert found[7] == evolved(two, 3, 7, known[:7], higher) != evolved(two, 4, 7, known[:7], higher)
    last = np.array([list(point.values()) for point in found[-6:]])
    assert np.abs(last - [0.2, 1.8]).max() < 0.2 and np.abs(last.mean(0) - [0.2, 1.8]).max() < 0.1


def test_the_first_generation_is_normal_about_the_middle_of_the_unit_cube():
    """Of std 0.3, drawn again where it falls outside: then of std 0.239."""
    two = [varied("a=interval(0.0,1.0)"), varied("b=interval(0.0,2.0)")]
    first = np.array([list(evolved(two, seed, 0, trials(), False).values()) for seed in range(200)]) / [1, 2]
    assert np.abs(first.mean(0) - 0.5).max() < 4 * 0.239 / 200**0.5
    assert np.abs(first.std(0) - 0.239).max() < 4 * 0.239 / 400**0.5
