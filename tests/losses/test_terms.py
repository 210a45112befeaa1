"""What an objective returns, made uniform, and its means between two log lines."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from losses.terms import LossOutput, Weight, named_terms
from training.state import Window

TWO = [torch.tensor(2.0), torch.tensor(5.0)]
NAMED = dict(zip(("flow", "end"), TWO, strict=True))


@pytest.mark.parametrize("output, weights, expected", [
    (TWO[0], {}, {"loss": 2.0}),
    (TWO, {}, {"term_0": 2.0, "term_1": 5.0, "loss": 7.0}),
    (TWO, {"term_1": 0.5}, {"term_0": 2.0, "term_1": 5.0, "loss": 4.5}),
    (TWO, {"term_0": 0.0, "term_1": -1.0}, {"term_0": 2.0, "term_1": 5.0, "loss": -5.0}),
    (NAMED, {}, {"flow": 2.0, "end": 5.0, "loss": 7.0}),
    (NAMED, {"flow": 3}, {"flow": 2.0, "end": 5.0, "loss": 11.0}),
    ({**NAMED, "loss": torch.tensor(1.0)}, {}, {"flow": 2.0, "end": 5.0, "loss": 1.0}),
])  # fmt: skip
def test_every_kind_of_output_becomes_named_terms_and_a_total(
    output: LossOutput, weights: dict[str, float], expected: dict[str, float]
) -> None:
    terms = named_terms(output, weights)
    assert {name: term.item() for name, term in terms.items()} == expected
    assert all(term.ndim == 0 for term in terms.values())


def test_the_totals_gradient_is_the_weighted_sum_and_the_objectives_own_dict_is_left_alone() -> None:
    x = torch.tensor([2.0, 5.0], requires_grad=True)
    output = {"flow": x[0], "end": x[1]}
    named_terms(output, {"end": 0.25})["loss"].backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.25]
    assert list(output) == ["flow", "end"]


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 1.0), (0.1, 1.0), (0.35, 0.55), (0.6, 0.1), (1.0, 0.1)])
def test_a_weight_follows_its_course_over_the_run(progress: float, weight: float) -> None:
    course: dict[str, Weight] = {"end": [[0.1, 1.0], [0.6, 0.1]]}
    assert named_terms(NAMED, course, progress)["loss"].item() == pytest.approx(2 + 5 * weight)
    assert named_terms(NAMED, course)["loss"].item() == pytest.approx(2.5)


@pytest.mark.parametrize("course", [
    [], [[0.0]], [[0.5, 1.0], [0.2, 1.0]], [[0.0, 1.0], [1.5, 1.0]], [[-0.1, 1.0]], [[0.0, 1.0, 2.0]],
    [[0.0, 1.0], [0.8, 0.5], [0.5, 0.2], [1.0, 0.1]],
])  # fmt: skip
def test_a_course_that_is_none_is_refused(course: list[list[float]]) -> None:
    with pytest.raises(UserError, match="is no course over a run"):
        named_terms(NAMED, {"end": course})


@pytest.mark.parametrize("output, weights, word", [
    (NAMED, {"flwo": 1.0}, "loss_weights.flwo"),
    (NAMED, {"flow": 1.0, "term_0": 1.0}, "loss_weights.term_0"),
    (TWO, {"flow": 1.0}, "term_0, term_1"),
    (TWO, {"term_2": 1.0}, "loss_weights.term_2"),
    (TWO[0], {"loss": 2.0}, "already totalled"),
    ({**NAMED, "loss": TWO[0]}, {"flow": 2.0}, "already totalled"),
])  # fmt: skip
def test_a_weight_that_would_weigh_nothing_is_refused(output: LossOutput, weights: dict[str, float], word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        named_terms(output, weights)
    assert "\n" not in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_a_window_gives_the_mean_of_each_name(values: list[float]) -> None:
    window = Window()
    for value in values:
        window.add({"loss": torch.tensor(value), "twice": torch.tensor(2 * value)})
    mean = sum(values) / len(values)
    assert window.means() == {"loss": pytest.approx(mean, abs=1e-3), "twice": pytest.approx(2 * mean, abs=1e-3)}


def test_a_window_keeps_neither_graphs_nor_the_steps_own_tensors() -> None:
    window, value = Window(), torch.tensor(3.0, requires_grad=True)
    window.add({"loss": value})
    value.data.fill_(100.0)
    assert window.means() == {"loss": 3.0}
    assert not window.sums["loss"].requires_grad


def test_half_precision_values_are_summed_in_full() -> None:
    window = Window()
    for _ in range(1000):
        window.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert window.means() == {"loss": 1.0}


def test_an_empty_window_has_no_means_and_clearing_starts_anew() -> None:
    window = Window()
    assert window.means() == {} and window.non_finite() is None
    window.add({"old": torch.tensor(8.0)})
    window.clear()
    assert window.means() == {}
    window.add({"loss": torch.tensor(1.0)})
    assert window.means() == {"loss": 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named_even_among_good_steps(bad: float) -> None:
    window = Window()
    window.add({"loss": torch.tensor(1.0), "end": torch.tensor(1.0)})
    assert window.non_finite() is None
    window.add({"loss": torch.tensor(1.0), "end": torch.tensor(bad)})
    window.add({"loss": torch.tensor(1.0), "end": torch.tensor(1.0)})
    assert window.non_finite() == "end"


def test_a_gradient_norm_may_overflow_under_fp16_alone() -> None:
    window = Window()
    window.add({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(math.inf)})
    assert window.non_finite(overflows=True) is None and window.non_finite() == "grad_norm"


def test_a_window_goes_on_from_its_saved_state() -> None:
    window, resumed = Window(), Window()
    window.add({"loss": torch.tensor(1.0)})
    resumed.load_state_dict(window.state_dict(), torch.device("cpu"))
    for part in (window, resumed):
        part.add({"loss": torch.tensor(4.0)})
    assert window.means() == resumed.means() == {"loss": 2.5}
