"""Names data by their content: what was computed of other data in the same place is never taken for theirs."""

import hashlib
from collections.abc import Iterator
from functools import singledispatch
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from common.seeds import generator_for
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.encoded import EncodedImages
from dataloaders.stream import StreamDataset
from dataloaders.tensor_dataset import TensorDataset

DRAWS = 1000  # states that stand for data drawn afresh
BORROWED = 256  # training rows that stand for all of a set read from disk
KNOWN: WeakKeyDictionary[FlowDataset, str] = WeakKeyDictionary()  # each set is read once


def data_hash(dataset: FlowDataset, device: torch.device) -> str:
    """Return a hash of all that scores compare samples of this set with; device: the dataset's."""
    if dataset not in KNOWN:
        digest = hashlib.blake2b(digest_size=8)
        for tensor in contents(dataset, device):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        KNOWN[dataset] = digest.hexdigest()
    return KNOWN[dataset]


@singledispatch
def contents(dataset: FlowDataset, device: torch.device) -> Iterator[Tensor]:
    """Yield the tensors that a set is known by: of data drawn afresh, some states from a seed of their own."""
    yield dataset.held_out(DRAWS, generator_for(0, "contents", 0, device))[0]


@contents.register
def of_tensor(dataset: TensorDataset, device: torch.device) -> Iterator[Tensor]:
    yield from (part for part in (dataset.states, dataset.labels) if part is not None)


@contents.register
def of_stream(dataset: StreamDataset, device: torch.device) -> Iterator[Tensor]:
    """Yield the held-out part, which evaluations keep in memory, and some training rows: small sets' floors borrow those."""
    some = np.random.RandomState(0).permutation(len(dataset.train))[:BORROWED].tolist()
    for read in (dataset.kept.held_out(dataset), dataset.kept.read(dataset, dataset.train, some)):
        yield from (part for part in (read.stored, read.labels) if part is not None)


@contents.register
def of_encoded(dataset: EncodedImages, device: torch.device) -> Iterator[Tensor]:
    yield from contents(dataset.images, device)
    yield from dataset.vae.state_dict().values()
