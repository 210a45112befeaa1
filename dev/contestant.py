"""One row of a benchmark: a run that is assembled, stepped and sampled, never saved."""

import copy
import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from backends.submission import prepare
from common.errors import UserError
from evaluation.generate import generate
from training.assemble import assemble
from training.loop import epoch_groups, train_step

ENGINES = ("func", "separate", "finite_difference")
NOT_ON_POINTS = ("cross_entropy", "reflow", "distillation")  # a classifier's loss, and two on the pairs of a teacher


def wait(device: Any) -> None:
    """Return when the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made within that live at once; most: their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.known = weakref.WeakSet[Any]()
        self.live = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.most = max(self.most, self.live)
        return out

    def freed(self, size: int) -> None:
        self.live -= size


class Contestant:
    """One row: an assembled run that is stepped and sampled, never saved."""

    def __init__(self, overrides: str, config: dict[str, Any] | None = None):
        """Assemble the run of these words, or of the configuration that another row made of them."""
        fixed = ["run_name=benchmark", "trackio.enabled=false", "callbacks=none", "overwrite=true"]
        self.name = overrides or "default"
        self.config = config or prepare([*fixed, *overrides.split()])
        self.run = assemble(copy.deepcopy(self.config))
        self.groups = self.endless_groups()
        self.gflop, self.live_mb = self.count()

    def count(self) -> tuple[float, float]:
        """Return of one uncompiled step 1e9 operations, and the MiB of its tensors that live at once, gradients included."""
        objective, batch = self.run.state.objective, next(self.groups)[0]
        objective.train()
        counter, memory = FlopCounterMode(display=False), LiveBytes()
        for mode in (counter, memory):  # one by one, as the first keeps tensors
            with mode:
                objective(batch, self.run.state.teacher)["loss"].backward()
            objective.zero_grad(set_to_none=True)
        return counter.get_total_flops() / 1e9, memory.most / 2**20

    def endless_groups(self) -> Iterator[Any]:
        while True:
            self.run.state.step = 0
            yield from epoch_groups(self.run)

    def data(self) -> Any:
        """Return the data (B, ...) of one batch."""
        return next(self.groups)[0].raw_target

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that `work` takes, until the device has done it, and its result."""
        wait(self.run.device)
        begun = time.perf_counter()
        result = work()
        wait(self.run.device)
        return time.perf_counter() - begun, result

    def round(self, steps: int) -> dict[str, float]:
        """Return one round's figures: `steps` training steps, then one batch carried through the solver."""
        if self.run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        data_seconds, groups = self.timed(lambda: [next(self.groups) for _ in range(steps)])
        step_seconds, _ = self.timed(lambda: [train_step(self.run, group) for group in groups])
        rows = sum(len(batch) for group in groups for batch in group)
        flow = self.run.inputs.flow
        if flow is None:
            raise UserError("this times generators, and a classifier makes no samples; leave loss=cross_entropy out")
        noise = self.run.source.sample(self.run.settings.batch_size, torch.Generator(self.run.device).manual_seed(0))
        with torch.no_grad():
            fresh = lambda k, first, count: noise[:count]  # noqa: E731
            sample_seconds, _ = self.timed(lambda: generate(flow, self.run.inputs.solver, noise, None, fresh))
        total = data_seconds + step_seconds
        memory = torch.cuda.max_memory_allocated() / 2**20 if self.run.device.type == "cuda" else resident_megabytes()
        return {
            "step_ms": 1e3 * total / steps,
            "data_ms": 1e3 * data_seconds / steps,
            "data_share": data_seconds / total,
            "train_samples_per_second": rows / total,
            "generated_per_second": len(noise) / sample_seconds,
            "peak_memory_mb": memory,
            "live_mb": self.live_mb,
            "gflop": self.gflop,
        }


def resident_megabytes() -> float:
    """Peak resident memory of this process in MiB (all rows together)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
