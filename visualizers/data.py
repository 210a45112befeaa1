#!/usr/bin/env python
"""What a network would be trained on: the first batch of a run, as its loss sees it, before anything is trained.

    python visualizers/data.py dataloaders=digits conditional=true
    python visualizers/data.py dataloaders=image_folder dataloaders.path=pictures loss/coupling=minibatch_ot
    python visualizers/data.py dataloaders=array dataloaders.path=data.npy dataloaders.standardize=true out=pictures/mine

Words are those of a run (launcher.py --help), and out (the folder; outputs/pictures/<data set> unless given). Prints shapes,
ranges, classes and what of their scale is unusual; writes data.png: the batch's states at four times from noise to data,
augmented, paired by the coupling and standardised as the run would have them. Nothing is trained; no run is begun.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from backends.submission import prepare
from common.command_line import front, outputs
from configuration.compose import compose_config
from configuration.settings import known_settings
from dataloaders.base_dataloaders import FlowDataset
from evaluation.pictures import INK, REAL_COLOR, draw_grids, enlarged, new_figure, save_figure, tile, to_bytes
from losses.objective import FlowObjective, Objective
from models.inputs import split_label
from models.velocity_model import VelocityModel
from run_files.checks import check_folder
from training.assemble import assemble
from training.loop import epoch_groups
from training.run import Run
from training.summary import USUAL

TIMES = (0.0, 1 / 3, 2 / 3, 1.0)  # in parts of the path's time
SHOWN, LINES = 16, 100  # images, and pairs of points that a line joins
MOST_CLASSES = 20  # that are counted one by one


@dataclass(frozen=True)
class Settings:
    """The command line, words of a run aside."""

    out: Path | None = None


def looked_at(words: list[str]) -> tuple[Run, Any, dict[str, Any]]:
    """Return a run that is assembled and not begun, its first batch, and its configuration. UserError for wrong words."""
    words = [*words, "run_name=data"]
    if not any(word.startswith(("model=", "experiment=")) for word in words):
        composed = compose_config(words)
        words += ["model=cnn"] * (len(composed.dataloaders.state_shape) == 3 and composed.choices.model == "mlp")
    with TemporaryDirectory() as nowhere:  # where there is no run of that name; nothing is written
        config = prepare([*words, f"output_dir={nowhere}"])
        run = assemble(config)
    return run, next(iter(next(epoch_groups(run)))), config


def facts(run: Run, batch: Any) -> dict[str, str]:
    """Return what there is to know of the data and of one batch, in lines by their names."""
    data, x1, label = run.dataset, served(run, batch), batch.label
    shape = "x".join(map(str, data.state_shape))
    held_out = "any number" if math.isinf(data.held_out_size) else f"{data.held_out_size:,.0f}"
    found = {
        "states": f"{shape}, {data.epoch_size:,} draws an epoch, {held_out} held out",
        "values": f"{x1.min():.3g} to {x1.max():.3g}, mean {x1.mean():.3g}, standard deviation {x1.std():.3g}",
    }
    if data.num_classes:
        found["classes"] = f"{data.num_classes}" + class_counts(label, data)
    found["batch"] = f"{len(batch)} rows" + ("" if label is None else shown_labels(label, run.state.objective))
    if data.mirrored or data.altered:
        found["altered"] = " and ".join((["mirrored"] if data.mirrored else []) + ([data.altered] if data.altered else []))
    note = advice(data, x1)
    return found | ({"note": note} if note else {})


def served(run: Run, batch: Any) -> Tensor:
    """Return the batch's data (B, ...) as the loss has them."""
    x1: Tensor = batch.raw_target if isinstance(run.state.objective, FlowObjective) else batch.images
    return x1


def class_counts(label: Tensor | None, data: FlowDataset) -> str:
    """Return how often each class is in the batch; empty where there are none to count, or too many."""
    classes = split_label(label)[0]
    if classes is None or data.num_classes > MOST_CLASSES:
        return ""
    names = data.class_names or [str(k) for k in range(data.num_classes)]
    counts = np.bincount(classes.cpu().numpy(), minlength=data.num_classes)
    return ", labels in this batch " + ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=False))


def shown_labels(label: Tensor, objective: Objective) -> str:
    """Return how many of the batch's labels are hidden from the network."""
    if not isinstance(objective.network, VelocityModel) or not objective.network.is_conditional:
        return ""
    hidden = int((label == objective.network.null_label(label)).reshape(len(label), -1).all(1).sum())
    return f", the label of {hidden} hidden" if hidden else ""


