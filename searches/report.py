"""What a search has found: its table, its best command, and the picture of its history and of what mattered."""

from __future__ import annotations

import csv
import io
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial, TrialState

from common.files import write_atomically
from evaluation.pictures import GENERATED_COLOR, REAL_COLOR, new_figure, save_figure
from run_files.result import table
from searches.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 20  # trials in the table that is printed, the best ones; trials.csv has all
ENOUGH = 5  # finished trials, from which on importances are worked out
STATES = {
    TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed", TrialState.RUNNING: "begun",
}  # fmt: skip


def described(plan: Plan) -> str:
    """Return what a search is to do."""
    goal = f"the {'highest' if plan.higher else 'lowest'} {plan.metric}"
    lines = {varied.key: varied.words() for varied in plan.space}
    lines |= {"sampler": plan.sampler, "pruner": plan.pruner, "jobs": str(plan.jobs), "folder": str(plan.folder)}
    if plan.backend.queues:
        lines |= plan.backend.describe(list(plan.words), plan.config)
    width = max(map(len, lines))
    rows = [f"  {key:<{width}}  {value}" for key, value in lines.items()]
    return "\n".join([f"search {plan.name}: {plan.count} trials for {goal}", *rows])


def outcome(plan: Plan, study: optuna.Study) -> str:
    """Write trials.csv and search.png into the search's folder; returns the table of the best trials, and the command."""
    trials = study.get_trials(deepcopy=False)
    ranked = sorted(trials, key=lambda trial: rank(trial, plan.higher))
    header = ["", "run", *(varied.key for varied in plan.space), "state", plan.metric]
    rows = [row(plan, trial, trial is ranked[0]) for trial in ranked]
    write_atomically(plan.folder / "trials.csv", as_csv([header[1:], *(cells[1:] for cells in rows)]))
    importances = importances_of(plan, study)
    draw(plan, trials, importances, plan.folder / "search.png")
    left = f"; all {len(rows)} in {plan.folder / 'trials.csv'}" if len(rows) > SHOWN else ""
    matters = ", ".join(f"{key} {share:.0%}" for key, share in importances.items()) or f"known from {ENOUGH} trials on"
    best = study.best_trial
    command = [f"run_name={plan.name}_best", *plan.trial_words(best.number, best.params)[1:]]
    return "\n".join([
        f"search: {len(rows)} trials, * the {'highest' if plan.higher else 'lowest'} {plan.metric}{left}",
        table([header, *rows[:SHOWN]]),
        f"what mattered: {matters}",
        f"pictures: {plan.folder / 'search.png'}",
        f"best: python launcher.py {shlex.join(command)}",
    ])  # fmt: skip


def rank(trial: FrozenTrial, higher: bool) -> tuple[int, float, int]:
    """Return what trials are sorted by: finished ones, the best first, then pruned and failed ones."""
    order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    value = trial.values[0] if trial.values else math.inf
    return order.index(trial.state) if trial.state in order else len(order), -value if higher else value, trial.number


def row(plan: Plan, trial: FrozenTrial, best: bool) -> list[str]:
    values = [varied.word(trial.params[varied.key]).partition("=")[2] for varied in plan.space]
    cells = [short(value) for value in values]
    score = f"{trial.values[0]:.4g}" if trial.values else "-"
    why = f" ({trial.user_attrs['why']})" if "why" in trial.user_attrs else ""
    return ["*" * best, plan.trial_name(trial.number), *cells, STATES[trial.state] + why, score]


def short(text: str) -> str:
    """Return a number with four digits, any other text as it is."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def as_csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def importances_of(plan: Plan, study: optuna.Study) -> dict[str, float]:
    """Return each key's share in the variance of the score (Hutter et al. 2014), the largest first; none of few trials."""
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if len(finished) < ENOUGH or len({trial.values[0] for trial in finished}) < ENOUGH:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances  # with scikit-learn, a second

    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {key: float(share) for key, share in shares.items()}


def draw(plan: Plan, trials: list[FrozenTrial], importances: dict[str, float], path: Path) -> None:
    """Draw the score of each trial with the best so far, and the share of each key."""
    figure = new_figure(360, f"search {plan.name}", f"{len(trials)} trials, sampler {plan.sampler}")
    history, shares = figure.subplots(1, 2, width_ratios=(1.6, 1))
    draw_history(history, plan, trials)
    draw_shares(shares, importances)
    figure.subplots_adjust(left=0.09, right=0.985, bottom=0.14, top=0.8, wspace=0.5)
    save_figure(figure, path)


def draw_history(axes: Axes, plan: Plan, trials: list[FrozenTrial]) -> None:
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    numbers, values = [trial.number + 1 for trial in finished], [trial.values[0] for trial in finished]
    pick = max if plan.higher else min
    best = [pick(values[: place + 1]) for place in range(len(values))]
    axes.plot(numbers, values, "o", color=GENERATED_COLOR, markersize=4, label="a trial")
    axes.step(numbers, best, where="post", color=REAL_COLOR, label="the best so far")
    axes.set_xlabel("trial")
    axes.set_title(plan.metric, fontsize=10)
    axes.legend(fontsize=8)
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")


def draw_shares(axes: Axes, importances: dict[str, float]) -> None:
    keys = list(importances)[::-1]
    axes.barh(keys, [importances[key] for key in keys], color=GENERATED_COLOR)
    axes.set_xlim(0, 1)
    axes.set_title("share in the variance of the score" if keys else "too few trials for shares", fontsize=10)
    axes.tick_params(axis="y", labelsize=8)
