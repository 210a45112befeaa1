"""What the accelerator is doing, under the same names on any maker's: read() gives ordinary metrics of the run.

gpu/util_pct    share of time the GPU was busy, 0 to 100
gpu/freq_mhz    clock of its cores
gpu/power_w     watts
gpu/temp_c      degrees Celsius
cuda/allocated_mb, cuda/reserved_mb, mps/allocated_mb, mps/driver_mb    memory of this process in MiB
"""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

MIB = 2**20
WINDOW_SECONDS = 5.0
MACMON_COMMAND = ["macmon", "pipe", "-i", "500"]  # one JSON line every 500 ms


class Telemetry(ABC):
    """Reads the accelerator of this process."""

    @abstractmethod
    def read(self) -> dict[str, float]:
        """Return the figures known now, at once; a figure that is not known is absent."""

    def close(self) -> None:
        """Let go of what the reader holds; it may be called more than once."""


class NoTelemetry(Telemetry):
    """A CPU, or an accelerator nobody can read."""

    def read(self) -> dict[str, float]:
        return {}


class TorchCudaTelemetry(Telemetry):
    """What torch itself knows of the current CUDA device: memory."""

    def read(self) -> dict[str, float]:
        import torch

        return {
            "cuda/allocated_mb": torch.cuda.memory_allocated() / MIB,
            "cuda/reserved_mb": torch.cuda.memory_reserved() / MIB,
        }


class NvidiaTelemetry(TorchCudaTelemetry):
    """The current CUDA device through NVML (extra `gpu`), and torch's memory figures.

    NVML's utilisation is the share of its last sampling period (up to a second) in which a kernel ran. A figure that
    the device does not offer (power on some laptops, load on a MIG slice) is absent.

    Raises:
        pynvml.NVMLError: no NVIDIA driver (ROCm calls its devices cuda as well), or one that does not know the device.
    """

    def __init__(self) -> None:
        import pynvml
        import torch

        self.nvml = pynvml
        self.nvml.nvmlInit()
        self.device = self.nvml.nvmlDeviceGetHandleByUUID(nvml_uuid(torch.cuda.get_device_properties().uuid))
        self.readers: dict[str, Callable[[], float]] = {
            "gpu/util_pct": lambda: self.nvml.nvmlDeviceGetUtilizationRates(self.device).gpu,
            "gpu/freq_mhz": lambda: self.nvml.nvmlDeviceGetClockInfo(self.device, self.nvml.NVML_CLOCK_SM),
            "gpu/power_w": lambda: self.nvml.nvmlDeviceGetPowerUsage(self.device) / 1000,
            "gpu/temp_c": lambda: self.nvml.nvmlDeviceGetTemperature(self.device, self.nvml.NVML_TEMPERATURE_GPU),
        }

    def read(self) -> dict[str, float]:
        figures = super().read()
        for name, reader in self.readers.items():
            with contextlib.suppress(self.nvml.NVMLError):
                figures[name] = float(reader())
        return figures

    def close(self) -> None:
        if self.readers:
            self.nvml.nvmlShutdown()
        self.readers = {}


class RollingMean:
    """Means over the last `seconds` of samples; safe between one writing and one reading thread."""

    def __init__(self, seconds: float = WINDOW_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.clock = clock
        self.samples: deque[tuple[float, dict[str, float]]] = deque()
        self.lock = threading.Lock()

    def add(self, sample: dict[str, float]) -> None:
        with self.lock:
            self.samples.append((self.clock(), sample))
            self.forget_old()

    def mean(self) -> dict[str, float]:
        """Per name, the mean over the samples in the window that have it."""
        with self.lock:
            self.forget_old()
            samples = [sample for _, sample in self.samples]
        names = sorted({name for sample in samples for name in sample})
        values = {name: [sample[name] for sample in samples if name in sample] for name in names}
        return {name: sum(known) / len(known) for name, known in values.items()}

    def forget_old(self) -> None:
        while self.samples and self.samples[0][0] <= self.clock() - self.seconds:
            self.samples.popleft()


class AppleTelemetry(Telemetry):
    """An Apple GPU: macmon's stream, averaged over a rolling window of 5 s, and torch's memory figures.

    Without macmon on PATH one line says how to install it and only the memory figures remain.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.window = RollingMean(WINDOW_SECONDS, clock)
        self.process: subprocess.Popen[str] | None = None
        if shutil.which("macmon") is None:
            print("GPU telemetry is off: macmon is not installed; `brew install macmon` turns it on", file=sys.stderr)
            return
        self.process = subprocess.Popen(
            MACMON_COMMAND, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.reader = threading.Thread(target=self.follow, daemon=True, name="macmon")
        self.reader.start()

    def follow(self) -> None:
        """Take in macmon's lines until it ends; runs in its own thread."""
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and line.endswith("}\n"):
                self.window.add(parse_macmon(json.loads(line)))

    def read(self) -> dict[str, float]:
        return self.window.mean() | mps_memory()

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

    macmon up to 0.7 tells the GPU as `gpu_usage: [MHz, ratio]`, its ratio (0 to 1) scaled by frequency; from 0.8 on it
    has `gpu_freq_mhz` and `gpu_active_ratio`, the share of time busy (0 to 1), which is what NVML means as well and is
    taken where present. `gpu_power` is in watts, `temp.gpu_temp_avg` in Celsius, 0 where no sensor answered.
    """
    if "gpu_active_ratio" in record:
        frequency, ratio = record["gpu_freq_mhz"], record["gpu_active_ratio"]
    else:
        frequency, ratio = record["gpu_usage"]
    figures = {"gpu/util_pct": 100.0 * ratio, "gpu/freq_mhz": float(frequency), "gpu/power_w": record["gpu_power"]}
    temperature = record["temp"]["gpu_temp_avg"]
    return figures | ({"gpu/temp_c": temperature} if temperature > 0 else {})


def mps_memory() -> dict[str, float]:
    """Memory of this process on the Apple GPU: tensors, and all that the driver holds for it; nothing elsewhere."""
    import torch

    if not torch.backends.mps.is_available():
        return {}
    return {
        "mps/allocated_mb": torch.mps.current_allocated_memory() / MIB,
        "mps/driver_mb": torch.mps.driver_allocated_memory() / MIB,
    }


def nvml_uuid(uuid: object) -> str:
    """Return torch's UUID of a device as NVML writes it; unlike an index it means the same under CUDA_VISIBLE_DEVICES."""
    return f"GPU-{str(uuid).removeprefix('GPU-')}"


def telemetry_for(device_type: str) -> Telemetry:
    """Return the reader for torch's device type (cpu, cuda, mps); what cannot be read costs a line on
    stderr, not the run.
    """
    if device_type == "mps":
        return AppleTelemetry()
    return cuda_telemetry() if device_type == "cuda" else NoTelemetry()


def cuda_telemetry() -> Telemetry:
    """NVML where there is one, else torch's memory figures and a line that says why."""
    if find_spec("pynvml") is None:
        print("GPU telemetry is memory only: `uv sync --extra gpu` adds load, clock, power and heat", file=sys.stderr)
        return TorchCudaTelemetry()
    import pynvml

    try:
        return NvidiaTelemetry()
    except pynvml.NVMLError as error:
        print(f"GPU telemetry is memory only: NVML says {error}", file=sys.stderr)
        return TorchCudaTelemetry()
