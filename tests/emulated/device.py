"""An accelerator emulated in Python: `emu:0`, through torch's PrivateUse1 hooks for Python back ends.

It computes on the CPU in memory of its own and behaves as CUDA or as MPS do: it refuses operands of two devices, generators
of another device, .numpy(), loading without map_location, float64 (MPS), operations without a deterministic kernel under
deterministic=true (CUDA); it rounds the operands of products to TF32 where TF32 is on (CUDA); and it counts every wait of
the host. Its generators draw the CPU's numbers, so that a run on it must equal the run on the CPU.

Copies that nobody waits for, and those of another stream, arrive when they are waited for (memory.py).

It cannot compile, capture graphs or run collectives. The hooks are experimental and global to the process:
enable() it once, in a process of its own.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.emulated import memory
from tests.emulated.rules import (
    COPIES,
    FUSED,
    INDEXING,
    NAME,
    NOT_DETERMINISTIC,
    PRODUCTS,
    RULES,
    WAITED,
    WAITS,
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

    def record_stream(self, stream: memory.Stream) -> None:
        memory.FOREIGN.discard(self.inner.untyped_storage())

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


def leaves(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments of an operation, those in lists among them; torch's own trees take longer than the operations."""
    values = (*args, *kwargs.values())
    return [leaf for value in values for leaf in (value if type(value) in (list, tuple) else (value,))]


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """Return what a function gives for a value, or for each one of a list."""
    if type(value) in (list, tuple):
        return type(value)([each(function, part) for part in value])
    return function(value)


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, EmulatedTensor) else value


def wrapped(value: Any) -> Any:
    return EmulatedTensor(value) if isinstance(value, torch.Tensor) else value


@cache
def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@cache
def changes_arguments(func: Any) -> bool:
    return bool(func._schema.is_mutable)


@cache
def has_aliases(func: Any) -> bool:
    return any(out.alias_info is not None for out in func._schema.returns)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation as the device would: check, count, compute on the CPU, wrap."""
    flat = leaves(args, kwargs)
    ours = any(isinstance(leaf, EmulatedTensor) for leaf in flat)
    device = kwargs.get("device")
    here = ours if device is None else torch.device(device).type == NAME  # where the result lies
    if func is aten._efficientzerotensor.default:  # forward mode's zeros without memory; these have some
        func = aten.zeros.default
    check_operands(func, flat)
    check_generators(flat, here)
    if memory.FOREIGN:
        for leaf in flat:
            if isinstance(leaf, EmulatedTensor):
                memory.check_lent(leaf.inner)
    asynchronous = is_asynchronous(func, args, kwargs)
    if not asynchronous:
        count_waits(func, args, ours, here)
    if func is aten.copy_.default and not isinstance(args[0], EmulatedTensor):
        return to_host(args[0], args[1].inner, asynchronous)
    if func is aten.copy_.default and asynchronous and len(memory.STREAMS) > 1:
        memory.copy_later(args[0].inner, args[1], memory.STREAMS[-1].begun)
        return args[0]
    inner_args, inner_kwargs = each(unwrapped, tuple(args)), {key: each(unwrapped, value) for key, value in kwargs.items()}
    if here:
        if RULES.deterministic and func in NOT_DETERMINISTIC:
            raise RuntimeError(f"{func} does not have a deterministic implementation (torch.use_deterministic_algorithms)")
        if RULES.kind == "mps" and func in FUSED:  # which ignore these
            inner_kwargs |= {"grad_scale": None, "found_inf": None}
        if func is aten.convolution.default and torch.backends.cudnn.benchmark:
            RULES.tuned.add(len(inner_args[0]))
        if RULES.tf32 and func in PRODUCTS:
            inner_args = each(as_tf32, inner_args)
        if inner_kwargs.pop("pin_memory", None):
            raise RuntimeError("only dense CPU tensors can be pinned")
        if device is not None:
            inner_kwargs["device"] = torch.device("cpu")
    draws = here and is_random(func) and not any(isinstance(a, CPU_GENERATOR) for a in flat)
    with drawing_from_device() if draws else nullcontext():
        out = func(*inner_args, **inner_kwargs)
    if not here:
        same = isinstance(out, torch.Tensor) and any(out is leaf for leaf in leaves(inner_args, inner_kwargs))
        return out.clone() if same else out
    if device is not None and not ours:
        memory.made(out)
    result = rewrapped(func, args, kwargs, out) if changes_arguments(func) else each(wrapped, out)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours and has_aliases(func) else result


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


def is_asynchronous(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether it copies between the device and pinned memory (MPS: from any), and is asked not to wait."""
    if func is aten.copy_.default:
        hosts = [a for a in args[:2] if not isinstance(a, EmulatedTensor)]
        asked = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    elif func is aten._to_copy.default and not isinstance(args[0], EmulatedTensor):
        hosts, asked = [args[0]], kwargs.get("non_blocking", False)
    else:
        return False
    from_host = func is aten._to_copy.default or (len(hosts) == 1 and hosts[0] is args[1])
    return bool(asked) and len(hosts) == 1 and (memory.is_pinned(hosts[0]) or (RULES.kind == "mps" and from_host))


def to_host(target: torch.Tensor, source: torch.Tensor, asynchronous: bool) -> torch.Tensor:
    """Copy to a tensor of the CPU, in the end."""
    if not asynchronous:
        return target.copy_(source)
    memory.copy_later(target, source, memory.LATE)
    return target


def count_waits(func: Any, args: Any, ours: bool, here: bool) -> None:
    """Record an operation that makes the host wait for the device."""
    WAITED.operations += 1
    WAITED.copies += func in (aten.clone.default, aten.contiguous.default)
    if not ours:
        if here and func is aten._to_copy.default and args[0].dim() > 0:
            WAITED.record("host to device")
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
    shells = {id(leaf.inner): leaf for leaf in leaves(args, kwargs) if isinstance(leaf, EmulatedTensor)}
    for shell in shells.values():
        if shell.shape != shell.inner.shape or shell.stride() != shell.inner.stride():
            raise NotImplementedError(f"{func} changed the shape of a tensor in place")
    return each(lambda value: shells[id(value)] if id(value) in shells else wrapped(value), out)


class Watch(TorchDispatchMode):
    """Sees the operations of the CPU too: a generator of the device among them is refused."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, device = leaves(args, kwargs), kwargs.get("device")
        ours = any(isinstance(leaf, EmulatedTensor) for leaf in flat)
        check_generators(flat, ours if device is None else torch.device(device).type == NAME)
        if func is aten.is_pinned.default:
            return memory.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return memory.pin(args[0].clone())
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        return memory.pin(func(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory"}))
