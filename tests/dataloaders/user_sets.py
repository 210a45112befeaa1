"""What a user might write in a module of their own: torch data sets that a run names by dataloaders.dataset._target_."""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset


class Points(Dataset[tuple[Tensor, int]]):
    """Points in three classes, each moved a little every time it is read, by all three default generators."""

    def __init__(self, count: int = 400, moved: float = 0.0, first: int = 0):
        self.count, self.moved, self.first = count, moved, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        fixed = torch.randn(2, generator=torch.Generator().manual_seed(self.first + number))
        return fixed + self.moved * (torch.randn(2) + random.random() + np.random.rand()), number % 3


class Noise(Points):
    """Nothing but what is drawn."""

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return torch.randn(2), number % 3


class Given(Dataset[object]):
    """Items as they are given."""

    def __init__(self, items: list[object]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> object:
        return self.items[number]


class Stream(IterableDataset[Tensor]):
    """No item has a number."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.zeros(2)] * 10)


class Lengthless(Dataset[Tensor]):
    """Nobody knows how many items there are."""

    def __getitem__(self, number: int) -> Tensor:
        return torch.zeros(2)


class Itemless(Dataset[Tensor]):
    """There are ten, and none can be read."""

    def __len__(self) -> int:
        return 10


class Missing(Points):
    """Its files are gone: at once, or where an item is read."""

    def __init__(self, at_once: bool = False):
        super().__init__()
        if at_once:
            raise FileNotFoundError("no such file: points.bin")

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        if number == 7:
            raise FileNotFoundError("no such file: 7.bin")
        return super().__getitem__(number)
