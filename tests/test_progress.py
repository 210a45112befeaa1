"""Time: what is said of it before, what is shown while it passes, and how many samples are drawn so that it is short."""

import os
import pty
import sys
from pathlib import Path

import pytest
import torch

import common.progress as progress_module
from backends.submission import prepare
from common.progress import Progress, duration, each, seconds_a_row
from evaluation.evaluator import GeneratorEvaluator
from evaluation.generate import states_at_once
from evaluation.metrics.empirical import Memorised
from evaluation.sample import TrainedModel, load
from training.assemble import assemble
from training.evaluation_budget import EvaluationRows, affordable_samples
from training.run import Run


class Clock:
    """Stands still but when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stands = Clock()
    monkeypatch.setattr(progress_module, "time", stands)
    return stands


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.21, "3.2 s"), (119, "119 s"), (400, "6.7 min"), (5400, "90 min"), (9000, "2.5 h"), (3e7, "347 days")],
)
def test_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_long_job_says_how_long_and_goes_on_saying_it_sparsely(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in each(range(1000), "evaluation"):
        clock.now += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["evaluation: about 17 min left", "evaluation: 10% done, about 15 min left"]
    assert len(lines) == 10


def test_the_first_of_many_steps_is_no_measure_of_the_others(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for i in each(range(200), "training"):
        clock.now += 30.0 if i == 0 else 0.1
    assert capsys.readouterr().err == "training: about 19 s left\n"


def test_a_short_job_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in each(range(9), "evaluation"):
        clock.now += 1.0
    assert capsys.readouterr() == ("", "")


def test_the_time_left_counts_from_where_a_run_goes_on(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress("training", 1000, 900)
    clock.now = 10.0
    shown.advance(50)
    assert capsys.readouterr().err == "training: about 10 s left\n"


def test_a_terminal_of_unknown_size_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()  # 0 rows of 0 columns, as over a serial line
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_module.bar(desc="training", total=10) as bar:
            bar.update(3)
            bar.refresh()
    seen = b""
    while b"3/10" not in seen:  # OSError at the end of what was written
        seen += os.read(leader, 4096)
    os.close(leader)


def test_nothing_is_shown_without_stderr(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(each(range(3), "evaluation")) == [0, 1, 2]


def test_a_trial_of_what_is_slow_stops_early() -> None:
    tried: list[int] = []
    seconds_a_row(tried.append, 1000, torch.device("cpu"))
    assert tried[0] == 2 and tried[-2:] == [1000, 1000]


def judged(*overrides: str) -> tuple[Run, GeneratorEvaluator]:
    run = assemble(prepare(["run_name=x", "device=cpu", *overrides]))
    assert isinstance(run.evaluator, GeneratorEvaluator)
    return run, run.evaluator


def counts(*overrides: str) -> tuple[int, int]:
    """Samples of evaluations and of the last one."""
    run, _ = judged(*overrides)
    assert isinstance(run.evaluator, GeneratorEvaluator)
    assert run.records.config["evaluation"]["samples"] == run.evaluator.samples
    assert run.records.config["evaluation"]["final_samples"] == run.evaluator.final_samples
    memorised = run.evaluator.metrics.get("memorised")
    if isinstance(memorised, Memorised):
        kept = run.records.config["evaluation"]["metrics"]["memorised"]
        assert [kept.get("draws", 1024), kept.get("final_draws", 4096)] == [memorised.draws, memorised.final_draws]
    return run.evaluator.samples, run.evaluator.final_samples


SHORT = ["dataloaders=photos", "dataloaders.crops=100", "dataloaders.held_out_crops=10", "model=unet_small", "max_steps=20"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param(["experiment=digits"], (200, 1000), id="digits"),
        pytest.param(["experiment=digits_conditional"], (200, 1000), id="digits by class"),
        pytest.param(["experiment=digits_one_step"], (200, 1000), id="digits in one step"),
        pytest.param(["experiment=photos"], (100, 500), id="photos"),
        pytest.param(["dataloaders=kmeans", "max_steps=1"], (2000, 10_000), id="points"),
        pytest.param(["dataloaders=digits", "model=cnn", "model.width=8", "max_steps=20"], (200, 1000), id="light"),
        pytest.param([*SHORT, "evaluation.samples=300"], (300, 1000), id="typed"),
        pytest.param(SHORT, (8, 8), id="heavy and short"),
        pytest.param([*SHORT, "evaluation=loss_only"], (8, 1000), id="pictures alone"),
    ],
)
def test_evaluations_of_images_cost_about_a_fifth_of_the_run_unless_asked_for(
    overrides: list[str], expected: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert counts(*overrides) == expected
    assert ("more than a fifth" in capsys.readouterr().out) == (expected == (8, 8))


@pytest.mark.parametrize(("typed", "during"), [([], 0), (["evaluation.metrics.memorised.draws=700"], 700)])
def test_a_short_run_looks_for_copies_at_its_end_alone_unless_asked_to(typed: list[str], during: int) -> None:
    _, evaluator = judged(*SHORT, *[f"+{word}" for word in typed])
    memorised = evaluator.metrics["memorised"]
    assert isinstance(memorised, Memorised) and (memorised.draws, memorised.final_draws) == (during, 128)


@pytest.mark.parametrize(("count", "allowed"), [(3, 3000), (3, 1500), (0, 3000)])
def test_samples_take_what_the_other_scores_leave_of_a_fifth(count: int, allowed: int) -> None:
    run, evaluator = judged(*SHORT)
    evaluator.samples, evaluator.final_samples = 1000, 4000
    rows = EvaluationRows(during=1e9, last=4e9, beside=5e8, allowed=allowed * 1e6, count=count)
    during, last = affordable_samples(run, evaluator, rows)
    taken = rows.count * rows.during * during / 1000 + rows.last * last / 4000 + rows.beside
    assert 8 < during < 1000 and 8 < last < 4000 and 0.99 * rows.allowed < taken <= rows.allowed
    assert during / 1000 == pytest.approx(last / 4000, rel=0.02)


def test_a_run_that_goes_on_keeps_its_counts(small_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluation_budget.LIGHT", {"cpu": 0.0})
    monkeypatch.setattr("training.evaluation_budget.SAMPLE_COUNTS", set())  # small_run types them
    folder = small_run("x", "dataloaders=digits", "dataloaders.epoch_size=1438", "model=cnn", "model.width=8", "max_steps=2")
    resume = ["run_name=x", "resume=true", f"output_dir={folder}", f"log.file={tmp_path / 'log.md'}"]
    assert counts(*resume, "max_steps=20000") == counts(*resume) == (19, 64)


@pytest.mark.parametrize(("samples", "draws"), [(20, 808), (4000, 4096)])
def test_few_samples_are_not_kept_waiting_for(samples: int, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluation_budget.LIGHT", {"cpu": 0.0})
    _, evaluator = judged(*SHORT, f"evaluation.samples={samples}", f"evaluation.final_samples={samples}")
    memorised = evaluator.metrics["memorised"]
    assert isinstance(memorised, Memorised) and memorised.final_draws == draws and evaluator.final_samples == samples


@pytest.mark.parametrize(("shape", "rows"), [((2,), 1024), ((3, 32, 32), 1024), ((3, 64, 64), 341), ((3, 1024, 1024), 1)])
def test_large_pictures_go_through_a_network_in_smaller_parts(shape: tuple[int, ...], rows: int) -> None:
    assert states_at_once(shape) == rows


def test_samples_do_not_hang_on_being_watched(small_run, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    model: TrainedModel = load(small_run("x") / "ckpts/mlp/x_last.pt")
    capsys.readouterr()
    network = model.objective.network
    network.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 10))
    samples = model.sample(1500)
    assert torch.equal(samples[:1024], model.sample(1024))
    assert "1,500 samples: about" in capsys.readouterr().err
    assert len(network._forward_hooks) == 1
