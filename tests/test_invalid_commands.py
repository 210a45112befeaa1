"""Command lines that are wrong by construction, in real processes; `python scripts/invalid_commands.py` is the long form."""

from scripts.invalid_commands import CONTRADICTIONS, drawn, try_all


def test_forty_wrong_command_lines_are_refused_and_change_nothing():
    outcomes = try_all(40, jobs=2)
    assert len(outcomes) == 40
    assert [(outcome.faults(), outcome.words, outcome.said) for outcome in outcomes if outcome.faults()] == []


def test_the_commands_vary():
    words = [" ".join(command) for command in drawn(300)]
    assert len(set(words)) == 300
    assert sum(any(" ".join(c) in word for c in CONTRADICTIONS) for word in words) > 5
