"""An accelerator emulated in Python: `emu:0`, through torch's PrivateUse1 hooks for Python back ends.

It computes on the CPU in memory of its own and behaves as CUDA or as MPS do: it refuses operands of two devices, generators
of another device, .numpy(), loading without map_location, float64 (MPS), operations without a deterministic kernel under
deterministic=true (CUDA); it rounds the operands of products to TF32 where TF32 is on (CUDA); and it counts every wait of
the host. Its generators draw the CPU's numbers, so that a run on it must equal the run on the CPU.

It cannot compile, capture graphs, run collectives or overlap streams. The hooks are experimental and global to the process:
enable() it once, in a process of its own.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from tests.emulated.rules import (
    COPIES,
    FACTORIES,
    FULL,
    INDEXING,
    LOWER,
    NAME,
    NOT_DETERMINISTIC,
    PRODUCTS,
    RULES,
    WAITED,
    WAITS,
    Kind,
    as_tf32,
    aten,
)

CPU_GENERATOR = torch.Generator
SAVED: "weakref.WeakSet[torch.UntypedStorage]" = weakref.WeakSet()  # storages that torch.save took from the device
GENERATORS: "weakref.WeakValueDictionary[int, Generator]" = weakref.WeakValueDictionary()


def is_emulated(generator: torch.Generator) -> bool:
    """Return whether a generator is the device's; the dispatcher hands it over in a new Python object, with its address."""
    return generator._cdata in GENERATORS


class Generator(CPU_GENERATOR):
    """Draws the CPU's numbers and says that it is on the device."""

    def __init__(self) -> None:
        GENERATORS[self._cdata] = self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(NAME, 0)


class GeneratorType(type):
    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, CPU_GENERATOR)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return Generator() if torch.device(device).type == NAME else CPU_GENERATOR(device)


class AnyGenerator(metaclass=GeneratorType):
    """Stands in for torch.Generator."""


DEFAULT = Generator()


