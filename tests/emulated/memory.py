"""Pinned memory and streams of the emulated device: copies that nobody waits for arrive once they are waited for."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PINNED: "weakref.WeakSet[torch.UntypedStorage]" = weakref.WeakSet()
FOREIGN: "weakref.WeakSet[torch.UntypedStorage]" = weakref.WeakSet()  # made on a stream, not yet lent to another
LATE: list[Callable[[], Any]] = []  # copies to the host that have not arrived
NOTHING = {True: torch.nan, False: 0}  # what memory holds before a copy has arrived, by whether it is of fractions


def pin(tensor: torch.Tensor) -> torch.Tensor:
    PINNED.add(tensor.untyped_storage())
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage() in PINNED


def copy_later(target: torch.Tensor, source: torch.Tensor, arrivals: list[Callable[[], Any]]) -> None:
    """Spoil `target` until the copy of `source`, as it is now, arrives."""
    kept, own = source.detach().clone(), target.detach()
    own.fill_(NOTHING[own.is_floating_point()])
    arrivals.append(lambda: own.copy_(kept))


def arrive(arrivals: list[Callable[[], Any]]) -> None:
    while arrivals:
        arrivals.pop(0)()


class Event:
    """What a stream has done so far."""

    def __init__(self, arrivals: list[Callable[[], Any]]) -> None:
        self.arrivals = arrivals


class Stream:
    """Copies begun on it arrive on another stream when that waits for its event."""

    def __init__(self, device: Any = None) -> None:
        self.begun: list[Callable[[], Any]] = []

    def record_event(self) -> Event:
        begun, self.begun = self.begun, []
        return Event(begun)

    def wait_event(self, event: Event) -> None:
        arrive(event.arrivals)


STREAMS = [Stream()]  # the last is the current one


@contextmanager
def stream(current: Stream) -> Iterator[None]:
    STREAMS.append(current)
    yield
    STREAMS.pop()


def made(inner: torch.Tensor) -> None:
    """Note a new tensor of the device, if it is made on a stream of its own."""
    if len(STREAMS) > 1:
        FOREIGN.add(inner.untyped_storage())


def check_lent(inner: torch.Tensor) -> None:
    """Raise RuntimeError where the default stream uses memory of another that was not told: it could be given away again."""
    if len(STREAMS) == 1 and inner.untyped_storage() in FOREIGN:
        raise RuntimeError("memory of another stream is used without record_stream")
