"""How many samples of images evaluations draw, so that they take about a fifth of a run."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from configuration.compose import typed_keys
from evaluation.evaluator import GeneratorEvaluator
from helpers_cfg import Guidance
from training.run import Run

SAMPLE_COUNTS = {
    "evaluation.samples", "evaluation.final_samples", "dataloaders.training.evaluation_samples",
    "dataloaders.training.final_evaluation_samples",
}  # fmt: skip
FEWEST_SAMPLES = 8
LIGHT, LIGHT_GPU = {"cpu": 2.5e12}, 5e14  # parameters x pixels x rows through the network that take about ten seconds


def fit_samples(run: Run, config: dict[str, Any]) -> None:
    """Draw fewer samples of images where evaluations that nobody asked for would cost more than a fifth of the run.

    The counts become part of the configuration, so a run that goes on keeps them. Where the user set the samples, these
    stay, and other scores take no more rows than they or than a fifth of the run.
    """
    evaluator, node = run.evaluator, config["evaluation"]
    typed = typed_keys(config["overrides"])
    images = len(run.dataset.state_shape) == 3 and run.inputs.flow is not None
    if not isinstance(evaluator, GeneratorEvaluator) or not images:
        return
    before, left = (evaluator.samples, evaluator.final_samples), rows_of_evaluations(run, evaluator)
    if SAMPLE_COUNTS.intersection(typed):
        allowed = max(left.allowed, left.all - left.beside)
        if left.beside > allowed and heaviness(run) * left.beside > light(run) and not config["resume"]:
            thin(evaluator, node, typed, allowed / left.beside)
            print(f"note: scores beside the samples take {allowed / left.beside:.0%} of their rows, as many as these")
        return
    if affordable_samples(run, evaluator, replace(left, beside=0)) == before:
        return
    thin(evaluator, node, typed, left.allowed / left.all)
    counts = affordable_samples(run, evaluator, rows_of_evaluations(run, evaluator))
    evaluator.samples, evaluator.final_samples = counts
    why = "so that they take about a fifth of this run"
    if FEWEST_SAMPLES in counts and rows_of_evaluations(run, evaluator).all > 1.2 * left.allowed:
        why = f"{FEWEST_SAMPLES} being the fewest, which costs so short a run more than a fifth"
    print(
        f"note: evaluations draw {counts[0]:,} samples and the last one {counts[1]:,}, not {before[0]:,} and "
        f"{before[1]:,}, {why}; set evaluation.samples= and evaluation.final_samples= for others"
    )
    node |= {"samples": counts[0], "final_samples": counts[1], "loss_samples": evaluator.loss_samples}


def thin(evaluator: GeneratorEvaluator, node: dict[str, Any], typed: Collection[str], share: float) -> None:
    """Have the metrics take a share of their rows, but for what the user set; node: the evaluation's configuration."""
    for name, metric in evaluator.metrics.items():
        for key, value in metric.thinned(share).items():
            if f"evaluation.metrics.{name}.{key}" not in typed:
                node["metrics"][name][key] = value
                setattr(metric, key, value)


def heaviness(run: Run) -> int:
    """Return parameters x pixels of a row through the network."""
    return run.state.objective.network.parameter_count() * math.prod(run.dataset.state_shape[1:])


def light(run: Run) -> float:
    """Return the rows' weight in all that such a device takes in about ten seconds."""
    return LIGHT.get(run.device.type, LIGHT_GPU)


@dataclass(frozen=True)
class EvaluationRows:
    """Rows through the network: of an evaluation during the run and of the last for their samples, of all for other scores,
    and how many take a fifth of the run. count: of the evaluations but the last.
    """

    during: float
    last: float
    beside: float
    allowed: float
    count: int

    @property
    def all(self) -> float:
        return self.count * self.during + self.last + self.beside


def rows_of_evaluations(run: Run, evaluator: GeneratorEvaluator) -> EvaluationRows:
    """Return those of a run of images, by its shape, network and length alone; a step counts as three forward passes."""
    flow = run.inputs.flow
    assert flow is not None
    passes, given = 1 + isinstance(flow.network, Guidance), (flow, run.dataset, run.inputs.solver)
    of_samples, of_all = ([rows(*given, final) for final in (False, True)] for rows in (evaluator.rows, evaluator.all_rows))
    during, last = (passes * rows for rows in of_samples)
    count = (-(-run.total_steps // run.steps_per_epoch) - 1) // run.settings.eval_every
    allowed = 3 * run.dataset.epoch_size * run.total_steps / run.steps_per_epoch / 4
    beside = count * (of_all[0] - of_samples[0]) + of_all[1] - of_samples[1]
    return EvaluationRows(during, last, beside, allowed, count)


def affordable_samples(run: Run, evaluator: GeneratorEvaluator, rows: EvaluationRows) -> tuple[int, int]:
    """Return how many samples evaluations draw, and the last one, to take what is allowed.

    Evaluations whose samples take about ten seconds on such a device (LIGHT) stay as they are.
    """
    samples, final = evaluator.samples, evaluator.final_samples
    size, most = heaviness(run), light(run)
    share = (rows.allowed - rows.beside) / (rows.all - rows.beside)
    fewer = min(samples, max(FEWEST_SAMPLES, int(share * samples)))
    left = rows.allowed - rows.beside - rows.count * rows.during * fewer / samples
    fewest = min(final, max(FEWEST_SAMPLES, int(left / rows.last * final)))
    return (
        fewer if size * rows.during > most else samples,
        fewest if size * rows.last > most and evaluator.metrics else final,
    )
