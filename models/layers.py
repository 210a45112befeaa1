"""Layers that several models share; each works under jvp, channels_last, autocast and torch.compile of the whole loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from models.inputs import split_label


class TimeFeatures(nn.Module):
    """Fourier features of the two times: t, sin(w t), cos(w t) for each angular frequency w.

    (B, 2) -> (B, 2 (1 + 2 len(frequencies))), fp32. Frequencies above about 4 suit plain flow matching and make the
    forward-mode derivative of MeanFlow-type losses explode, so the loss chooses them.
    """

    frequencies: Tensor

    def __init__(self, frequencies: list[float]):
        super().__init__()
        self.register_buffer("frequencies", torch.tensor(frequencies, dtype=torch.float32), persistent=False)
        self.width = 2 * (1 + 2 * len(frequencies))

    def forward(self, times: Tensor) -> Tensor:
        times = times.to(torch.promote_types(times.dtype, torch.float32))
        angles = (times[..., None] * self.frequencies).flatten(1)
        return torch.cat([times, angles.sin(), angles.cos()], dim=1)


class ClassEmbedding(nn.Embedding):
    """One row per class and a last, null row for "no label"; label None reads the null row throughout."""

    def __init__(self, num_classes: int, width: int):
        super().__init__(num_classes + 1, width)

    def rows(self, label: Tensor | None, batch: int) -> Tensor:
        """Return (batch, width) embeddings of `label` (batch,)."""
        if label is None:
            return self.weight[-1].expand(batch, -1)
        return self(label)


class ReplayedDropout(nn.Module):
    """Dropout whose masks one evaluation can leave to the next: keep() before it, replay() after it.

    It draws what torch's dropout of the same kind would. Random states of generators would do as well, but they break
    compiled graphs.
    """

    DRAWN_BY = {nn.Dropout: F.dropout, nn.Dropout1d: F.dropout1d, nn.Dropout2d: F.dropout2d, nn.Dropout3d: F.dropout3d}

    def __init__(self, replaced: nn.Module):
        super().__init__()
        self.p, self.draw = float(replaced.p), self.DRAWN_BY[type(replaced)]  # type: ignore[arg-type, index]
        self.left: list[Tensor] = []  # masks that the next evaluation uses
        self.kept: list[Tensor] | None = None  # masks of this evaluation, where they are kept

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = self.left.pop(0) if self.left else self.draw(torch.ones(x.shape, dtype=x.dtype, device=x.device), self.p)
        if self.kept is not None:
            self.kept.append(mask)
        return x * mask.to(x.dtype)

    def keep(self) -> list[Tensor] | None:
        """Keep the masks from here on; return those that an evaluation around this one has kept so far."""
        outer, self.kept = self.kept, []
        return outer

    def replay(self, outer: list[Tensor] | None) -> None:
        """Leave the masks kept since keep() to the next evaluation, which is within `outer`."""
        self.left, self.kept = self.kept or [], outer


def replace_dropout(network: nn.Module) -> None:
    """Put a ReplayedDropout in the place of each dropout layer inside the network."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) in ReplayedDropout.DRAWN_BY:
                setattr(module, name, ReplayedDropout(child))


FORWARD_MODE: list[bool] = []  # not empty within a derivative in forward mode


class Recomputed(nn.Module, ABC):
    """A block of a network, its `body`, that can compute its activations again in the backward pass instead of keeping them.

    The masks of dropout are kept, a byte a number, so that what is computed again is the same. In forward mode, whose
    backward pass cannot compute again, everything is kept.
    """

    recomputed = False

    @abstractmethod
    def body(self, *inputs: Tensor) -> Tensor:
        """Return the block's output."""

    def forward(self, *inputs: Tensor) -> Tensor:
        if not self.recomputed or FORWARD_MODE or not torch.is_grad_enabled():
            return self.body(*inputs)
        dropouts = [part for part in self.modules() if isinstance(part, ReplayedDropout) and part.training and part.p > 0]
        body = same_masks(self.body, dropouts) if dropouts else self.body
        return checkpoint(body, *inputs, use_reentrant=False, preserve_rng_state=False)


def same_masks(body: Callable[..., Tensor], dropouts: list[ReplayedDropout]) -> Callable[..., Tensor]:
    """Return body, each call of which but the first uses the first one's masks, and leaves no trace in the dropouts."""
    masks: list[list[Tensor]] = []

    def first(*inputs: Tensor) -> Tensor:
        outer = [part.keep() for part in dropouts]
        out = body(*inputs)
        for part, wanted in zip(dropouts, outer, strict=True):
            own, part.kept = part.kept or [], wanted
            masks.append([mask > 0 for mask in own])
            if wanted is not None:
                wanted.extend(own)
        return out

    def again(*inputs: Tensor) -> Tensor:
        before = [(part.left, part.kept) for part in dropouts]
        for part, own in zip(dropouts, masks, strict=True):
            part.left, part.kept = [mask.float().div(1 - part.p) for mask in own], None
        out = body(*inputs)
        for part, (left, kept) in zip(dropouts, before, strict=True):
            part.left, part.kept = left, kept
        return out

    return lambda *inputs: again(*inputs) if masks else first(*inputs)


