"""Pictures of a trained model's samples beside real states."""

from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from dataloaders.base_dataloaders import Batch
from evaluation.parts import build_decoder
from evaluation.pictures import scatter_picture
from evaluation.report import draw_images, drawable
from evaluation.sample import TrainedModel
from models.inputs import classes_in

MOST_REAL = 10_000  # real states looked through for some of each class


def draw(path: Path, states: Tensor, labels: Tensor | None, model: TrainedModel, title: str, beside_real: bool) -> None:
    """Draw points beside real ones, or images beside real ones (by class where there are classes) or alone."""
    labels = classes_in(labels, model.objective.network.num_classes)
    shape, decode = tuple(states.shape[1:]), build_decoder(model.config, model.device)
    if drawable(shape, decode):
        real, own = real_of(model, labels, len(states)) if beside_real else (None, None)
        beside = None if real is None else (real.to(model.device), own)
        low_high = model.config["dataloaders"]["value_range"]
        draw_images(path, (states.to(model.device), labels), beside, decode, low_high, title)
    elif shape == (2,):
        scatter_picture(path, states.numpy(), real_of(model, labels, len(states))[0][: len(states)].numpy(), title)
    else:
        raise UserError(f"states of shape {list(shape)} have no picture; use out=samples.npz")


def real_of(model: TrainedModel, labels: Tensor | None, count: int) -> Batch:
    """Return held-out states of the classes in `labels`, about `count` or more; of all where labels are None."""
    if labels is None:
        return model.real(count)[0], None
    classes = labels.unique()
    states, own = model.real(min(100 + 4 * count * model.objective.network.num_classes // len(classes), MOST_REAL))
    own = classes_in(own, model.objective.network.num_classes)
    if own is None:
        return states, None
    wanted = torch.isin(own, classes)
    return states[wanted], own[wanted]
