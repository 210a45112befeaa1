"""The paths from noise to data that a trained flow makes, for losses.couplings.ReflowCoupling."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.seeds import fork_generators, generator_for
from common.stores import fetched
from evaluation.generate import data_labels, fixed_noise
from evaluation.metrics.cache import cache_file, cached
from evaluation.parts import build_dataset, build_solver, file_hash
from evaluation.sample import TrainedModel, load
from losses.couplings import IndependentCoupling, Paths
from losses.objective import FlowObjective
from solvers.base_solver import FreshNoise, Sampler, StepCallback

REFLOW_SEED = 1_000_003  # of a teacher's samples, unlike any run's seed
KEPT_UP_TO = 64 * 2**20  # bytes: larger sets of paths are made again by a run that goes on
CPU = torch.device("cpu")


class TeacherPairs:
    """Makes paths by a checkpoint's EMA weights, source and solver, always the same; small sets are kept in `cache`."""

    def __init__(self, cache: str | None = None):
        self.cache = cache

    def __call__(self, teacher: str, count: int, like: Tensor, points: int = 2) -> Paths:
        """Return `count` paths of so many states at equally many steps from each other, on the device of `like` (B, ...).

        The noise comes first, where it is carried last. A conditional teacher's labels come as often as in its data.
        UserError for states of another shape than `like`, or more points than the teacher's solver has.
        """
        with fork_generators(like.device):  # building reseeds torch's own
            model = load(teacher, like.device.type)
            shape = tuple(model.config["dataloaders"]["state_shape"])
            if shape != like.shape[1:]:
                raise UserError(
                    f"loss.coupling.teacher={teacher} makes states of shape {shape}, the data has {tuple(like.shape[1:])}; "
                    "use a teacher of this data"
                )
            made = lambda: made_paths(model, count, points)  # noqa: E731
            if self.cache is None or 4 * points * count * like[0].numel() > KEPT_UP_TO:
                return moved(made(), like.device)
            key: dict[str, object] = {"teacher": file_hash(fetched(teacher)), "count": count, "points": points}
            path = cache_file(Path(self.cache), "teacher_paths", key, ".npz")
            return moved(cached(path, made, read_paths, content), like.device)


def made_paths(model: TrainedModel, count: int, points: int) -> Paths:
    """Return what TeacherPairs does, on the CPU."""
    data, objective = build_dataset(model.config, CPU), model.objective
    label = data_labels(data, objective.network.is_conditional, count, generator_for(REFLOW_SEED, "reflow/labels"))
    if points > 2:
        recorder = PathRecorder(model, points)
        states = model.sample(count, seed=REFLOW_SEED, label=label, solver=recorder).transpose(0, 1).contiguous()
        times = recorder.kept_times()
    else:
        noise = fixed_noise(model.source, count, REFLOW_SEED)
        states, times = torch.stack([noise, model.sample(count, seed=REFLOW_SEED, label=label)]), torch.tensor([0.0, 1.0])
    guided, own = model.config.get("guidance"), isinstance(objective.coupling, IndependentCoupling)
    return Paths(states, times, label, own and not guided and not build_solver(model.config).renoises)


def moved(paths: Paths, device: torch.device) -> Paths:
    """Return the paths on a device."""
    label = None if paths.label is None else paths.label.to(device)
    return replace(paths, states=paths.states.to(device), times=paths.times.to(device), label=label)


class PathRecorder(Sampler):
    """A model's own solver, whose samples are whole paths (B, points, ...) of states equally many steps apart.

    UserError for a solver that has not so many steps, or adds noise, and for a model of standardised data.
    """

    def __init__(self, model: TrainedModel, points: int):
        solver = build_solver(model.config)
        super().__init__(solver.steps, solver.grid)
        if solver.renoises or points > solver.steps + 1 or model.objective.data_std is not None:
            raise UserError(
                f"loss.coupling.points={points} takes the states of a solver of at least {points - 1} steps that adds no "
                f"noise, on data as they are; this teacher has {type(solver).__name__} of {solver.steps}"
                + (" and standardized data" if model.objective.data_std is not None else "")
            )
        self.solver, self.kept = solver, [round(k * solver.steps / (points - 1)) for k in range(points)]

    @property
    def evaluations_ahead(self) -> int:
        return self.solver.evaluations_ahead

    def kept_times(self) -> Tensor:
        """Return the times (points,) of the states."""
        return self.solver.times(torch.zeros(1))[self.kept]

    def sample(
        self, flow: FlowObjective, x0: Tensor, label: Tensor | None, fresh: FreshNoise, callback: StepCallback | None = None
    ) -> Tensor:
        states: list[Tensor] = []
        self.solver.sample(flow, x0, label, fresh, lambda x, t: states.append(x))
        return torch.stack([states[k] for k in self.kept], dim=1)


def read_paths(stored: bytes) -> Paths:
    """Return the paths that `content` wrote. ValueError or KeyError for other bytes."""
    held = {name: torch.from_numpy(array) for name, array in np.load(io.BytesIO(stored)).items()}
    return Paths(held["states"], held["times"], held["label"] if len(held["label"]) else None, bool(held["of_data"]))


def content(paths: Paths) -> bytes:
    """Return paths as the bytes of a file, without labels as none of them."""
    label = np.empty(0) if paths.label is None else paths.label.numpy()
    states, times = paths.states.numpy(), paths.times.numpy()
    np.savez(stored := io.BytesIO(), states=states, times=times, label=label, of_data=np.array(paths.of_data))
    return stored.getvalue()
