"""Data too large for the device: read from disk batch by batch, ahead of time by worker processes if there are any."""

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from dataloaders.base_dataloaders import Batch, EpochPlan, FlowDataset, pair_sizes

AHEAD = 4  # batches that each worker reads in advance
NAMED = 5  # unreadable rows that are named in the line about them
LEAST = 2  # held-out rows; of fewer there is no distance


class Rows(NamedTuple):
    """What one batch is made of: numbers of rows, as the reader counts them, and the epoch's seed, for random crops."""

    numbers: list[int]
    seed: int


class Read(NamedTuple):
    """What a worker hands back: stored (B, ...), labels (B,) or None, and unreadable rows, which others stand in for.

    error: what is wrong with a row, where that ends the run.
    """

    stored: Tensor
    labels: Tensor | None
    unreadable: list[int]
    error: str | None = None

    def sound(self) -> "Read":
        """Return the same. UserError where a row is wrong: raised in a worker, its traceback would be part of the words."""
        if self.error is not None:
            raise UserError(self.error)
        return self


class Reader(Dataset[Read], ABC):
    """Reads whole batches. It is copied to workers, holds no state that changes, and draws nothing from global generators:
    what it returns for a batch is the same in any process.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return how many rows there are."""

    @abstractmethod
    def __getitem__(self, rows: Rows) -> Read: ...

    def name(self, row: int) -> str:
        """Return what a person calls a row."""
        return str(row)

    def describe(self) -> str:
        """Return what the rows are, in a few words."""
        return "rows"


class Loader(DataLoader[Any]):
    """A DataLoader that does not warn of more workers than cores: these wait for disks, and were asked for."""

    def check_worker_number_rationality(self) -> None:
        pass


class ReadAhead:
    """Batches of a reader in the order asked for, by `workers` processes that stay for later epochs; 0: by this one."""

    def __init__(self, reader: Reader, workers: int, pin_memory: bool = False):
        self.reader, self.plan = reader, list[Rows]()
        self.turn = 0
        self.loader = None if workers == 0 else Loader(
            reader, batch_size=None, sampler=self.plan, num_workers=workers, prefetch_factor=AHEAD, persistent_workers=True,
            pin_memory=pin_memory, worker_init_fn=leave_signals_to_the_parent,
            collate_fn=unchanged,  # type: ignore[arg-type]
            generator=torch.Generator(),  # else it would draw from the global one, and a resumed run from another place
        )  # fmt: skip

    def batches(self, plan: Iterable[Rows]) -> Iterator[Read]:
        """Yield the planned batches. Only the newest iterator may be used: the workers serve one plan at a time."""
        self.turn += 1
        turn, self.plan[:] = self.turn, plan
        source = map(self.reader.__getitem__, list(self.plan)) if self.loader is None else iter(self.loader)
        for _ in range(len(self.plan)):
            assert turn == self.turn, "a newer plan has taken the workers"
            yield next(source).sound()


def uploaded(reads: Iterator[Read], device: torch.device) -> Iterator[Read]:
    """Yield reads; on CUDA with their tensors there, each copied on a stream of its own while the one before is used."""
    if device.type != "cuda":
        yield from reads
        return
    stream, ahead = torch.cuda.Stream(device), list[tuple[Read, Any]]()
    for read in reads:
        with torch.cuda.stream(stream):
            labels = None if read.labels is None else pinned_copy(read.labels, device)
            ahead.append((read._replace(stored=pinned_copy(read.stored, device), labels=labels), stream.record_event()))
        if len(ahead) > 1:
            yield arrived(*ahead.pop(0))
    for last in ahead:
        yield arrived(*last)


