"""A trained model, away from its run: load it, sample it, score it, draw it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.evaluator import few_steps, fixed_labels, fixed_noise, generate
from evaluation.report import draw_picture, print_scores
from losses.objective import FlowObjective
from solvers.base_solver import BaseSolver
from solvers.dopri5 import Dopri5
from solvers.likelihood import log_likelihood
from training.assemble import (
    build_dataset,
    build_objective,
    build_solver,
    build_source,
    dataset_key,
    load_network,
)
from training.build import build
from training.checkpoint import load_checkpoint
from training.checks import check_values
from training.config import compose_config, parse_overrides, resolved
from training.device import pick_device
from training.errors import UserError
from training.launch import laid_over
from training.seeds import generator_for


@dataclass
class TrainedModel:
    """A checkpoint ready to sample: `load(path).sample(n, seed=0)`. Weights are the EMA ones."""

    objective: FlowObjective
    config: dict[str, Any]
    device: torch.device
    step: int

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int = 0,
        label: int | None = None,
        solver: BaseSolver | None = None,
        evaluations: int | None = None,
    ) -> Tensor:
        """n samples (n, *state_shape) on the CPU; sample i depends on the seed and i alone.

        label: the class of all samples of a conditional model (None: the classes in turn). solver: instead of the run's.
        evaluations: by the flow map in so many steps, one evaluation each, instead of a solver (one-step objectives).
        """
        noise = fixed_noise(build_source(self.config, torch.device("cpu")), n, seed).to(self.device)
        classes = self.objective.network.num_classes
        if label is not None and not 0 <= label < classes:
            raise UserError(
                f"label={label} does not fit: this model knows "
                + (f"the classes 0 to {classes - 1}" if classes else "no classes; leave label out")
            )
        labels = fixed_labels(classes, n) if label is None else torch.full((n,), label)
        labels = None if labels is None else labels.to(self.device)
        if evaluations is not None:
            return few_steps(self.objective, noise, labels, evaluations).cpu()
        return generate(self.objective.velocity, solver or build_solver(self.config), noise, labels).cpu()

    def log_prob(self, x: Tensor, label: Tensor | None = None, solver: BaseSolver | None = None) -> Tensor:
        """Log density in nats (B,) of states x (B, *state_shape) under the model, by the change of variables.

        Exact divergence up to 16 dimensions, else Hutchinson's estimate; solver: dopri5 unless given.
        """
        source = build_source(self.config, self.device)
        label = None if label is None else label.to(self.device)
        x = x.to(self.device)
        field = lambda z, t: self.objective.velocity(z, t, label)  # noqa: E731
        return log_likelihood(field, x, source.log_prob, solver or Dopri5()).log_prob.cpu()

    def real(self, n: int, seed: int = 0) -> Tensor:
        """At most n held-out states of the data the model learned, on the CPU."""
        dataset = build_dataset(self.config, torch.device("cpu"))
        return dataset.held_out(n, generator_for(seed, "evaluation/reference"))[0]

    def velocity(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The learned velocity at states x (B, ...) and times t, a number or (B,)."""
        return self.objective.velocity(x, torch.as_tensor(t, device=x.device), label)


def load(path: str | Path, device: str = "auto") -> TrainedModel:
    """The model of a checkpoint, rebuilt from the configuration stored in it. UserError if that cannot be done."""
    payload = load_checkpoint(Path(path))
    return trained_model(payload, payload["config"], Path(path), pick_device(device))


def solver_from_overrides(words: list[str]) -> BaseSolver:
    """A solver named on a command line, e.g. ["solver=rk4", "solver.steps=8"]. UserError for what is not one."""
    config = resolved(compose_config(["run_name=sample", *words]))
    check_values(config)
    return build_solver(config)


def trained_model(payload: dict[str, Any], config: dict[str, Any], path: Path, device: torch.device) -> TrainedModel:
    objective = build_objective(config, device)
    load_network(objective.network, payload["ema"], path)
    return TrainedModel(objective.eval().requires_grad_(False), config, device, payload["step"])


def evaluate_checkpoint(config: dict[str, Any]) -> None:
    """Score a checkpoint with its own configuration, typed overrides laid over it, and draw its samples.

    No tracker run; the picture goes to outputs/evaluations/<run_name>.png.
    """
    path = Path(config["eval_checkpoint"])
    payload = load_checkpoint(path)
    merged = laid_over(payload["config"], config, parse_overrides(config["overrides"]))
    device = pick_device(config["device"])
    model = trained_model(payload, merged, path, device)
    solver = build_solver(merged)
    print(f"{path}: {payload['run_name']} at step {payload['step']:,}, EMA weights, {device.type}")
    evaluation = build(merged["evaluation"]).evaluate(
        model.objective, build_dataset(merged, device), build_source(merged, device), solver, merged["seed"],
        dataset_key(merged), Path(config["output_dir"]) / "cache", final=True,
    )  # fmt: skip
    print_scores(evaluation, solver.evaluations)
    picture = Path(config["output_dir"]) / "evaluations" / f"{config['run_name']}.png"
    if draw_picture(picture, evaluation, f"{payload['run_name']}, step {payload['step']}"):
        print(f"  picture  {picture}")
