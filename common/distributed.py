"""Collectives over the processes of a run; with one process each answers at once."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError

AGENT = "DENOISING_ZOO_AGENT"  # the launcher's process, which watches them
DIED = "another process of the run has died"
PARENT = os.getppid()

T = TypeVar("T")

meeting: dist.Store | None = None  # where ranks leave words that outlive them
own_share: int | None = None  # rows of this rank's share, while all draw a batch of training together


class LostRankError(UserError):
    """Another process of the run has died."""


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return how many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def explained_lost_ranks() -> Iterator[None]:
    """Raise LostRankError for a broken connection in the block, with the word that the other rank left if it could."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "NCCL" not in str(error):
            raise
        why = DIED
        with suppress(dist.DistError):
            if meeting is not None and meeting.check(["why"]):
                why = meeting.get("why").decode()
        raise LostRankError(why) from error


def barrier() -> None:
    """Wait until every rank has come here."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1))


@contextmanager
def rank0_first(alone: bool) -> Iterator[None]:
    """Carry out the block on rank 0 before the others begin it, if `alone`."""
    if alone and rank():
        barrier()
    try:
        yield
    finally:
        if alone and rank() == 0:
            barrier()


def broadcast_from_rank0(value: T) -> T:
    """Return rank 0's value on every rank."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def first_non_none(own: T | None) -> T | None:
    """Return the value of the lowest rank that has one, on every rank; None where none has. No device waits."""
    if world() == 1 or not any_rank(own is not None):
        return own
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, own)
    return next(value for value in values if value is not None)


def any_rank(flag: bool) -> bool:
    """Return whether `flag` holds on any rank. Between the CPUs: no device waits."""
    if world() == 1:
        return flag
    some = torch.tensor([float(flag)])
    dist.all_reduce(some)
    return bool(some)


class Ballot:
    """Whether any rank says so, asked once a step and answered at the next: meanwhile no rank waits for another."""

    def __init__(self) -> None:
        self.open: tuple[Tensor, dist.Work] | None = None

    def cast(self, flag: bool) -> bool:
        """Return whether any rank said so at the call before; with one process, whether it says so now."""
        if world() == 1:
            return flag
        some = self.close()
        votes = torch.tensor([float(flag)])
        work = dist.all_reduce(votes, async_op=True)
        assert work is not None
        self.open = votes, work
        return some

    def close(self) -> bool:
        """Return whether any rank said so at the last call that was not answered."""
        if self.open is None:
            return False
        (votes, work), self.open = self.open, None
        work.wait()
        return bool(votes)


def all_reduce_mean(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return means over the ranks of scalars of the same names."""
    if world() == 1 or not values:
        return dict(values)
    mean = torch.stack(list(values.values()))
    dist.all_reduce(mean)
    return dict(zip(values, mean / world(), strict=True))


def all_reduce_max(value: Tensor) -> Tensor:
    """Return the largest over the ranks, number by number. On the device of `value`: on CUDA no host waits."""
    if world() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def concatenated(parts: Sequence[T], work: Callable[[T], Tensor], together: bool) -> Tensor:
    """Return what `work` gives for the parts, one after another. together: every rank calls this and does some of them, and
    what comes of all is on the CPU.

    Rank 0 does the last part, so that what counts calls has counted what it would have counted alone.
    """
    if not together or world() == 1:
        return torch.cat([work(part) for part in parts])
    last = len(parts) - 1
    own = {k: work(parts[k]).cpu() for k in range((last - rank()) % world(), len(parts), world())}
    done: list[dict[int, Tensor]] = [{}] * world()
    dist.all_gather_object(done, own)
    everything = {k: values for some in done for k, values in some.items()}
    return torch.cat([everything[k] for k in range(len(parts))])


@contextmanager
def all_draw(rows: int) -> Iterator[None]:
    """Say of the block that every rank draws its share of one batch there, this one `rows` rows of data: only in it may what
    draws wait for the other ranks, since evaluations draw on some ranks more often than on others.
    """
    global own_share
    own_share = rows
    try:
        yield
    finally:
        own_share = None


def shares_of(own: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks (B_k, ...), which differ in their numbers of rows alone."""
    sizes = torch.zeros(world(), dtype=torch.int64)
    sizes[rank()] = len(own)
    dist.all_reduce(sizes)
    padded = own.new_zeros(int(sizes.max()), *own.shape[1:])
    padded[: len(own)] = own
    shares = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(shares, padded)
    return [share[:size] for share, size in zip(shares, sizes.tolist(), strict=True)]


def orphaned() -> bool:
    """Return whether the agent that started this process, and watched it, is gone."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != int(os.environ.get(AGENT, PARENT))