def advice(data: FlowDataset, x1: Tensor) -> str:
    """Return a sentence on what is unusual in the scale of the data beside noise of standard deviation 1, or nothing."""
    if data.value_range is not None:
        low, high = data.value_range
        if x1.min() < low - 1e-3 or x1.max() > high + 1e-3:
            return f"values leave value_range=[{low:g},{high:g}]: pictures of them are clipped"
    channels = x1.transpose(0, 1).flatten(1).double()
    mean, std = channels.mean(1).abs().max().item(), channels.std(1)
    widest, narrowest = std.max().item(), std.min().item()
    low, high = USUAL
    if low <= narrowest <= widest <= high and mean <= high:
        return ""
    what = "dimension" if x1.ndim == 2 else "channel"
    return (
        f"means up to {mean:.3g} and standard deviations {narrowest:.3g} to {widest:.3g} by {what}, where noise has 0 and "
        "1: learned badly; use dataloaders.standardize=true (array, image_folder), or scale the data"
    )


def picture(run: Run, batch: Any, path: Path, title: str) -> bool:
    """Draw the states at TIMES; returns whether states of this shape have a picture."""
    states = on_the_way(run, batch)
    shape = next(iter(states.values())).shape[1:]
    if len(shape) == 3 and shape[0] in (1, 3):
        draw_images(path, states, run.dataset.value_range or (-1.0, 1.0), title)
    elif len(shape) == 1:
        draw_vectors(path, states, labels_of(batch), title)
    else:
        return False
    return True


def on_the_way(run: Run, batch: Any) -> dict[str, np.ndarray]:
    """Return by name the states (B, ...) of the batch's pairs at TIMES; of a classifier's batch the images."""
    objective, x1 = run.state.objective, served(run, batch)
    if not isinstance(objective, FlowObjective):
        return {"images": x1.cpu().numpy()}
    path, times = objective.path, torch.tensor(TIMES, device=x1.device) * objective.path.last_time
    return {f"t = {t:.2g}": path.state(batch.raw_source, x1, t).cpu().numpy() for t in times}


def labels_of(batch: Any) -> np.ndarray | None:
    classes = split_label(batch.label)[0]
    return None if classes is None else classes.cpu().numpy()


def draw_images(path: Path, states: dict[str, np.ndarray], value_range: tuple[float, float], title: str) -> None:
    """Draw a grid of images for each time; the same place in each is one pair on its way."""
    grids = {name: tile(to_bytes(images[:SHOWN], value_range), 4) for name, images in states.items()}
    draw_grids(path, enlarged(grids, next(iter(states.values())).shape[2]), title)


def draw_vectors(path: Path, states: dict[str, np.ndarray], label: np.ndarray | None, title: str) -> None:
    """Draw points of the plane with some of their pairs' ways, the first two dimensions of more, a histogram of one."""
    dims = next(iter(states.values())).shape[1]
    figure = new_figure(330, title, "" if dims <= 2 else f"the first two of {dims} dimensions", 1100)
    every = np.concatenate(list(states.values()))
    low, high = every.min(0) - 0.1, every.max(0) + 0.1
    first, last = (list(states.values())[k] for k in (0, -1))
    for axes, (name, points) in zip(figure.subplots(1, len(states), squeeze=False)[0], states.items(), strict=True):
        axes.set_title(name, color=INK, fontsize=10, pad=4)
        axes.tick_params(colors=INK, labelsize=8)
        axes.set_xlim(low[0], high[0])
        if dims == 1:
            axes.hist(points[:, 0], bins=60, color=REAL_COLOR)
            continue
        for k in range(min(LINES, len(points))):
            axes.plot(*zip(first[k, :2], last[k, :2], strict=True), color="#cccccc", linewidth=0.4, zorder=0)
        colors = {"color": REAL_COLOR} if label is None else {"c": label, "cmap": "tab10"}
        axes.scatter(points[:, 0], points[:, 1], s=4, linewidths=0, **colors)
        axes.set_ylim(low[1], high[1])
        axes.set_aspect("equal", adjustable="box")
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.1, top=0.78, wspace=0.2)
    save_figure(figure, path)


def look(words: list[str]) -> int:
    """Carry out the command. UserError for words that no run would take."""
    settings, words = known_settings(words, Settings)
    run, batch, config = looked_at(words)
    name = str(config["choices"]["dataloaders"])
    folder = settings.out or outputs() / "pictures" / name
    check_folder("out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = facts(run, batch)
    if picture(run, batch, folder / "data.png", f"{name}, the first batch"):
        lines["picture"] = str(folder / "data.png")
    else:
        lines["picture"] = f"none of states of shape {list(run.dataset.state_shape)}"
    print("\n".join([name, *(f"  {key:<8}  {value}" for key, value in lines.items())]))
    return 0


if __name__ == "__main__":
    sys.exit(front(sys.argv[1:] or ["--help"], __doc__, look))
