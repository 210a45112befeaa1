"""How long things take: said before those of more than ten seconds, and shown while they go on, on stderr."""

import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from common.distributed import rank

LONG = 10.0  # seconds from which on an estimate is printed
BETWEEN = 30.0  # seconds at least between two lines, and a tenth of the whole
FORM = {
    "leave": False, "delay": 1.0, "bar_format": "{desc}: {percentage:3.0f} %|{bar}| {elapsed} gone, {remaining} left",
}  # fmt: skip
TRIAL = 1.0  # seconds that are tried at once, about

T = TypeVar("T")


def on_terminal() -> bool:
    """Whether people see stderr as it is written."""
    return sys.stderr is not None and sys.stderr.isatty()


def duration(seconds: float) -> str:
    """Return a duration such as 8 s, 6 min, 1.5 h or 3 days."""
    for most, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < most:
            return f"{seconds / unit:.2g} {name}" if seconds / unit < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:,.0f} days"


def in_notebook() -> bool:
    """Whether stderr is shown below a cell of a notebook."""
    return type(sys.stderr).__module__.startswith("ipykernel.")


def bar(**settings: Any) -> Any:
    """Return a tqdm bar on stderr, for a terminal (80 x 24 where its size is not known) or a notebook."""
    with warnings.catch_warnings(action="ignore"):  # that a notebook has no widgets: then the bar is text
        tqdm = importlib.import_module("tqdm.auto" if in_notebook() else "tqdm").tqdm
    if on_terminal():
        known = min(os.get_terminal_size(sys.stderr.fileno())) > 0
        settings |= {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
    elif in_notebook():
        settings |= {"ncols": 80}
    return tqdm(disable=rank() > 0 or not (on_terminal() or in_notebook()), **settings)


class Progress:
    """Of one job of known size: a bar on a terminal, else an estimate in words once it is known to be long, and lines."""

    def __init__(self, what: str, total: int, initial: int = 0, **form: Any):
        """initial: what was done earlier. form: of the bar, as tqdm takes it."""
        self.what, self.total, self.initial, self.done = what, total, initial, initial
        self.begun = self.spoken = time.perf_counter()
        self.silent = self.fresh = True
        self.bar = bar(desc=what, total=total, initial=initial, **(form or FORM))

    def advance(self, done: int) -> None:
        """Count so much more of the total as done."""
        done, first, self.fresh = min(done, self.total - self.done), self.fresh, False
        self.done += done
        self.bar.update(done)
        if first and 10 * done < self.total - self.initial:  # one of many, which also prepares: no measure of the others
            self.begun, self.initial = time.perf_counter(), self.done
        elif self.bar.disable and rank() == 0:
            self.speak(time.perf_counter())

    def speak(self, now: float) -> None:
        """Print a line, if one is due."""
        gone = now - self.begun
        left = gone * (self.total - self.done) / max(self.done - self.initial, 1)
        due = gone > 1 and gone + left > LONG if self.silent else now - self.spoken > max(BETWEEN, (gone + left) / 10)
        if due and left > 0:
            share = "" if self.silent else f"{self.done / self.total:.0%} done, "
            print(f"{self.what}: {share}about {duration(left)} left", file=sys.stderr, flush=True)
            self.silent, self.spoken = False, now


@contextmanager
def progress(what: str, total: int) -> Iterator[Progress]:
    """Show `Progress` of a job for as long as the block goes on."""
    shown = Progress(what, total)
    try:
        yield shown
    finally:
        shown.bar.close()


@contextmanager
def watched(network: nn.Module, what: str, rows: int) -> Iterator[None]:
    """Show the progress of a job that takes `rows` rows through the network in all, as they go through it."""
    with progress(what, rows) as shown:
        handle = network.register_forward_hook(lambda module, given, answer: shown.advance(len(given[0])))
        try:
            yield
        finally:
            handle.remove()


def each(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, with progress; total: how many there are, where the items do not know it."""
    items = items if total is not None or isinstance(items, Sized) else list(items)
    with progress(what, len(items) if isinstance(items, Sized) else total or 0) as shown:
        for item in items:
            yield item
            shown.advance(1)


def seconds_a_row(work: Callable[[int], object], most: int, device: torch.device) -> float:
    """Return seconds a row of work(rows), tried with 2 (for batch norms), 8, 32, ... rows up to `most`, or to TRIAL."""

    def tried(rows: int) -> float:
        begun = time.perf_counter()
        work(rows)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    rows = min(2, most)
    tried(rows)  # the first one prepares
    while (seconds := tried(rows)) < TRIAL / 4 and rows < most:
        rows = min(4 * rows, most)
    return (seconds if seconds > TRIAL else (tried(rows) + tried(rows)) / 2) / rows
