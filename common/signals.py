"""The signals that ask a run to end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def heeded() -> list[signal.Signals]:
    """Return SIGINT, SIGTERM and SIGHUP; a SIGHUP that is ignored, as under nohup, stays so."""
    return [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)


@contextmanager
def handled_by(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Have them call `handle` with their number in the block."""
    before = {number: signal.signal(number, handle) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
