"""How torch's threads are used on the CPU: many small operations run faster side by side than each split over the cores."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run each operation on one thread (on two cores that others use too, small ones are then 15 times as fast)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield work(item) of each in order, by as many threads as torch uses."""
    threads = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, items)


def parallel_sum(work: Callable[[Sequence[int]], float], items: Sequence[int]) -> float:
    """Return the sum of work(share) over shares of `items`, dealt out in turn to as many threads as torch uses."""
    workers = min(torch.get_num_threads(), len(items))
    return sum(side_by_side(work, [items[worker::workers] for worker in range(workers)]))
