"""A trained model, away from its run: load it, sample it, ask it for velocities and densities."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.device import full_products, pick_device
from common.distributed import concatenated, world
from common.errors import UserError
from common.progress import watched
from common.ranges import Count, Positive, Steps
from common.seeds import generator_for
from common.stores import fetched
from configuration.checks import check_rows_fit
from configuration.overrides import settings_from_overrides
from configuration.stored import allow, stored_config
from configuration.values import Setting, check_value, shown
from dataloaders.base_dataloaders import Batch
from dataloaders.sources import Source
from evaluation import generate, parts
from evaluation.metrics.base_metric import Generation, as_images
from helpers_cfg import ClassifierFreeGuidance, Guidance, guided
from losses.objective import FlowObjective, Objective
from models.inputs import join_class, join_condition
from run_files.checkpoint import load_checkpoint
from run_files.provenance import weights_in_words
from solvers.base_solver import BaseSolver, Sampler
from solvers.dopri5 import Dopri5
from solvers.likelihood import LogLikelihood, encode, log_likelihood
from solvers.posterior import Observation, posterior_field

Label = int | Literal["all"] | Tensor | None
CONDITIONS = 10_000  # held-out rows whose conditions are taken in turn, at most
CPU = torch.device("cpu")
PART = 128  # samples given an observation that are computed at once: what goes back through the network is kept


@dataclass
class TrainedModel:
    """A checkpoint ready to sample: `load(path).sample(n, seed=0)`. Weights are the EMA ones.

    Data and samples are in the units of the data. velocity, flow_map and calling it are in those the flow has learned, the
    same unless dataloaders.standardize was true; `objective.in_data_units` and `objective.standardised` go between them.
    """

    objective: FlowObjective
    config: dict[str, Any]
    device: torch.device
    step: int

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int = 0,
        label: Label = None,
        solver: Sampler | None = None,
        evaluations: int | None = None,
        guidance: Guidance | float | None = None,
        together: bool = False,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return n samples (n, *state_shape) on the CPU, latents of a latent model; sample i depends on label, seed and i.

        label, condition: as in `labels`. solver, guidance: instead of the run's own; a number is a scale of classifier-free
        guidance, and 1 is none. evaluations: so many equal steps of one evaluation each instead of a solver, see few_steps.
        together: every rank calls this, and makes a share of the samples.
        UserError for more samples than this machine's memory holds.
        """
        check_value("n", n, Setting(Count))
        check_value("evaluations", evaluations, Setting(Steps | None))
        check_rows_fit("n", n, self.config["dataloaders"]["state_shape"])
        source, labels, flow = self.source, self.labels(n, label, condition), self.flow(guidance)
        if evaluations is not None:
            generate.check_guides_a_step(flow, evaluations)
            solver = generate.few_step_solver(flow, evaluations)
        solver, fresh = solver or parts.build_solver(self.config), generate.fresh_noise(source, seed)

        rows = generate.states_at_once(self.config["dataloaders"]["state_shape"])

        def chunk(first: int) -> Tensor:
            noise = generate.fixed_noise(source, min(rows, n - first), seed, first=first).to(self.device)
            own = None if labels is None else labels[first : first + rows].to(self.device)
            return generate.sample_chunk(flow, solver, noise, own, fresh, first).cpu()

        firsts, sharing = range(0, n, rows), world() if together else 1
        with watched(flow.network, f"{n:,} samples", n * solver.evaluations_ahead // sharing):
            return concatenated(firsts, chunk, together)

    @torch.no_grad()
    def posterior(
        self,
        n: int,
        observed: Tensor | Observation,
        noise: float = 0.05,
        seed: int = 0,
        label: Label = None,
        solver: BaseSolver | None = None,
        iterations: int = 5,
    ) -> Tensor:
        """Return n samples (n, *state_shape) of the data given what is observed of them, on the CPU, by `posterior_field`.

        observed: a state with NaN where it is not known, an image smaller by a whole factor, or an Observation, all in the
        units of the data. noise: standard deviation of what is observed. solver: the run's own unless given. UserError for a
        model that learned no velocity, noise that is not above 0, and a source that is no centred Gaussian.
        """
        self.objective.check_learns_velocity()
        check_value("noise", noise, Setting(Positive))
        source, chosen = self.source, solver or parts.build_solver(self.config)
        if source.gaussian_std is None or not isinstance(chosen, BaseSolver):
            raise UserError("an observation needs noise of a centred Gaussian and a solver of ODEs; use solver=midpoint")
        if not isinstance(observed, Observation):
            observed = Observation.of(observed, tuple(self.config["dataloaders"]["state_shape"]), noise)
        flow, labels, given = self.flow(), self.labels(n, label), observed
        of_states = replace(given, operator=lambda x: given.operator(flow.in_data_units(x)))

        def part(first: int) -> Tensor:
            x0 = generate.fixed_noise(source, min(PART, n - first), seed, first=first).to(self.device)
            own = None if labels is None else labels[first : first + PART].to(self.device)
            field = lambda z, t: flow.velocity(z, t, own)  # noqa: E731
            std = float(source.gaussian_std or 0)
            states = chosen.solve(posterior_field(field, flow.path, of_states, std, iterations), x0)
            return flow.in_data_units(states).cpu()

        with watched(flow.network, f"{n:,} samples", n * chosen.evaluations_ahead):
            return torch.cat([part(first) for first in range(0, n, PART)])

    def invert(self, x: Tensor, label: Label = None, solver: BaseSolver | None = None) -> Tensor:
        """Return the noise (B, ...) that the flow, under the run's guidance, carries to states x (B, *state_shape), on the
        CPU. solver: dopri5 unless given. UserError for a model that learned no velocity.
        """
        flow, labels = self.flow(), self.labels(len(x), label)
        return self.integrated(flow.standardised(x.to(self.device)), labels, solver or Dopri5(), backwards=True)

    def carry(self, noise: Tensor, label: Label = None, solver: BaseSolver | None = None) -> Tensor:
        """Return where the flow, under the run's guidance, carries noise (B, ...), on the CPU. solver: dopri5 unless given;
        `carry(invert(x))` is x but for its error. UserError for a model that learned no velocity.
        """
        states = self.integrated(noise.to(self.device), self.labels(len(noise), label), solver or Dopri5())
        return self.objective.in_data_units(states.to(self.device)).cpu()

    @torch.no_grad()
    def integrated(self, x: Tensor, labels: Tensor | None, solver: BaseSolver, backwards: bool = False) -> Tensor:
        """Return states x (B, ...) carried from t = 0 to 1, or back, on the CPU."""
        flow, label = self.flow(), None if labels is None else labels.to(self.device)
        flow.check_learns_velocity()
        field = lambda z, t: flow.velocity(z, t, label)  # noqa: E731
        with full_products():
            return (encode(field, x, solver) if backwards else solver.solve(field, x)).cpu()

    def labels(self, n: int, label: Label, condition: Tensor | None = None) -> Tensor | None:
        """Return the labels of n samples, (n,) or of a model with conditions (n, 2 + P); None for an unconditional model.

        label: as in `classes`; a tensor (n, 2 + P): labels as they are to be. condition: (*condition_shape), or one for each
        sample; None: those of held-out rows in turn, with their classes where no label is given. UserError for another.
        """
        shape = self.objective.network.condition_shape
        if shape is None:
            if condition is not None:
                raise UserError("this model takes no condition; leave it out, or train one with conditional=true")
            return self.classes(n, label)
        if isinstance(label, Tensor) and label.shape == (n, 2 + math.prod(shape)):
            return label.cpu()
        classes = self.classes(n, label)
        if condition is None:
            known = generate.in_turn(self.known_labels, n)
            return known if label is None or classes is None else join_class(known, classes)
        given = torch.as_tensor(condition).cpu().float()
        if given.shape not in (shape, (n, *shape)):
            takes = f"a tensor of shape {list(shape)}, or [{n}, ...] of one for each sample"
            raise UserError(f"condition takes {takes}, not {list(given.shape)}")
        return join_condition(classes, given.expand(n, *shape))

    @property
    def source(self) -> Source:
        """Return where the noise that samples begin at comes from, on the CPU."""
        return parts.build_source(self.config, CPU)

    @cached_property
    def known_labels(self) -> Tensor:
        """Return labels of held-out rows (N, 2 + P)."""
        known = self.real(CONDITIONS)[1]
        assert known is not None, "data with conditions have labels"
        return known

    def classes(self, n: int, label: Label) -> Tensor | None:
        """Return the classes (n,) of n samples, None for a model that knows none.

        label: a class; "all", every class in order, as equally often as n allows; labels (n,); None, the classes in turn.
        UserError for a label this model does not know.
        """
        classes = self.objective.network.num_classes
        if label is None:
            return torch.arange(n) % classes if classes else None
        if classes and label == "all" and n < classes:
            raise UserError(f"label=all wants a sample of each of the {classes} classes; give n={classes} or more")
        if classes and label == "all":
            return torch.arange(n) * classes // n
        labels = torch.as_tensor(label).cpu() if classes and not isinstance(label, str) else torch.tensor(-1)
        if labels.shape not in ((), (1,), (n,)):
            raise UserError(f"label takes a class, all, or a tensor of n={n} classes, not shape {tuple(labels.shape)}")
        labels = labels.expand(n)
        if not 0 <= int(labels.min()) <= int(labels.max()) < max(classes, 1):
            given = label if isinstance(label, (int, str)) else "(a tensor)"
            known = f"the classes 0 to {classes - 1}" if classes else "no classes; leave label out"
            raise UserError(f"label={given} does not fit: this model knows {known}")
        return labels

    def flow(self, guidance: Guidance | float | None = None) -> FlowObjective:
        """Return the objective under the run's own guidance or another. UserError where the model allows none."""
        if guidance is None:
            return parts.build_flow(self.objective, self.config, self.device)
        if guidance == 1:
            return self.objective
        if not isinstance(guidance, Guidance):
            guidance = ClassifierFreeGuidance(self.objective.network, guidance)
        return guided(self.objective, guidance)

    def images(self, states: Tensor) -> Tensor:
        """Return states (N, ...) as images on the CPU: decoded where the model works on latents."""
        return as_images(states.to(self.device), parts.build_decoder(self.config, self.device)).cpu()

    def log_prob(self, x: Tensor, label: Label = None, solver: BaseSolver | None = None) -> Tensor:
        """Return the log density in nats (B,) of states x (B, *state_shape); see log_likelihood."""
        return self.log_likelihood(x, label, solver).log_prob

    def log_likelihood(self, x: Tensor, label: Label = None, solver: BaseSolver | None = None) -> LogLikelihood:
        """Return the log density in nats of states x (B, *state_shape) under the unguided model, by the change of variables.

        label: a class, or labels as in `sample`; None: unconditional.

        On the CPU. Exact divergence up to 16 dimensions, else Hutchinson's estimate, with its standard_error (B,) in nats;
        solver: dopri5 unless given.
        """
        self.objective.check_learns_velocity()
        source = self.source.to(self.device)
        given = None if label is None else self.labels(len(x), label)
        labels = None if given is None else given.to(self.device)
        x = self.objective.standardised(x.to(self.device))
        field = lambda z, t: self.objective.velocity(z, t, labels)  # noqa: E731
        found = log_likelihood(field, x, source.log_prob, solver or Dopri5())
        error = None if found.standard_error is None else found.standard_error.cpu()
        std = self.objective.data_std  # the density is that of x, not of its standardised form
        volume = 0.0 if std is None else std.expand(x.shape[1:]).log().sum().cpu()
        return LogLikelihood(found.log_prob.cpu() - volume, error, found.x0.cpu())

    def real(self, n: int, seed: int = 0) -> Batch:
        """Return at most n held-out states of the data the model learned, on the CPU, with their labels or None."""
        return parts.build_dataset(self.config, CPU).held_out(n, generator_for(seed, "evaluation/reference"))

    def times(self, states: Tensor, *times: Tensor | float) -> list[Tensor]:
        """Return the times beside the states. UserError for states of another shape, or times not rising from 0 to 1."""
        shape, moments = self.config["dataloaders"]["state_shape"], [torch.as_tensor(t, device=states.device) for t in times]
        rise = all((a <= b).all() for a, b in itertools.pairwise([torch.tensor(0), *moments, torch.tensor(1)]))
        if list(states.shape[1:]) != shape or not rise:
            raise UserError(
                f"this model takes states of shape (B, {', '.join(map(str, shape))}) at times 0 <= r <= t <= 1, not states "
                f"of shape {tuple(states.shape)} at {shown([t.tolist() for t in moments])}"
            )
        return moments

    def mapped_times(self, states: Tensor, r: Tensor | float, t: Tensor | float) -> list[Tensor]:
        """Return `times` between which the model has learned a map. UserError for others, and for a model of none."""
        self.objective.check_learns_map()
        moments, learns = self.times(states, r, t), self.objective.learns
        from_noise, to_data = bool((moments[0] == 0).all()), bool((moments[1] == 1).all())
        if learns == "generator" and not (from_noise and to_data):
            raise UserError("this model learned the map from noise, r = 0, to data, t = 1, and no other; ask for that")
        if learns == "endpoint_map" and not to_data:
            raise UserError("this model learned maps to data, t = 1, and to no other time; ask for t=1")
        return moments

    def velocity(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Return the learned velocity, unguided, at states x (B, ...) and times t, a number or (B,)."""
        self.objective.check_learns_velocity()
        (t,) = self.times(x, t)
        return self.objective.velocity(x, t, label)

    def __call__(self, z: Tensor, r: Tensor | float, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Return the learned mean velocity u(z, r, t), unguided, of states z (B, ...) at times r headed to t >= r.

        r, t: numbers or (B,). `noise + model(noise, r=0, t=1)` are samples in one evaluation. UserError for a model that
        learned the velocity at an instant alone, and for times between which it learned no map.
        """
        r, t = self.mapped_times(z, r, t)
        return self.objective.mean_velocity(z, r, t, label)

    def flow_map(self, z: Tensor, r: Tensor | float, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Return the states z (B, ...), at times r, carried to times t by one evaluation: z + (t - r) u(z, r, t)."""
        r, t = self.mapped_times(z, r, t)
        return self.objective.flow_map(z, r, t, label)


def load(
    path: str | Path, device: str = "auto", words: Sequence[str] = (), trust: str | list[str] | None = None
) -> TrainedModel:
    """Return the generator of a checkpoint, rebuilt from the configuration stored in it. UserError for a classifier.

    words: solver and guidance settings in the place of the run's own, as on a command line. trust: modules beside the
    project's that the configuration may build parts from, as a list or `a,b`.
    """
    path = fetched(path)
    if trust is not None:
        allow(trust)
    payload, chosen = load_checkpoint(path), pick_device(device)
    config = stored_config(path, payload)
    objective = trained_objective(payload, config, path, chosen)
    if not isinstance(objective, FlowObjective):
        raise UserError(
            f"{path} holds a classifier, which makes no samples; judge it by eval_checkpoint={path}, or let it judge a "
            f"generator's by evaluation.metrics.features.network={path}"
        )
    config |= settings_from_overrides(list(words)) if words else {}
    return TrainedModel(objective, config, chosen, payload["step"])


def trained_objective(payload: dict[str, Any], config: dict[str, Any], path: Path, device: torch.device) -> Objective:
    """Return the objective around a checkpoint's EMA network, frozen."""
    objective = parts.build_objective(config, device)
    parts.load_network(objective.network, payload["ema"], path)
    return objective.eval().requires_grad_(False)


@torch.no_grad()
def generation_of(model: TrainedModel, n: int, seed: int, label: Label, evaluations: int | None, cache: Path) -> Generation:
    """Return n samples as metrics see them, beside the data the model learned; as TrainedModel.sample makes them.

    Every rank, all of which call this, makes a share of them.
    """
    device, weights = model.device, weights_in_words(model.config, model.step)
    given = parts.evaluation_inputs(model.objective, model.config, device, cache, weights)
    flow, labels = given.flow or model.objective, model.labels(n, label)
    samples = model.sample(n, seed, label, given.solver, evaluations, together=True)
    made = {
        "objective": flow, "seed": seed, "samples": samples.to(device),
        "noise": generate.fixed_noise(model.source, n, seed).to(device),
        "label": None if labels is None else labels.to(device),
    }  # fmt: skip
    few = evaluations is not None
    steps = generate.few_step_words(flow, evaluations) if few else generate.solver_words(flow, given.solver)
    return Generation(**vars(given) | made, steps=steps)