def pinned_copy(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy on CUDA that is still on its way."""
    return (host if host.is_pinned() else host.pin_memory()).to(device, non_blocking=True)


def arrived(read: Read, event: Any) -> Read:
    """Let the stream that computes wait for a copy of another stream, and its memory for what that stream does with it."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for tensor in (read.stored, read.labels):
        if tensor is not None:
            tensor.record_stream(current)
    return read


def leave_signals_to_the_parent(worker: int) -> None:
    """Keep signals of a terminal, or of torchrun, from a worker: the run saves first, then ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)


def unchanged(read: Read) -> Read:
    return read


def require_readable(data: "StreamDataset", reader: Reader, unreadable: int, least: int = 1) -> None:
    """Raise UserError when fewer than `least` rows can be read."""
    left = len(reader) - unreadable
    if left < least:
        few = f"only {left}" if left else "none"
        raise UserError(f"{few} of the {len(reader):,} files of {type(data).__name__} can be read; are they damaged?")


class KeptRows:
    """Rows of a stream that evaluations look at, as stored: read once, when first asked for, and kept in memory.

    Every method is given the data set they are of: kept here, it would outlive the run, and its workers with it.
    """

    def __init__(self) -> None:
        self.unseen_rows: Read | None = None
        self.seen: tuple[int, Read] | None = None  # how many training rows were asked for, and what there is
        self.pool, self.lent = torch.empty(0), 0  # what is held out, and behind it so many training rows

    def read(self, data: "StreamDataset", reader: Reader, rows: Sequence[int]) -> Read:
        """Return rows, without those that cannot be read: nothing stands in for them."""
        numbers = data.numbers(rows)
        plan = [Rows(numbers[first : first + 64], 0) for first in range(0, len(numbers), 64)]
        parts, lost = [], set[int]()
        for asked, read in zip(plan, ReadAhead(reader, data.num_workers).batches(plan), strict=True):
            lost |= set(read.unreadable)
            own = torch.tensor([number not in lost for number in asked.numbers])
            parts.append((read.stored[own], None if read.labels is None else read.labels[own]))
        labels = [label for _, label in parts if label is not None]
        return Read(torch.cat([stored for stored, _ in parts]), torch.cat(labels) if labels else None, sorted(lost))

    def held_out(self, data: "StreamDataset") -> Read:
        """Return all that is held out and can be read."""
        if self.unseen_rows is None:
            kept = self.read(data, data.unseen, range(len(data.unseen)))
            if kept.unreadable:
                require_readable(data, data.unseen, len(kept.unreadable), LEAST)
                print(unreadable_line(data.unseen, kept.unreadable, "evaluations do without them"), flush=True)
            self.unseen_rows, self.pool = kept, kept.stored
        return self.unseen_rows

    def real(self, data: "StreamDataset", count: int) -> Tensor:
        """Return all held-out rows, then the same training ones each time until there are `count`, or all."""
        kept = self.held_out(data)
        lacking = max(0, min(count - len(kept.stored), len(data.train)))
        if lacking > self.lent:
            rows = np.random.RandomState(0).permutation(len(data.train))[:lacking].tolist()
            self.pool, self.lent = torch.cat([kept.stored, self.read(data, data.train, rows).stored]), lacking
            self.unseen_rows = kept._replace(stored=self.pool[: len(kept.stored)])  # the same memory
        return self.pool[: len(kept.stored) + lacking]

    def training(self, data: "StreamDataset", count: int) -> Read:
        """Return `count` training rows, the same ones each time."""
        if self.seen is None or self.seen[0] != count:
            rows = np.random.RandomState(1).permutation(len(data.train))[:count].tolist()
            self.seen = count, self.read(data, data.train, rows)
            require_readable(data, data.train, len(self.seen[1].unreadable), len(data.train) - len(rows) + 1)
        return self.seen[1]


class StreamDataset(FlowDataset):
    """Rows of a reader, each once an epoch in an order that is a function of (seed, epoch), every rank its own share.

    What evaluations look at is kept in memory: the held-out part, and training rows that stand beside it in a noise floor.
    """

    def __init__(
        self,
        train: Reader,
        unseen: Reader,
        state_shape: Sequence[int],
        num_classes: int,
        value_range: Sequence[float] | None,
        described: Mapping[str, object] | None = None,
        condition_shape: Sequence[int] | None = None,
    ):
        """train, unseen: readers of both parts. described: see FlowDataset. UserError for fewer than 2 held out."""
        if len(unseen) < LEAST:
            raise UserError(
                f"{type(self).__name__} has {len(unseen)} held out to evaluate on, and the scores take {LEAST} or more; "
                "add to them, or hold out a larger share"
            )
        super().__init__(state_shape, len(train), num_classes, value_range, described, condition_shape)
        self.train, self.unseen = train, unseen
        self.device = torch.device("cpu")
        self.ahead: ReadAhead | None = None
        self.kept = KeptRows()
        self.unreadable: set[int] = set()

    @abstractmethod
    def states(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        """Return states (B, *state_shape) fp32 of what was stored (B, ...), on the device; `generator`: what is random."""

    def chosen(self, rows: Tensor, order: torch.Generator) -> Tensor:
        """Return the numbers by which the reader knows training rows (N,)."""
        return rows

    def numbers(self, rows: Sequence[int]) -> list[int]:
        """Return the numbers by which a reader knows rows as they are."""
        return list(rows)

    def augmented(self, x: Tensor, label: Tensor | None, generator: torch.Generator) -> Batch:
        """Return training states and labels with random changes; none unless a subclass has some."""
        return x, label

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        return self

    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield each training row once, or epoch_size of them where that is less."""
        if self.ahead is None:
            self.ahead = ReadAhead(self.train, self.num_workers, self.device.type == "cuda")
        seed = int(torch.randint(2**62, (), generator=plan.order))
        shuffled = self.chosen(torch.randperm(len(self.train), generator=plan.order)[: self.epoch_size], plan.order)
        batches = shuffled.split(plan.batch_size)[plan.start :]
        rows = [Rows(batch[plan.rank :: plan.world].tolist(), seed) for batch in batches]
        known = len(self.unreadable)
        try:
            for read in uploaded(self.ahead.batches(rows), self.device):
                self.unreadable.update(read.unreadable)
                require_readable(self, self.train, len(self.unreadable))
                yield self.augmented(*self.batch_of(read.stored, read.labels, plan.generator), plan.generator)
        finally:
            if len(self.unreadable) > known:
                print(unreadable_line(self.train, self.unreadable, "others stand in for them"), flush=True)

    def batch_of(self, stored: Tensor, labels: Tensor | None, generator: torch.Generator) -> Batch:
        """Return what was stored as states, and its labels, on the device."""
        x = self.states(stored.to(self.device, non_blocking=True), generator)
        return x, None if labels is None else labels.to(self.device, non_blocking=True)

    def trial_rows(self, count: int, generator: torch.Generator) -> Batch:
        rows = Rows(self.numbers(range(min(count, self.epoch_size))), 0)
        read = self.train[rows].sound()  # by this process: workers take seconds
        return self.batch_of(read.stored, read.labels, generator)

    @property
    def held_out_size(self) -> float:
        return len(self.unseen)

    def held_out(self, count: int, generator: torch.Generator) -> Batch:
        """Return a random subset of the held-out part; all of it when `count` is larger."""
        kept = self.kept.held_out(self)
        index = torch.randperm(len(kept.stored), generator=generator, device=generator.device)[:count].cpu()
        return self.batch_of(kept.stored[index], None if kept.labels is None else kept.labels[index], generator)

    def training_part(self, count: int) -> Batch:
        """Read once and kept as stored."""
        part = self.kept.training(self, count)
        return self.batch_of(part.stored, part.labels, torch.Generator(self.device).manual_seed(0))

    def real_pair(self, first: int, second: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a random disjoint split of the held-out part and, where that is too small, of training rows beside it."""
        real = self.kept.real(self, first + second)
        first, second = pair_sizes(first, second, len(real))
        index = torch.randperm(len(real), generator=generator, device=generator.device).cpu()
        parts = index[:first], index[first:][:second]
        x, y = (self.states(real[part].to(self.device), generator) for part in parts)
        return x, y


def some_rows(count: int, most: int) -> np.ndarray:
    """Return `most` of `count` rows, ascending, or all: the same ones each time."""
    return np.sort(np.random.RandomState(0).permutation(count)[:most])


def unreadable_line(reader: Reader, rows: Collection[int], instead: str) -> str:
    """Return one line that counts and names rows which cannot be read. instead: what is done without them."""
    names = ", ".join(reader.name(row) for row in sorted(rows)[:NAMED]) + (", ..." if len(rows) > NAMED else "")
    return f"note: {len(rows):,} of {len(reader):,} {reader.describe()} cannot be read, {instead}: {names}"
