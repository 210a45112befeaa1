"""The pairs of noise and data that a trained flow makes, for losses.couplings.ReflowCoupling."""

import torch
from torch import Tensor

from common.errors import UserError
from common.seeds import fork_generators, generator_for
from evaluation.generate import data_labels, fixed_noise
from evaluation.parts import build_dataset, build_source
from evaluation.sample import load
from losses.couplings import Pairs

REFLOW_SEED = 1_000_003  # of a teacher's samples, unlike any run's seed


class TeacherPairs:
    """Makes pairs by a checkpoint's EMA weights, its own source and its own solver, the same ones each time."""

    def __call__(self, teacher: str, count: int, like: Tensor) -> Pairs:
        """Return noise, where the teacher carries it, and labels or None, `count` of each, on the device of `like` (B, ...).

        A conditional teacher's labels come as often as in its data. UserError for states of another shape than `like`.
        """
        with fork_generators(like.device):  # building reseeds torch's own
            model = load(teacher, like.device.type)
            data = build_dataset(model.config, torch.device("cpu"))
            generator = generator_for(REFLOW_SEED, "reflow/labels")
            label = data_labels(data, model.objective.network.num_classes, count, generator)
            target = model.sample(count, seed=REFLOW_SEED, label=label).to(like.device)
            if target.shape[1:] != like.shape[1:]:
                raise UserError(
                    f"loss.coupling.teacher={teacher} makes states of shape {tuple(target.shape[1:])}, the data has "
                    f"{tuple(like.shape[1:])}; use a teacher of this data"
                )
            source = fixed_noise(build_source(model.config, torch.device("cpu")), count, REFLOW_SEED).to(like.device)
            return source, target, None if label is None else label.to(like.device)
