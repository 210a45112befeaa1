"""What every picture of a trained model starts from: the command line, the checkpoint, noise carried to data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.command_line import front, outputs
from common.errors import UserError
from common.ranges import Count, CountFrom2, Seed
from configuration.settings import read_settings
from configuration.stored import output_dir_of
from evaluation.closed_forms import ExactFlow
from evaluation.generate import fixed_noise, fresh_noise
from evaluation.guided_flows import GuidedFlow
from evaluation.metrics.oracles import KnownFlow, known_flow
from evaluation.parts import build_dataset, build_decoder, build_solver
from evaluation.pictures import INK, save_figure
from evaluation.report import drawable
from evaluation.sample import TrainedModel, load
from losses.objective import FlowObjective
from models.inputs import split_label
from run_files.checkpoint import load_checkpoint
from run_files.checks import check_folder
from solvers.base_solver import BaseSolver, FreshNoise, Sampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Limits = tuple[np.ndarray, np.ndarray]  # lowest and highest corner (2,) of a panel
KEYS = """Keys: ckpt (a checkpoint; unless given the newest that can be drawn, in outputs/ckpts of the working folder,
or of the repository where that has no outputs), n (how many samples), seed (0), frames (of
a film), format (gif; or mp4, or png for the still alone), out (the folder; outputs/pictures/<run_name> unless given), device
(cpu), label (a class of a conditional model, or all), trust (modules, as a,b.c, that the
checkpoint may build parts from), and any solver or guidance setting."""


@dataclass(frozen=True)
class Settings:
    """The command line of a drawing; n and frames: its own unless given."""

    ckpt: Path | None = None
    n: Count | None = None
    seed: Seed = 0
    frames: CountFrom2 | None = None
    format: Literal["png", "gif", "mp4"] = "gif"
    out: Path | None = None
    device: str = "cpu"
    label: Seed | Literal["all"] | None = None
    trust: str | None = None


@dataclass
class Scene:
    """A model to be drawn, and how. folder: where the files go. label: as TrainedModel.labels takes it."""

    model: TrainedModel
    n: int
    seed: int
    frames: int
    form: str
    folder: Path
    label: Any = None
    solver: Sampler | None = None  # the one typed, else None

    @property
    def name(self) -> str:
        return str(self.model.config["run_name"])

    @property
    def heading(self) -> str:
        """Return what the title begins with: the run, and the class where one alone is shown."""
        return self.name + (f", class {self.label}" if isinstance(self.label, int) else "")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.model.config["dataloaders"]["state_shape"])

    @property
    def labels(self) -> Tensor | None:
        """Return the classes (n,) of the samples, or None."""
        labels = self.model.labels(self.n, self.label)
        return None if labels is None else labels.to(self.model.device)

    @property
    def value_range(self) -> tuple[float, float]:
        """Return the values of images that are black and of full brightness, latents decoded."""
        low, high = self.model.config["dataloaders"]["value_range"] or (-1.0, 1.0)
        return (-1.0, 1.0) if self.model.config.get("vae") is not None else (low, high)

    def own_solver(self) -> Sampler:
        """Return the solver typed, or the run's own."""
        return self.solver or build_solver(self.model.config)

    def samples(self) -> Tensor:
        """Return the model's samples (n, ...)."""
        return self.model.sample(self.n, self.seed, self.label, self.own_solver())

    def noise(self) -> Tensor:
        """Return the source states (n, ...) at t = 0, on the model's device; those of sample i are its own, whatever n."""
        return fixed_noise(self.model.source, self.n, self.seed).to(self.model.device)

    def fresh(self) -> FreshNoise:
        """Return the noise that stochastic solvers add, that of `samples`."""
        drawn = fresh_noise(self.model.source, self.seed)
        return lambda k: drawn(k, 0, self.n).to(self.model.device)

    def real(self, n: int) -> np.ndarray:
        """Return at most n held-out states (n, ...), of the class asked for where one is."""
        if not isinstance(self.label, int):
            return self.model.real(n, self.seed)[0].numpy()
        states, own = self.model.real(2 * n * self.model.objective.network.num_classes, self.seed)
        own = split_label(own)[0]
        return (states if own is None else states[own == self.label])[:n].numpy()

    def show_all_classes(self) -> None:
        """Show all classes of a conditional model where none is asked for."""
        if self.model.objective.network.num_classes and self.label is None:
            self.label = "all"

    def choose_one_class(self) -> None:
        """Show, of a conditional model, the class asked for, or the first: each has a field of its own."""
        if self.model.objective.network.num_classes and not isinstance(self.label, int):
            self.label = 0

    def exact(self) -> KnownFlow | str:
        """Return the exact flow, of the class asked for where one is, or why it is not known."""
        flow = self.model.flow()
        known = known_flow(flow, build_dataset(self.model.config, torch.device("cpu")), self.model.source)
        one_class = flow.network.num_classes and isinstance(self.label, int)
        return known.of_class(self.label) if one_class and isinstance(known, ExactFlow | GuidedFlow) else known

    def save(self, figure: Figure, name: str) -> list[Path]:
        """Write a figure of this name, and return where."""
        path = self.folder / f"{name}.png"
        save_figure(figure, path)
        return [path]

    def need_points(self, instead: str) -> None:
        """Raise UserError unless the states are points in the plane."""
        if self.shape != (2,):
            shape = list(self.shape)
            raise UserError(f"draws points in the plane, and {self.name} makes states of shape {shape}; {instead}")

    def need_images(self, instead: str) -> None:
        """Raise UserError unless the states are images or latents of images."""
        if not drawable(self.shape, build_decoder(self.model.config, self.model.device)):
            raise UserError(f"draws images, and {self.name} makes states of shape {list(self.shape)}; {instead}")


