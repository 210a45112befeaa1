#!/usr/bin/env python
"""Whether a learning rate will carry over to wider models: how large each layer's outputs are after a few steps, by width.

    python visualizers/coordinates.py base_model={width:64}
    python visualizers/coordinates.py base_model={hidden_size:96,heads:2} model=dit_s dataloaders=digits times=1,2,4 steps=4

Words are those of a run (launcher.py --help); times (1,2,4,8: the widths, as multiples of base_model's settings), steps (8)
and out (the folder; outputs/pictures/coordinates unless given). Trains each width so many steps, with base_model and
without, and prints by which power of the width each layer's mean |output| grows: near 0 throughout where the rate carries
over. Writes coordinates.png. No run is begun.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from backends.submission import prepare
from common.command_line import front, outputs
from common.errors import UserError
from common.ranges import Count
from configuration.compose import compose_config
from configuration.settings import known_settings
from evaluation.pictures import INK, new_figure, save_figure
from run_files.checks import check_folder
from training.assemble import assemble
from training.loop import epoch_groups, train_step
from training.width_transfer import GROWING

Sizes = dict[str, list[float]]  # layer -> mean |output| at each width
NAMED = 12  # layers that have a legend
WITH, WITHOUT = "with base_model", "one learning rate for all"


@dataclass(frozen=True)
class Settings:
    """The command line, words of a run aside."""

    times: list[Count] = field(default_factory=lambda: [1, 2, 4, 8])
    steps: Count = 8
    out: Path | None = None


def sizes(words: list[str], steps: int) -> dict[str, float]:
    """Return each layer's mean |output| in the last of so many steps of training. UserError for more than an epoch has."""
    found: dict[str, float] = {}
    with TemporaryDirectory() as nowhere:
        run = assemble(prepare([*words, "run_name=coordinates", f"output_dir={nowhere}", "schedule=constant"]))

    if steps > run.steps_per_epoch:
        raise UserError(f"steps={steps} is more than the {run.steps_per_epoch} of an epoch; give fewer")

    def note(name: str) -> object:
        return lambda module, given, output: found.__setitem__(name, output.detach().abs().mean().item())

    for name, module in run.state.objective.network.named_modules():
        if isinstance(module, GROWING):
            module.register_forward_hook(note(name))  # type: ignore[arg-type]
    groups = epoch_groups(run)
    for _ in range(steps):
        train_step(run, next(groups))
    return found


def widened(words: list[str], base: dict[str, int], times: int) -> list[str]:
    """Return the words of a run of the base model's settings, so many times as large."""
    return [*words, *(f"model.{key}={value * times}" for key, value in base.items())]


def power(times: list[int], values: list[float]) -> float:
    """Return the slope of log value in log width, by least squares; 0 of a layer that stays at 0."""
    if min(values) <= 0:
        return 0.0
    return float(np.polyfit(np.log(times), np.log(values), 1)[0])


def measured(words: list[str], base: dict[str, int], times: list[int], steps: int) -> dict[str, Sizes]:
    """Return the sizes at every width, with base_model and without."""
    plain = [word for word in words if not word.startswith("base_model=")]
    found: dict[str, Sizes] = {}
    for name, own in ((WITH, words), (WITHOUT, plain)):
        each = [sizes(widened(own, base, count), steps) for count in times]
        found[name] = {layer: [one[layer] for one in each] for layer in each[0]}
    return found


def draw(path: Path, found: dict[str, Sizes], times: list[int], title: str) -> None:
    """Draw the sizes over the width, a line for each layer, both scales logarithmic."""
    figure = new_figure(420, title, "mean |output| of each layer; level lines: the learning rate carries over", 1000)
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (name, layers) in zip(panels, found.items(), strict=True):
        for layer, values in layers.items():
            axes.loglog(times, [max(value, 1e-12) for value in values], marker="o", markersize=3, linewidth=1, label=layer)
        axes.set_title(name, color=INK, fontsize=10)
        axes.set_xlabel("width, times that of base_model", color=INK, fontsize=9)
        axes.set_xticks(times, [str(count) for count in times])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.tick_params(colors=INK, labelsize=8)
    if len(found[WITH]) <= NAMED:
        panels[0].legend(fontsize=8, frameon=False)
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.14, top=0.8, wspace=0.06)
    save_figure(figure, path)


def check(words: list[str]) -> int:
    """Carry out the command. UserError for words that no run would take, and without base_model."""
    settings, words = known_settings(words, Settings)
    times, steps, folder = settings.times, settings.steps, settings.out or outputs() / "pictures" / "coordinates"
    if len(set(times)) < 2:
        raise UserError(f"times={times[0]} is one width; give two or more, such as times=1,2,4,8")
    config = compose_config([*words, "run_name=coordinates"])
    if not config["base_model"]:
        raise UserError("base_model is missing; add the width that optimizer.lr is of, such as base_model={width:64}")
    check_folder("out", folder)
    found = measured(words, dict(config["base_model"]), times, steps)
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "coordinates.png", found, times, f"{config['choices']['model']} after {steps} steps")
    longest = max(map(len, found[WITH]))
    print(f"power of the width by which mean |output| grows in {steps} steps: {WITH}, {WITHOUT}")
    for layer in found[WITH]:
        print(f"  {layer:<{longest}}  " + "  ".join(f"{power(times, own[layer]):+.2f}" for own in found.values()))
    print(folder / "coordinates.png")
    return 0


if __name__ == "__main__":
    sys.exit(front(sys.argv[1:] or ["--help"], __doc__, check))
