"""Weights, their average and what the optimizer remembers, shared out over the ranks (sharding=full, torch's FSDP2).

Each rank keeps its rows of every tensor. The weights of a block, and of what embeds the times, are gathered for its forward
and its backward pass, and those of the rest of the network for as long as a pass goes on. Saves hold whole tensors, as those
of one device do.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from common.distributed import rank, world
from models.layers import Conditioning, Recomputed


def shard(network: nn.Module) -> None:
    """Share out the weights of a network: each block and embedding by itself, then what is left. All ranks call this."""
    mesh = init_device_mesh(next(network.parameters()).device.type, (world(),))
    for part in [part for part in network.modules() if isinstance(part, Recomputed | Conditioning)]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Have the whole weights of a network on every rank in the block, in which ranks may call it without each other, for no
    gradients. All ranks enter it; one that is not shared out is as it was.
    """
    parts = [part for part in network.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def whole(state: Any) -> Any:
    """Return a nested state with every tensor that is shared out whole: on rank 0, on the CPU; elsewhere None stands for it.

    All ranks call this.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if rank() == 0 else None

    return tree_map(gather, state)


def shared_like(weight: Tensor, value: Any) -> Any:
    """Return this rank's part of a whole tensor, shared out as a weight of the same shape is; another value as it is."""
    if not isinstance(weight, DTensor) or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return of each tensor what this rank keeps."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def plain(number: Tensor) -> Tensor:
    """Return a scalar that was computed of shared tensors, the same on every rank."""
    return number.full_tensor() if isinstance(number, DTensor) else number


@contextmanager
def gradients_shared(network: nn.Module, now: bool) -> Iterator[None]:
    """Have backward passes in the block average gradients over the ranks only if `now`."""
    assert isinstance(network, FSDPModule)
    network.set_requires_gradient_sync(now)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)
