"""The run mode eval_checkpoint: score a checkpoint and draw its samples."""

import json
from pathlib import Path
from typing import Any

from common.device import pick_device
from common.distributed import rank
from common.errors import UserError
from common.files import write_atomically
from common.stores import fetched
from configuration.build import build
from configuration.compose import parse_overrides
from configuration.overrides import laid_over
from configuration.stored import stored_config
from evaluation.evaluator import Evaluator
from evaluation.parts import evaluation_inputs
from evaluation.report import draw_neighbours, draw_picture, print_scores
from evaluation.sample import trained_objective
from evaluation.teacher import give_teacher
from run_files.checkpoint import load_checkpoint
from run_files.provenance import weights_in_words
from run_files.result import scores_file
from run_files.stored_values import json_number


def evaluate_checkpoint(config: dict[str, Any]) -> None:
    """Score a checkpoint with its own configuration, typed overrides laid over it, and draw its samples.

    No tracker run; scores and picture go to outputs/evaluations/<run_name>.json and .png.
    """
    path = fetched(config["eval_checkpoint"])
    payload = load_checkpoint(path)
    merged = laid_over(stored_config(path, payload), config, parse_overrides(config["overrides"]))
    device = pick_device(config["device"])
    objective = trained_objective(payload, merged, path, device)
    if payload["second_time"] != objective.second_time:
        raise UserError(
            f"{path} was trained with second_time={payload['second_time']} and cannot be read as a loss whose second "
            f"time is {objective.second_time}; leave loss out"
        )
    evaluator: Evaluator = build(merged["evaluation"])
    evaluator.check(objective)
    weights = weights_in_words(payload["config"], payload["step"])
    print(f"{path}: {payload['run_name']}, {weights}, {device.type}")
    given = evaluation_inputs(objective, merged, device, Path(config["output_dir"]) / "cache", weights)
    give_teacher([objective], merged, given.dataset, given.source, device)
    if rank():
        evaluator.evaluate_on_worker(given)
        return
    evaluation = evaluator.evaluate(given)
    print_scores(evaluation, given.solver.evaluations)
    scores = scores_file(config)
    scores.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(scores, json.dumps({name: json_number(value) for name, value in evaluation.values.items()}) + "\n")
    print(f"  scores   {scores}")
    picture, beside = scores.with_suffix(".png"), scores.with_name(f"{scores.stem}_neighbours.png")
    if draw_picture(picture, evaluation, f"{payload['run_name']}, step {payload['step']}"):
        print(f"  picture  {picture}")
    if draw_neighbours(beside, evaluation, payload["run_name"]):
        print(f"  picture  {beside}")