def walk(
    solver: Sampler, flow: FlowObjective, noise: Tensor, label: Tensor | None, times: Tensor, fresh: FreshNoise | None = None
) -> Tensor:
    """Return where samples (N, ...) are at `times` (T,), ascending in [0, 1], on their way through a solver: (T, N, ...).

    Between two points of the solver's grid a state is taken to move straight, as Euler's does. A flow map's step is one
    straight jump. UserError for a solver that noises its states again: they have no path. fresh: for one that adds noise.
    """
    if not solver.has_path:
        raise UserError("solver.renoise=true throws its states back into noise: they have no path; leave it out")
    solver.check(flow)
    seen: list[tuple[Tensor, Tensor]] = []
    given = fresh or (lambda k: torch.zeros_like(noise))
    solver.sample(flow, noise, label, given, lambda x, t: seen.append((x.clone(), t.cpu().clone())))
    return interpolated(torch.stack([x for x, _ in seen]), torch.stack([t for _, t in seen]).float(), times)


def interpolated(states: Tensor, grid: Tensor, times: Tensor) -> Tensor:
    """Return states (G, ...) known at grid (G,), linearly between: (T, ...) at times (T,)."""
    after = torch.searchsorted(grid, times.float()).clamp(1, len(grid) - 1)
    weight = ((times - grid[after - 1]) / (grid[after] - grid[after - 1])).to(states)
    weight = weight.reshape(-1, *[1] * (states.dim() - 1))
    return states[after - 1].lerp(states[after], weight)


def frame_times(frames: int) -> torch.Tensor:
    """Return 0 to 1 in equal steps: (frames,)."""
    return torch.linspace(0, 1, frames)


def lattice(low: np.ndarray, high: np.ndarray, side: int) -> np.ndarray:
    """Return the middles of side x side cells between two corners, row by row along the first axis: (side^2, 2)."""
    centres = [low[i] + (np.arange(side) + 0.5) / side * (high[i] - low[i]) for i in range(2)]
    return np.stack(np.meshgrid(*centres), -1).reshape(-1, 2)


def plane(panel: Axes, name: str, low: np.ndarray, high: np.ndarray) -> None:
    """Make a panel one of points in the plane, between two corners."""
    panel.set_title(name, color=INK, fontsize=11, pad=5)
    panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="x₁")
    panel.set_aspect("equal", adjustable="box")
    panel.tick_params(colors=INK, labelsize=9)


def makes_samples(payload: dict[str, Any]) -> bool:
    """Return whether a save is of a flow, not of a classifier."""
    return payload["second_time"] is not None


def makes_points(payload: dict[str, Any]) -> bool:
    """Return whether a save is of a flow of points in the plane."""
    return makes_samples(payload) and list(payload["config"]["dataloaders"]["state_shape"]) == [2]


def newest_checkpoint(fits: Callable[[dict[str, Any]], bool] = makes_samples) -> Path:
    """Return the newest save of any architecture that fits, the newest of all where none does. UserError without any."""
    folder = outputs() / "ckpts"
    saves = sorted(folder.glob("*/last.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not saves:
        raise UserError(f"there is no checkpoint under {folder}; train one, or give ckpt=<file>")
    return saves[0] if len(saves) == 1 else next((save for save in saves if fits(load_checkpoint(save))), saves[0])


def solver_label(solver: Sampler) -> str:
    """Return the name of a solver and the evaluations a sample took, for a legend."""
    count = solver.evaluations or solver.steps
    name = type(solver).__name__ if isinstance(solver, BaseSolver) else "learned map"
    return f"{name}, {count} evaluation{'s' * (count > 1)}"


def scene(
    words: list[str], n: int, frames: int, points: int | None = None, fits: Callable[[dict[str, Any]], bool] = makes_samples
) -> Scene:
    """Return the scene a command line asks for; n (points: that of points in the plane), frames and the newest save that
    fits: unless it says otherwise. UserError for what it cannot be.
    """
    given, overrides = read_settings(words, Settings, ("solver", "guidance"))
    if given.out is not None:
        check_folder("out", given.out)
    checkpoint = given.ckpt or newest_checkpoint(fits)

    model = load(checkpoint, given.device, overrides, given.trust or "")
    folder = given.out or (output_dir_of(checkpoint) or outputs()) / "pictures" / model.config["run_name"]
    made = Scene(model, given.n or n, given.seed, given.frames or frames, given.format, folder, given.label)
    if points and not given.n and made.shape == (2,):
        made.n = points
    if any(word.startswith("solver") for word in overrides):
        made.solver = made.own_solver()
        made.solver.check(model.objective)
    check_folder("out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    return made


def main(
    words: list[str],
    doc: str,
    draw: Callable[[Scene], list[Path]],
    n: int,
    frames: int = 2,
    points: int | None = None,
    fits: Callable[[dict[str, Any]], bool] = makes_samples,
) -> int:
    """Run one drawing script: print the files it wrote and the seconds it took; return the exit status."""

    def carry_out(words: list[str]) -> int:
        program, begun = Path(sys.argv[0]).name, time.perf_counter()
        print(f"{program} ...", end="" if sys.stdout.isatty() else "\n", flush=True)
        for path in draw(scene(words, n, frames, points, fits)):
            print(f"\r{path}  {path.stat().st_size / 1024:,.0f} kB")
        print(f"{program}: {time.perf_counter() - begun:.1f} s")
        return 0

    return front(words, f"{doc.strip()}\n\n{KEYS}", carry_out)