class EmulatedTensor(torch.Tensor):
    """A tensor on the device: a shell around one on the CPU, `inner`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> "EmulatedTensor":
        if inner.dtype in (torch.float64, torch.complex128) and not RULES.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        shell = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(NAME, 0), requires_grad=requires_grad,
        )  # fmt: skip
        shell.inner = inner
        return shell

    def __repr__(self) -> str:  # type: ignore[override]
        return f"EmulatedTensor({self.inner!r})"

    def __getitem__(self, key: Any) -> torch.Tensor:
        if isinstance(key, list):  # which torch makes a tensor of with Python dispatch off
            WAITED.record("index by a list")
            key = torch.tensor(key).to(NAME)
        return super().__getitem__(key)

    def tolist(self) -> Any:
        WAITED.record("tolist")
        return self.inner.tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], meta: None, size: Any, stride: Any) -> "EmulatedTensor":
        return EmulatedTensor(parts["inner"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save as a plain tensor whose storage is marked as the device's (see `location_of`)."""
        inner = self.inner.detach()
        SAVED.add(inner.untyped_storage())
        WAITED.record("save")
        if isinstance(self, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (inner, self.requires_grad, {})
        return inner.requires_grad_(False).__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation as the device would: check, count, compute on the CPU, wrap."""
    flat = tree_leaves((args, kwargs))
    ours = any(isinstance(leaf, EmulatedTensor) for leaf in flat)
    device = kwargs.get("device")
    here = ours if device is None else torch.device(device).type == NAME  # where the result lies
    if func is aten._efficientzerotensor.default:  # forward mode's zeros without memory; these have some
        func = aten.zeros.default
    check_operands(func, flat)
    check_generators(flat, here)
    count_waits(func, args, ours, here)
    inner_args, inner_kwargs = (tree_map_only(EmulatedTensor, lambda t: t.inner, part) for part in (args, kwargs))
    if here:
        if RULES.deterministic and func in NOT_DETERMINISTIC:
            raise RuntimeError(f"{func} does not have a deterministic implementation (torch.use_deterministic_algorithms)")
        if RULES.tf32 and func in PRODUCTS:
            inner_args = tree_map(as_tf32, inner_args)
        if inner_kwargs.pop("pin_memory", None):
            raise RuntimeError("only dense CPU tensors can be pinned")
        if device is not None:
            inner_kwargs["device"] = torch.device("cpu")
    draws = here and torch.Tag.nondeterministic_seeded in func.tags and not any(isinstance(a, CPU_GENERATOR) for a in flat)
    with drawing_from_device() if draws else nullcontext():
        out = func(*inner_args, **inner_kwargs)
    if not here:
        same = isinstance(out, torch.Tensor) and any(out is leaf for leaf in tree_leaves((inner_args, inner_kwargs)))
        return out.clone() if same else out
    wrapped = (
        rewrapped(func, args, kwargs, out) if func._schema.is_mutable else tree_map_only(torch.Tensor, EmulatedTensor, out)
    )
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours else wrapped


def check_operands(func: Any, flat: list[Any]) -> None:
    """Raise RuntimeError when an operation mixes the device and the CPU; scalars and integer indices may come from there."""
    cpu = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, EmulatedTensor) and a.device.type == "cpu"]
    if not cpu or func in COPIES or not any(isinstance(a, EmulatedTensor) for a in flat):
        return
    wide = [a for a in cpu if a.dim() > 0]
    if func in INDEXING and isinstance(flat[0], EmulatedTensor):
        wide = [a for a in wide if a.dtype not in (torch.int64, torch.int32, torch.bool, torch.uint8)]
        WAITED.record(f"{func}: index from the CPU")
    if wide:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! ({func})"
        )


def check_generators(flat: list[Any], here: bool) -> None:
    """Raise RuntimeError for a generator of the other device."""
    for generator in (leaf for leaf in flat if isinstance(leaf, CPU_GENERATOR)):
        if is_emulated(generator) != here:
            there = NAME if is_emulated(generator) else "cpu"
            raise RuntimeError(f"Expected a '{NAME if here else 'cpu'}' device type for generator but found '{there}'")


def count_waits(func: Any, args: Any, ours: bool, here: bool) -> None:
    """Record an operation that makes the host wait for the device."""
    WAITED.operations += 1
    if not ours:
        return
    if func in WAITS:
        WAITED.record(str(func))
    if func in INDEXING and any(
        isinstance(a, EmulatedTensor) and a.dtype in (torch.bool, torch.uint8) for a in args[1] or []
    ):
        WAITED.record(f"{func}: boolean mask")
    if func is aten._to_copy.default and not here:
        WAITED.record("device to host")
    if func is aten.copy_.default and isinstance(args[0], EmulatedTensor) != isinstance(args[1], EmulatedTensor):
        WAITED.record("host to device" if isinstance(args[0], EmulatedTensor) else "device to host")


@contextmanager
def drawing_from_device() -> Iterator[None]:
    """Let the CPU's default generator be the device's."""
    kept = torch.default_generator.get_state()
    torch.default_generator.set_state(DEFAULT.get_state())
    yield
    DEFAULT.set_state(torch.default_generator.get_state())
    torch.default_generator.set_state(kept)


def rewrapped(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Return the result of an operation that changes its arguments: they stay the same objects, what is new is wrapped."""
    shells = {id(leaf.inner): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, EmulatedTensor)}
    for shell in shells.values():
        if shell.shape != shell.inner.shape or shell.stride() != shell.inner.stride():
            raise NotImplementedError(f"{func} changed the shape of a tensor in place")
    return tree_map_only(torch.Tensor, lambda t: shells[id(t)] if id(t) in shells else EmulatedTensor(t), out)


class Watch(TorchDispatchMode):
    """Sees the operations of the CPU too: a generator of the device among them is refused."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, device = tree_leaves((args, kwargs)), kwargs.get("device")
        ours = any(isinstance(leaf, EmulatedTensor) for leaf in flat)
        check_generators(flat, ours if device is None else torch.device(device).type == NAME)
        return func(*args, **kwargs)


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
    torch.utils.data._utils.pin_memory.pin_memory = lambda data, device=None: data  # pinned memory is memory
    torch.serialization.register_package(5, location_of, refuse_to_load)


def overload_of(op: Any) -> Any:
    return op if isinstance(op, torch._ops.OpOverload) else op.default


def operator_of(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def autocast_kernel(op: Any, dtype: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    """Run `op` with its floating-point operands cast to dtype, None for the type that autocast was entered with."""
    to = dtype or torch.get_autocast_dtype(NAME)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(to) if t.is_floating_point() and t.dtype != torch.float64 and t.device.type == NAME else t

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(*tree_map_only(torch.Tensor, cast, args), **tree_map_only(torch.Tensor, cast, kwargs))


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
