"""What the accelerator is doing, under the same names on any maker's: read() gives ordinary metrics of the run.

gpu/util_pct    share of time the GPU was busy, 0 to 100
gpu/freq_mhz    clock of its cores
gpu/power_w     watts
gpu/temp_c      degrees Celsius
cuda/allocated_mb, cuda/reserved_mb, mps/allocated_mb, mps/driver_mb    memory of this process in MiB
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from statistics import fmean
from typing import Any

MIB = 2**20
WINDOW_SECONDS = 5.0
MACMON_COMMAND = ["macmon", "pipe", "-i", "500"]  # one JSON line every 500 ms


class Telemetry:
    """Reads the accelerator of this process; this one a CPU, of which nothing is known."""

    def read(self) -> dict[str, float]:
        """Return the figures known now, at once; a figure that is not known is absent."""
        return {}

    def close(self) -> None:
        """Stop reading; it may be called more than once."""


class CudaTelemetry(Telemetry):
    """The current CUDA or ROCm device by torch.cuda, which asks NVML (extra `gpu`) or amdsmi.

    A figure that cannot be read at first (power on some laptops, load on a MIG slice) is left out; where none can, one line
    says why, and the memory figures remain. Utilisation is that of NVML's last sampling period, up to a second.
    """

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda
        readers: dict[str, Callable[[], float]] = {
            "gpu/util_pct": torch.cuda.utilization,
            "gpu/freq_mhz": torch.cuda.clock_rate,
            "gpu/power_w": lambda: torch.cuda.power_draw() / 1000,
            "gpu/temp_c": torch.cuda.temperature,
        }
        self.readers = {name: reader for name, reader in readers.items() if self.figure(reader) is not None}
        if not self.readers:
            remedy = "`uv sync --extra gpu` adds load, clock, power and heat of NVIDIA's"
            print(f"GPU telemetry is memory only ({self.why}); {remedy}", file=sys.stderr)

    def figure(self, reader: Callable[[], float]) -> float | None:
        """Return a figure, None where it cannot be read; `why` has what was raised last."""
        try:
            return float(reader())
        except reading_errors() as error:
            self.why = f"{type(error).__name__}: {error}"
            return None

    def read(self) -> dict[str, float]:
        memory = {"cuda/allocated_mb": self.cuda.memory_allocated(), "cuda/reserved_mb": self.cuda.memory_reserved()}
        figures = {name: self.figure(reader) for name, reader in self.readers.items()}
        known = {name: value for name, value in figures.items() if value is not None}
        return {name: count / MIB for name, count in memory.items()} | known


def reading_errors() -> tuple[type[Exception], ...]:
    """Return what torch raises, and NVML or amdsmi where it is installed."""
    named = (("pynvml", "NVMLError"), ("amdsmi", "AmdSmiException"))
    own = [getattr(import_module(module), name) for module, name in named if find_spec(module)]
    return (ImportError, RuntimeError, *own)


class AppleTelemetry(Telemetry):
    """An Apple GPU: macmon's stream, averaged over the last 5 s, and torch's memory figures.

    Without macmon on PATH one line says how to install it and only the memory figures remain.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.samples: deque[tuple[float, dict[str, float]]] = deque(maxlen=100)
        self.process: subprocess.Popen[str] | None = None
        if shutil.which("macmon") is None:
            print("GPU telemetry is off: macmon is not installed; `brew install macmon` turns it on", file=sys.stderr)
            return
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        self.process = subprocess.Popen(MACMON_COMMAND, stdin=nothing, stdout=pipe, stderr=nothing, text=True)
        self.reader = threading.Thread(target=self.follow, args=(self.process.stdout,), daemon=True, name="macmon")
        self.reader.start()

    def follow(self, lines: Any) -> None:
        """Take in macmon's lines until it ends; runs in a thread of its own."""
        for line in lines:
            if line.startswith("{") and line.endswith("}\n"):
                self.samples.append((self.clock(), parse_macmon(json.loads(line))))

    def read(self) -> dict[str, float]:
        begin = self.clock() - WINDOW_SECONDS
        recent = [sample for moment, sample in self.samples.copy() if moment > begin]
        names = sorted({name for sample in recent for name in sample})
        return {name: fmean(sample[name] for sample in recent if name in sample) for name in names} | mps_memory()

    def close(self) -> None:
        if self.process is None:
            return
        self.process.kill()  # it holds nothing, and a terminate could be ignored
        self.process.wait()
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None


def parse_macmon(record: dict[str, Any]) -> dict[str, float]:
    """Return one macmon record in our names and units.

    macmon up to 0.7 has `gpu_usage: [MHz, ratio]`, its ratio (0 to 1) scaled by frequency; from 0.8 on it has
    `gpu_freq_mhz` and `gpu_active_ratio`, the share of time busy (0 to 1), which is what NVML means as well and is taken
    where present. `gpu_power` is in watts, `temp.gpu_temp_avg` in Celsius, 0 where no sensor answered.
    """
    if "gpu_active_ratio" in record:
        frequency, ratio = record["gpu_freq_mhz"], record["gpu_active_ratio"]
    else:
        frequency, ratio = record["gpu_usage"]
    figures = {"gpu/util_pct": 100.0 * ratio, "gpu/freq_mhz": float(frequency), "gpu/power_w": record["gpu_power"]}
    temperature = record["temp"]["gpu_temp_avg"]
    return figures | ({"gpu/temp_c": temperature} if temperature > 0 else {})


def mps_memory() -> dict[str, float]:
    """Return memory of this process on the Apple GPU: tensors, and all that the driver holds for it; nothing elsewhere."""
    import torch

    if not torch.backends.mps.is_available():
        return {}
    memory = {"mps/allocated_mb": torch.mps.current_allocated_memory(), "mps/driver_mb": torch.mps.driver_allocated_memory()}
    return {name: count / MIB for name, count in memory.items()}


def telemetry_for(device_type: str) -> Telemetry:
    """Return the reader for torch's device type (cpu, cuda, mps)."""
    return {"mps": AppleTelemetry, "cuda": CudaTelemetry}.get(device_type, Telemetry)()
