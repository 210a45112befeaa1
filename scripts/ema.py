#!/usr/bin/env python
"""Averages of a run's weights of any length, chosen after training, side by side: their scores and a picture.

    python launcher.py run_name=x ema=power
    python scripts/ema.py ckpt=outputs/ckpts/mlp/x_last.pt lengths=0.03,0.05,0.07,0.1,0.15,0.2
    python scripts/ema.py ckpt=outputs/ckpts/mlp/x_last.pt lengths=0.07 save=x_007.pt    # a checkpoint that samples by it

Keys: ckpt (required, of a run with ema=power, whose folder holds the averages), lengths (standard deviation of an average in
time, as a share of the run), n (10000 samples), seed (0), nfe, label, device (auto), cache (outputs/cache), out (a .png;
outputs/pictures/ema.png), save (a checkpoint with the one length given), trust (modules, as a,b.c, that the checkpoint may
build parts from), and any solver setting. The average of a length is the sum of the stored ones whose profile over the steps
is nearest to its own; how near, as a share, is printed beside it (Karras et al. 2024, arXiv 2312.02696).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import check_ends, front
from common.errors import UserError
from common.files import end_of
from common.ranges import AverageLength, CountFrom2, Seed, Steps
from configuration.settings import read_settings
from configuration.stored import output_dir_of
from configuration.values import check_run_name
from evaluation.metrics.base_metric import Score
from evaluation.metrics.energy_distance import EnergyDistance
from evaluation.metrics.oracles import OracleVelocity
from evaluation.parts import load_network
from evaluation.pictures import GENERATED_COLOR, new_figure, save_figure
from evaluation.power_averages import Snapshots, snapshots_of
from evaluation.sample import TrainedModel, generation_of, load
from run_files.checkpoint import load_checkpoint, write_checkpoint
from run_files.checks import check_writable
from run_files.run_folder import RunFolder
from run_files.run_lock import check_entries


@dataclass(frozen=True)
class Settings:
    """The command line."""

    ckpt: Path = field(metadata={"example": "ckpt=outputs/ckpts/mlp/x_last.pt"})
    lengths: list[AverageLength] = field(default_factory=lambda: [0.03, 0.05, 0.07, 0.1, 0.15, 0.2])
    n: CountFrom2 = 10_000
    seed: Seed = 0
    nfe: Steps | None = None
    label: Seed | Literal["all"] | None = None
    device: str = "auto"
    cache: Path = Path("outputs/cache")
    out: Path = Path("outputs/pictures/ema.png")
    save: Path | None = None
    trust: str | None = None


def read_words(words: list[str]) -> tuple[Settings, list[str]]:
    """Return own settings and solver overrides of a command line. UserError for anything else."""
    settings, overrides = read_settings(words, Settings, ("solver",))
    check_ends("out", settings.out, ".png")
    if settings.save is not None and (settings.save.suffix != ".pt" or len(set(settings.lengths)) > 1):
        raise UserError(f"save={settings.save} must end in .pt, and holds one length; give it by lengths=")
    if settings.save is not None and settings.save.exists():
        raise UserError(f"save={settings.save} exists already, and no weights are replaced; give another path, or remove it")
    for path in filter(None, (settings.out, settings.save)):
        check_writable("out" if path == settings.out else "save", end_of(path).parent)
    return settings, overrides


def sweep(words: list[str]) -> str:
    """Carry out the command: print a line for each length, draw the picture; return where it is."""
    settings, overrides = read_words(words)
    lengths = sorted(set(settings.lengths))
    model = load(settings.ckpt, settings.device, overrides, settings.trust or "")
    snapshots = stored_with(settings.ckpt, model)
    found: dict[float, list[Score]] = {}
    for length in lengths:
        load_network(model.objective.network, snapshots.average(length), settings.ckpt)
        found[length] = scores_of(model, settings)
        shown = ", ".join(f"{score.name} {score.value:.5f}" for score in found[length])
        print(f"length {length:<6g} profile to {snapshots.error(length):.1e}: {shown}", flush=True)
    if settings.save is not None:
        save(settings.save, settings.ckpt, snapshots, lengths[0])
    draw(settings, model, snapshots, found)
    return str(settings.out)


def stored_with(ckpt: Path, model: TrainedModel) -> Snapshots:
    """Return the averages that the checkpoint's run had stored up to it. UserError where there are none."""
    name = model.config["run_name"]
    check_run_name(name)
    folder = RunFolder((output_dir_of(ckpt) or ckpt.parent) / "runs" / name)
    check_entries(folder.path)
    files = [path for path in folder.averages() if folder.step_of(path) <= model.step]
    if not files:
        raise UserError(f"{folder.path} holds no averages up to step {model.step}; train the run with ema=power")
    return snapshots_of(files)


def scores_of(model: TrainedModel, settings: Settings) -> list[Score]:
    """Return the energy distance of the model's samples, and where the exact velocity is known its error."""
    made = generation_of(model, settings.n, settings.seed, settings.label, settings.nfe, settings.cache)
    results = [*EnergyDistance().results(made), *OracleVelocity().results(made)]
    shown = ("eval/energy_distance", "oracle/velocity_error")
    return [one for one in results if isinstance(one, Score) and one.name in shown]


def save(path: Path, ckpt: Path, snapshots: Snapshots, length: float) -> None:
    """Write the checkpoint with the average of this length as its EMA weights."""
    write_checkpoint(path, load_checkpoint(ckpt) | {"ema": snapshots.average(length)})
    print(f"{path} samples by the average of length {length:g}")


def draw(settings: Settings, model: TrainedModel, snapshots: Snapshots, found: dict[float, list[Score]]) -> None:
    """Draw each score over the lengths, above its noise floor; grey lines at the lengths that were tracked."""
    names = [score.name for score in next(iter(found.values()))]
    line = f"run {model.config['run_name']}, step {snapshots.last:,}, {settings.n:,} samples, seed {settings.seed}"
    figure = new_figure(400, "Length of the average, chosen after training", line)
    for axes, index in zip(figure.subplots(1, len(names), squeeze=False)[0], range(len(names)), strict=True):
        scores = [scores[index] for scores in found.values()]
        first = scores[0]
        axes.plot(list(found), [score.value for score in scores], "o-", color=GENERATED_COLOR)
        if first.floor is not None and first.floor_sd is not None:
            axes.axhspan(first.floor - 2 * first.floor_sd, first.floor + 2 * first.floor_sd, color="#dddddd")
        for length in set(snapshots.lengths):
            axes.axvline(length, color="#bbbbbb", linewidth=1)
        axes.set_xlabel("standard deviation of the average, share of the run")
        axes.set_title(first.name, fontsize=10)
    figure.subplots_adjust(left=0.1, right=0.98, top=0.78, bottom=0.14, wspace=0.2)
    save_figure(figure, settings.out)


def main(words: list[str]) -> int:
    return front(words or ["--help"], __doc__, sweep)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