@contextmanager
def in_forward_mode() -> Iterator[None]:
    """Surround a derivative in forward mode."""
    FORWARD_MODE.append(True)
    try:
        yield
    finally:
        FORWARD_MODE.pop()


class ForwardAttention(torch.autograd.Function):
    """Attention in forward mode: its value by a fused kernel, which has no forward derivative, and that by hand.

    Of y = P v, P = softmax(S), S = q k' / sqrt(d): dy = (P * dS) v - rowsum(P * dS) y + P dv. q, k, v (B, heads, N, d).
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
            output = F.scaled_dot_product_attention(*inputs)
        return torch.autograd.grad(output, inputs, gradient)

    @staticmethod
    def jvp(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        q, k, v, y = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        p = (scale * q @ k.mT).softmax(-1)
        weighed = p * (scale * (dq @ k.mT + q @ dk.mT))
        return weighed @ v - weighed.sum(-1, keepdim=True) * y + p @ dv


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k' / sqrt(d)) v of q, k, v (B, heads, N, d), by a form that has the derivatives asked for."""
    if FORWARD_MODE and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return ForwardAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def recompute_blocks(network: nn.Module) -> None:
    """Let each block of the network compute its activations again. UserError for a network that has no such blocks."""
    blocks = [part for part in network.modules() if isinstance(part, Recomputed)]
    if not blocks:
        raise UserError(
            "checkpoint_activations=true computes the blocks of a U-Net or a transformer again, and "
            f"{type(network).__name__} has none; leave it out"
        )
    for block in blocks:
        block.recomputed = True


class GroupNorm(nn.Module):
    """Group normalisation written as a layer norm over each flattened group, with explicit scale and shift.

    The form that survives forward-mode derivatives under channels_last, autocast and compilation alike (torch's affine
    group norm does not). x (B, C, ...) -> same shape.
    """

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = (1, -1, *(1,) * (x.ndim - 2))
        return group_norm(x, self.groups) * self.weight.view(wide) + self.bias.view(wide)


def group_norm(x: Tensor, groups: int) -> Tensor:
    """Return x (B, C, ...) with each of its groups of channels at mean 0 and variance 1, row by row, in the layout of x."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return group_norm_channels_last(x, groups)
    grouped = x.reshape(x.shape[0], groups, -1)
    return F.layer_norm(grouped, grouped.shape[-1:]).reshape(x.shape)


def group_norm_channels_last(x: Tensor, groups: int) -> Tensor:
    """Do the same by moments over strided dimensions, as a layer norm would copy x there and its result back."""
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0, keepdim=True)
    scale = (variance + 1e-5).rsqrt()
    return torch.addcmul(-mean * scale, grouped, scale).flatten(1, 2)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


class Conditioning(nn.Module):
    """What modulates a network's blocks: SiLU of an embedding of both times plus, if conditional, one of the class.

    times (B, 2), label (B,) or None -> (B, width). In fp32 whatever the autocast: bf16 would not tell close times apart.
    augment_dim: parameters of an augmentation that a label (B, 1 + augment_dim) carries; a label without is as all zero.
    """

    def __init__(self, num_classes: int, width: int, frequencies: list[float], augment_dim: int = 0):
        super().__init__()
        self.features = TimeFeatures(frequencies)
        self.time = nn.Sequential(nn.Linear(self.features.width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = ClassEmbedding(num_classes, width) if num_classes else None
        self.augmentation = nn.Linear(augment_dim, width, bias=False) if augment_dim else None

    def forward(self, times: Tensor, label: Tensor | None = None) -> Tensor:
        device = "cpu" if times.is_meta else times.device.type  # meta has no autocast to switch off
        with torch.autocast(device, enabled=False):
            embedding = self.time(self.features(times))
            classes, parameters = split_label(label)
            if self.label is not None:
                embedding = embedding + self.label.rows(classes, len(times))
            if self.augmentation is not None and parameters is not None:
                embedding = embedding + self.augmentation(parameters)
            return F.silu(embedding)


def zero_(*layers: nn.Linear | nn.Conv2d) -> None:
    """Start these layers at zero: a residual branch as nothing, an output as the mean velocity."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2) over the last dimension, times a learned scale; computed in fp32, returned in x's precision."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight).type_as(x)


def layer_norm(x: Tensor) -> Tensor:
    """Return x with its last dimension at mean 0 and variance 1; the scale and shift are the caller's."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
