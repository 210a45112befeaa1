"""Faults planted in the project, which the comparisons have to see."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.emulated.comparisons import (
    FEW_DRAWS,
    KIND,
    PLACE,
    POINTS,
    SCORED,
    TRAINING,
    adaptive_steps_under_tf32,
    config_of,
    difference_under_tf32,
    same_curve,
    same_scores,
    waits_of,
)
from tests.emulated.rules import NAME
from tests.emulated.surroundings import pinned_saves, read_by_this_process


@contextmanager
def planted(where: str, name: str, fault: Any) -> Iterator[None]:
    """Put a fault in the place of a name of a module or class, given as module or module:Class."""
    module, _, part = where.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, part) if part else owner
    kept = vars(owner)[name]
    setattr(owner, name, fault)
    yield
    setattr(owner, name, kept)


def found(case: Callable[[], str], sign: str, where: str, name: str, fault: Any) -> str:
    """Return "" where a case sees a planted fault: by its answer, or by an error, that has `sign` in it."""
    with planted(where, name, fault):
        try:
            answer = case()
        except Exception as error:
            answer = str(error)
    return "" if sign in answer else f"not seen as {sign!r}: {answer!r}"


def planted_cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """Each check can fail."""
    import training.loop
    from evaluation.metrics.wasserstein import SlicedWasserstein
    from losses.paths import ProbabilityPath
    from losses.total_derivative import DerivativeObjective
    from run_files.checkpoint import read_archive, write_checkpoint
    from solvers.dopri5 import Dopri5

    after_step, torch_load, distance = training.loop.after_step, torch.load, SlicedWasserstein.distance
    state = ProbabilityPath.state
    simple = [*TRAINING, *POINTS]
    scored = [*POINTS, "dataloaders=gaussian", *SCORED, *FEW_DRAWS, "~evaluation.metrics.log_prob"]
    difference = [*simple, "loss=meanflow", "loss.jvp=finite_difference", "model.dropout=0.3"]

    def waiting(run: Any, values: dict[str, torch.Tensor]) -> None:
        values["loss"].item()
        after_step(run, values)

    def of_the_cpu(self: Any, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(count, *self.state_shape, generator=torch.Generator(), device=NAME)

    def forgetting(self: Any, outer: list[torch.Tensor] | None) -> None:
        kept = self.kept or []
        self.left, self.kept = [mask for mask in kept if mask.device.type == "cpu"], outer

    def read_back() -> str:
        write_checkpoint(PLACE / "of-the-device.pt", {"weights": torch.zeros(2).to(NAME)})
        return str(read_archive(PLACE / "of-the-device.pt", "cpu"))

    def in_double(self: Any, x: torch.Tensor, y: torch.Tensor) -> float:
        return distance(self, x.double(), y)

    yield "a tensor on the CPU in a path", lambda: found(
        lambda: same_curve(config_of(*simple)), "at least two devices", "losses.paths:ProbabilityPath", "state",
        lambda self, x0, x1, t: state(self, x0, x1, t) + torch.zeros(x0.shape),
    )  # fmt: skip
    seen = {
        "a generator of the CPU in a source": (
            lambda: same_curve(config_of(*simple)), "device type for generator",
            "dataloaders.sources:GaussianSource", "sample", of_the_cpu,
        ),
        "a wait in the loop": (lambda: waits_of(*POINTS), 'values["loss"].item()', "training.loop", "after_step", waiting),
        "no map_location": (
            read_back, "use map_location",
            "torch", "load", lambda file, map_location=None, **options: torch_load(file, **options),
        ),
        "masks of dropout that are not used again": (
            lambda: same_curve(config_of(*difference)), "on the device",
            "models.layers:ReplayedDropout", "replay", forgetting,
        ),
    }  # fmt: skip
    if KIND == "mps":
        seen["float64 in a metric"] = (
            lambda: same_scores(*scored), "float64",
            "evaluation.metrics.wasserstein:SlicedWasserstein", "distance", in_double,
        )  # fmt: skip
    else:
        derivative, solver = "losses.total_derivative:DerivativeObjective", "solvers.dopri5:Dopri5"
        rounded = DerivativeObjective.central_difference.__wrapped__  # type: ignore[attr-defined]
        solve = Dopri5.solve.__wrapped__  # type: ignore[attr-defined]
        seen["a save that nobody waits for"] = (pinned_saves, "0 waits", "torch.cuda", "synchronize", lambda: None)
        seen["a batch used before it has arrived"] = (
            read_by_this_process, "on the device", "tests.emulated.memory:Stream", "wait_event", lambda self, event: None
        )  # fmt: skip
        seen["memory of another stream, given away too early"] = (
            read_by_this_process, "record_stream", "tests.emulated.device:EmulatedTensor", "record_stream",
            lambda self, stream: None,
        )  # fmt: skip
        seen["TF32 left on in the difference"] = (
            difference_under_tf32, "the derivative is off", derivative, "central_difference", rounded
        )  # fmt: skip
        seen["TF32 left on in the adaptive solver"] = (adaptive_steps_under_tf32, "evaluations", solver, "solve", solve)
    for name, (case, *fault) in seen.items():
        yield name, lambda case=case, fault=fault: found(case, *fault)
