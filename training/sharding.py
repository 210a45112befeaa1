"""Weights, their average and what the optimizer remembers, shared out over the ranks (sharding=full, torch's FSDP2).

Each rank keeps its rows of every tensor. The weights of a block, and of what embeds the times, are gathered for its forward
and its backward pass, and those of the rest of the network for as long as a pass goes on. Saves hold whole tensors, as those
of one device do.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from common.distributed import rank, world
from models.layers import Conditioning, Recomputed

if TYPE_CHECKING:  # they take half a second to import, which only runs with sharding=full spend
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(network: nn.Module) -> None:
    """Share out the weights of a network: each block and embedding by itself, then what is left. All ranks call this."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(network.parameters()).device.type, (world(),))
    for part in [part for part in network.modules() if isinstance(part, Recomputed | Conditioning)]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> "TypeGuard[FSDPModule]":
    fsdp = sys.modules.get("torch.distributed.fsdp")  # before its import there is none
    return fsdp is not None and isinstance(network, fsdp.FSDPModule)


def is_shared(value: Any) -> "TypeGuard[DTensor]":
    """Return whether this is a tensor of which each rank keeps its rows."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Have the whole weights of a network on every rank in the block, in which ranks may call it without each other, for no
    gradients. All ranks enter it; one that is not shared out is as it was.
    """
    parts = [part for part in network.modules() if is_sharded(part)]
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
        if not is_shared(value):
            return value
        full = value.full_tensor()
        return full.cpu() if rank() == 0 else None

    return tree_map(gather, state)


def shared_like(weight: Tensor, value: Any) -> Any:
    """Return this rank's part of a whole tensor, shared out as a weight of the same shape is; another value as it is."""
    if not is_shared(weight) or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return of each tensor what this rank keeps."""
    return [tensor.to_local() if is_shared(tensor) else tensor for tensor in tensors]


def plain(number: Tensor) -> Tensor:
    """Return a scalar that was computed of shared tensors, the same on every rank."""
    return number.full_tensor() if is_shared(number) else number


@contextmanager
def gradients_shared(network: nn.Module, now: bool) -> Iterator[None]:
    """Have backward passes in the block average gradients over the ranks only if `now`."""
    assert is_sharded(network)
    network.set_requires_gradient_sync(now)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)
