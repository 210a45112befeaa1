"""The device a run computes on, and the numerical switches that go with it."""

import contextlib
import fcntl
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from common.errors import UserError

BUSY_GIB, WAIT_SECONDS = 2.0, 30.0  # a GPU of which others hold more is in use; how often to look again
AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return the device of a name; auto is CUDA, then MPS, then CPU. UserError for one this machine does not have."""
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"device takes auto, cpu, cuda or mps, not {name!r}")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = ", ".join(kind for kind, found in available.items() if found)
        raise UserError(f"device={name} is not available on this machine; use device=auto or one of: {there}")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        take_own_gpu(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def take_own_gpu(place: int) -> None:
    """Compute on the CUDA device of this process's place among those here. UserError for more processes than devices."""
    there = torch.cuda.device_count()
    if place >= there:
        raise UserError(f"this machine has {there} CUDA device(s) and more processes; start so many, or use device=cpu")
    torch.cuda.set_device(place)


def device_name(device: torch.device) -> str:
    """Return what a person calls the device."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def set_numerics(device: torch.device, deterministic: bool) -> None:
    """Set, on CUDA, TF32 and cuDNN autotuning, or deterministic kernels throughout. The CPU is deterministic as it is."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # to ask is cheap, to set imports torch's compiler
        torch.use_deterministic_algorithms(deterministic)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = not deterministic
        torch.backends.cudnn.allow_tf32 = not deterministic
        torch.backends.cudnn.benchmark = not deterministic


def tune_kernels(device: torch.device, usual: bool) -> None:
    """Let cuDNN try kernels at shapes it has not seen, if they are the usual ones: others are too seldom to pay for it."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = usual and not torch.are_deterministic_algorithms_enabled()


def weight_layout(device: torch.device) -> torch.memory_format | None:
    """Return the layout of convolutions' weights: channels last on CUDA, whose kernels want it; on the CPU it is slower."""
    return torch.channels_last if device.type == "cuda" else None


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """Compute matrix products and convolutions within in true fp32: no TF32, whose 10 bits of mantissa drown a difference
    of two evaluations (an error of 3e-2 for 4e-5) and make adaptive steps too small.
    """
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def memory_of_others(device: torch.device) -> float:
    """Return the GiB of a CUDA device that other processes and this one's context (half a GiB) hold; 0 elsewhere."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free - torch.cuda.memory_reserved(device)) / 2**30


def wait_for_device(device: torch.device, wait: bool, pause: Callable[[float], None] = time.sleep) -> None:
    """Print one line while others use the GPU; with `wait`, return only when they no longer do."""
    held = memory_of_others(device)
    if held < BUSY_GIB:
        return
    if not wait:
        print(f"note: other processes hold {held:.0f} GiB of this GPU; it may be slow or not fit (wait=true waits for them)")
        return
    print(f"waiting: other processes hold {held:.0f} GiB of this GPU (wait=true)", flush=True)
    while memory_of_others(device) >= BUSY_GIB:
        pause(WAIT_SECONDS)


@contextlib.contextmanager
def own_turn(device: torch.device, wait: bool, place: Path | None = None) -> Iterator[None]:
    """Surround a run on a device that others may use: one line says so; with `wait` it begins when they no longer do.

    MPS does not say what others hold, so runs on it hold a lock in `place`, the folder of temporary files, which the system
    releases when a process ends, however it ends.
    """
    if device.type != "mps":
        wait_for_device(device, wait)
        yield
        return
    with ((place or Path(tempfile.gettempdir())) / f"denoising-zoo-mps-{os.getuid()}.lock").open("a") as lock:
        take_turn(lock, wait)
        yield


def take_turn(lock: TextIO, wait: bool) -> None:
    """Lock the file: alone with `wait`, else beside others who do not wait, if those who hold it allow that."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait:
            print("waiting: another run uses this GPU (wait=true)", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        else:
            print("note: another run uses this GPU; it may be slow or not fit (wait=true waits for it)")
    if not wait:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a loss is computed; fp32 is no context at all."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_TYPES[precision])


def gradient_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return loss scaling for fp16; otherwise a scaler that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
