"""The emulated device entered into torch: its module, kernels, autocast, saving and loading."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from tests.emulated import memory
from tests.emulated.device import DEFAULT, SAVED, AnyGenerator, EmulatedTensor, each, run
from tests.emulated.rules import FACTORIES, FULL, LOWER, NAME, RULES, WAITED, Kind, aten


class DeviceModule:
    """What `torch.emu`, and in its disguise torch.cuda or torch.mps, offers."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed(self, seed: int) -> None:
        DEFAULT.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return DEFAULT.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        DEFAULT.set_state(state)

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def synchronize(self, device: Any = None) -> None:
        WAITED.record("synchronize")

    Stream = memory.Stream
    stream = staticmethod(memory.stream)

    def current_stream(self, device: Any = None) -> memory.Stream:
        return memory.STREAMS[-1]

    def get_device_name(self, device: Any = None) -> str:
        return "an emulated device"

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 2**33, 2**33

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    memory_reserved = max_memory_allocated = memory_allocated


MODULE = DeviceModule()

LIBRARIES: list[torch.library.Library] = []  # kept: a library that is collected unregisters its kernels


def enable(kind: Kind) -> None:
    """Register the device for the rest of this process, behaving as `kind`."""
    import torch.optim.optimizer as optimizer
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    RULES.kind = kind
    _setup_privateuseone_for_python_backend(NAME, backend_module=MODULE)
    anything, kernels = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    anything.fallback(lambda op, *args, **kwargs: run(overload_of(op), args, kwargs), "PrivateUse1")
    anything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in FACTORIES:
        op = operator_of(name)
        kernels.impl(name, lambda *args, op=op, **kwargs: run(op, args, kwargs), "PrivateUse1")
    for names, dtype in ((LOWER, None), (FULL, torch.float32)):
        for name in names:
            kernels.impl(name, partial(autocast_kernel, operator_of(name), dtype), "AutocastPrivateUse1")
    LIBRARIES.extend([anything, kernels])
    torch.Generator = AnyGenerator  # type: ignore[assignment, misc]
    for name in ("tensor", "as_tensor"):  # they switch Python dispatch off while they copy to the device
        setattr(torch, name, made_on_cpu_first(getattr(torch, name)))
    optimizer._foreach_supported_types.append(EmulatedTensor)
    torch.utils.data._utils.pin_memory.pin_memory = lambda data, device=None: tree_map_only(torch.Tensor, memory.pin, data)
    torch.serialization.register_package(5, location_of, refuse_to_load)


def overload_of(op: Any) -> Any:
    return op if isinstance(op, torch._ops.OpOverload) else op.default


def operator_of(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def autocast_kernel(op: Any, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    """Run `op` with its floating-point operands cast to dtype, None for the type that autocast was entered with."""
    to = dtype or torch.get_autocast_dtype(NAME)

    def cast(t: Any) -> Any:
        floating = isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(to) if floating and t.device.type == NAME else t

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(*each(cast, args), **{key: each(cast, value) for key, value in kwargs.items()})


def made_on_cpu_first(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return torch.tensor or torch.as_tensor that also serves the device."""

    def made(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, EmulatedTensor):
            kept = data.to(device=data.device if device is None else device, dtype=kwargs.get("dtype") or data.dtype)
            return kept if make.__name__ == "as_tensor" else kept.clone().detach()
        if device is None or torch.device(device).type != NAME:
            return make(data, **kwargs) if device is None else make(data, device=device, **kwargs)
        grad = kwargs.pop("requires_grad", False)
        WAITED.record("a tensor made from Python numbers")
        return make(data, **kwargs).to(device).requires_grad_(grad)

    return made


def location_of(storage: Any) -> str | None:
    return f"{NAME}:0" if storage in SAVED else None


def refuse_to_load(storage: Any, location: str) -> None:
    """Refuse what a file says was on the device: without map_location a machine without one could not load it."""
    if location.startswith(NAME):
        raise RuntimeError("Attempting to deserialize object on an emulated device: use map_location='cpu'")
