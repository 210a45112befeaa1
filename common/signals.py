"""The signals that ask a run to end."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ONCE = "DENOISING_ZOO_ONE_REQUEST"  # set where one request to end comes to a process several times, as in a cluster's job


def when_asked_again() -> signal.Handlers:
    """Return what a second request to end does: it ends the process, but nothing where it may be the first one again."""
    return signal.SIG_IGN if ONCE in os.environ else signal.SIG_DFL


def stop_signals() -> list[signal.Signals]:
    """Return SIGINT, SIGTERM and SIGHUP; a SIGHUP that is ignored, as under nohup, stays so."""
    return [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)


@contextmanager
def handled_by(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Have the stop signals call `handle` with their number in the block."""

    def called(number: int, frame: object) -> None:  # signal() takes the repr of what it is given: that of a run is long
        handle(number, frame)

    before = {number: signal.signal(number, called) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
