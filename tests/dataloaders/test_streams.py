"""Data that streams from disk: what is read, in which order, by whom, and what becomes of files that cannot be read."""

import contextlib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.seeds import generator_for
from dataloaders.base_dataloaders import EpochPlan, FlowDataset
from dataloaders.stream import Read, ReadAhead, Reader, Rows, StreamDataset
from tests.dataloaders.streamed import Official


class Counting(Reader):
    """Row k is the number k, and the epoch's seed."""

    def __init__(self, count: int, first: int = 0):
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Rows) -> Read:
        stored = torch.tensor([[self.first + number, rows.seed % 1000] for number in rows.numbers]).reshape(-1, 2)
        return Read(stored, stored[:, 0] % 3, [])


class Numbers(StreamDataset):
    """The smallest data set that streams."""

    def __init__(self, count: int, held_out: int = 10):
        super().__init__(Counting(count), Counting(held_out, 1000), [2], 3, None)

    def states(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        return stored.float()


def served(
    dataset: FlowDataset, batch_size: int, start: int = 0, rank: int = 0, world: int = 1, epoch: int = 0
) -> list[list[int]]:
    """The rows of each batch of an epoch."""
    batches = dataset.epoch(EpochPlan(batch_size, generator_for(0, "order", epoch), torch.Generator(), start, rank, world))
    return [x[:, 0].int().tolist() for x, _ in batches]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 20), st.integers(1, 4), st.integers(0, 20), st.integers(1, 4), st.integers(0, 3),
    st.none() | st.integers(1, 70),
)  # fmt: skip
def test_no_row_is_repeated_or_skipped_over_ranks_and_a_resume(
    count: int, batch: int, world: int, stop: int, world_after: int, epoch: int, limit: int | None
) -> None:
    """Batches up to `stop` on so many ranks, the rest on other ones: together each row once, as in one sitting."""
    dataset = Numbers(count)
    dataset.epoch_size = min(count, limit or count)
    whole = served(dataset, batch, epoch=epoch)
    visited = list(chain(*whole))
    assert len(visited) == len(set(visited)) == dataset.epoch_size
    assert len(whole) == dataset.batches_per_epoch(batch)
    before = [served(dataset, batch, 0, rank, world, epoch)[:stop] for rank in range(world)]
    after = [served(dataset, batch, min(stop, len(whole)), rank, world_after, epoch) for rank in range(world_after)]
    for parts, batches in ((before, whole[:stop]), (after, whole[stop:])):
        for number, rows in enumerate(batches):
            assert sorted(chain(*(rank[number] for rank in parts))) == sorted(rows)


def test_epochs_have_different_orders_that_depend_on_the_seed_alone() -> None:
    dataset = Numbers(50)
    first, again, other = (list(chain(*served(dataset, 7, epoch=epoch))) for epoch in (0, 0, 1))
    assert first == again and first != other and sorted(first) == sorted(other)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_serve_what_no_workers_serve_and_a_begun_epoch_can_be_left(workers: int) -> None:
    alone, helped = Numbers(64), Numbers(64)
    helped.num_workers = workers
    global_state = torch.get_rng_state()
    left = helped.epoch(EpochPlan(4, generator_for(0, "order", 5), torch.Generator()))
    next(left), next(left)  # and no more of it
    for epoch in (0, 1):
        assert served(helped, 4, epoch=epoch) == served(alone, 4, epoch=epoch)
        assert served(helped, 4, start=3, rank=1, world=2) == served(alone, 4, start=3, rank=1, world=2)
    assert torch.equal(torch.get_rng_state(), global_state)  # dropout of a resumed run draws from it
    with pytest.raises(AssertionError, match="newer plan"):
        next(left)


def test_more_workers_than_cores_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    ReadAhead(Counting(10), 500)
    assert not recwarn.list


def test_readers_hold_nothing_that_grows_with_use() -> None:
    ahead = ReadAhead(Counting(10), 0)
    assert [read.stored[:, 0].tolist() for read in ahead.batches([Rows([1, 2], 0), Rows([3], 0)])] == [[1, 2], [3]]


@pytest.mark.parametrize("count, held_out, asked, sides", [
    (40, 10, (5, 4), (5, 4)), (40, 10, (20, 10), (20, 10)), (40, 10, (2000, 10), (40, 10)), (10, 3, (2000, 3), (10, 3)),
    (2, 2, (2000, 2), (2, 2)), (2, 2, (2, 2000), (2, 2)), (3, 4, (2000, 2000), (4, 3)),
])  # fmt: skip
def test_few_held_out_rows_are_one_side_of_a_floor_and_training_rows_the_other(
    count: int, held_out: int, asked: tuple[int, int], sides: tuple[int, int]
) -> None:
    dataset = Numbers(count, held_out)
    for _ in range(2):
        pair = dataset.real_pair(*asked, torch.Generator().manual_seed(0))
        assert tuple(map(len, pair)) == sides and len(torch.cat(pair)[:, 0].unique()) == sum(sides)
    assert sorted(dataset.held_out(100, torch.Generator())[0][:, 0].tolist()) == list(range(1000, 1000 + held_out))
    if sum(sides) <= held_out:
        assert min(torch.cat(pair)[:, 0]) >= 1000  # no training row where there is no need


@pytest.mark.slow
@pytest.mark.process
def test_a_run_on_streamed_pictures_resumes_in_the_middle_of_an_epoch(
    official: Official, small_run: Any, tmp_path: Path
) -> None:
    """With workers, random cuts and mirroring: the weights of a run stopped and resumed are those of one sitting."""
    settings = official("image_folder")
    words = ["dataloaders=image_folder", "model=cnn", "model.dropout=0.1", "dataloaders.crop=random", "batch_size=32"]
    words += ["model.width=8", "model.inner_width=8", "model.inner_blocks=1", "model.embedding=8"]
    words += [f"dataloaders.{key}={value}" for key, value in settings.items()]
    words += ["dataloaders.epoch_size=null", "num_workers=2", "epochs=3", "schedule=constant"]
    small_run("x", *words, "max_steps=11", output="whole")
    with contextlib.suppress(SystemExit):
        small_run("x", *words, "max_steps=4", output="parts")
    small_run("x", "resume=true", "max_steps=11", "num_workers=1", output="parts")
    saves = (tmp_path / place / "ckpts/cnn/x_last.pt" for place in ("whole", "parts"))
    saved = [torch.load(save, weights_only=True)["network"] for save in saves]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
