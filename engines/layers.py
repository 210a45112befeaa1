"""Torch's modules computed in MLX: what they are made of is read off them, their weights lie elsewhere under torch's names.

States and pictures have their channels last, (B, H, W, C); kernels are (O, H, W, I).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Arrays = dict[str, mx.array]
# Where a kernel's dimensions in MLX come from in torch.
ORDERS: dict[type[nn.Module], tuple[int, ...]] = {nn.Conv2d: (0, 2, 3, 1), nn.ConvTranspose2d: (1, 2, 3, 0)}


class Layout:
    """Carries tensors that are named as a network's weights between torch's layout and MLX's."""

    def __init__(self, network: nn.Module):
        parts = network.named_modules()
        self.orders = {f"{name}.weight": ORDERS[type(part)] for name, part in parts if type(part) in ORDERS}

    def to_mlx(self, tensors: Mapping[str, Tensor]) -> Arrays:
        """Return copies in MLX's layout."""
        moved = {name: t.permute(self.orders[name]) if name in self.orders else t for name, t in tensors.items()}
        return {name: mx.array(tensor.detach().contiguous().numpy()) for name, tensor in moved.items()}

    def to_torch(self, arrays: Arrays) -> dict[str, Tensor]:
        """Return copies in torch's layout."""
        moved = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return {name: t.permute(inverse(self.orders[name])) if name in self.orders else t for name, t in moved.items()}


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(place) for place in range(len(order)))


def states_to_mlx(tensor: Tensor) -> mx.array:
    """Return rows of any kind; pictures (B, C, H, W) with their channels last."""
    tensor = tensor.detach()
    return mx.array((tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).contiguous().numpy())


def states_to_torch(array: mx.array) -> Tensor:
    """Undo states_to_mlx."""
    tensor = torch.from_numpy(np.array(array.astype(mx.float32)))
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


@dataclass(frozen=True)
class Pass:
    """One evaluation of a network. weights: and buffers, by name; dtype: of products and convolutions.

    changed: buffers after the evaluation, where it changes them, as a batch norm in training does.
    """

    weights: Arrays
    dtype: mx.Dtype = mx.float32
    training: bool = False
    changed: Arrays = field(default_factory=dict)


class Part:
    """A module in a pass. Its submodules are parts, its parameters and buffers arrays, its other attributes its own."""

    def __init__(self, module: nn.Module, now: Pass, name: str = ""):
        self.module, self.now, self.name = module, now, name

    def __getattr__(self, name: str) -> Any:
        own = getattr(self.module, name)
        if isinstance(own, nn.Module):
            return Part(own, self.now, f"{self.name}{name}.")
        return self.now.weights[f"{self.name}{name}"] if isinstance(own, Tensor) else own

    def __iter__(self) -> Iterator[Part]:
        return (getattr(self, name) for name, _ in self.module.named_children())

    def __call__(self, *inputs: Any) -> mx.array:
        return FORWARDS[type(self.module)](self, *inputs)

    def cast(self, x: mx.array) -> mx.array:
        """Return x in the precision of products and convolutions."""
        return x.astype(self.now.dtype)

    def in_fp32(self) -> Part:
        """Return the same part, in fp32 whatever the precision."""
        return Part(self.module, replace(self.now, dtype=mx.float32), self.name)


def linear(m: Part, x: mx.array) -> mx.array:
    y = m.cast(x) @ m.cast(m.weight).T
    return y if m.bias is None else y + m.cast(m.bias)


def convolution(m: Part, x: mx.array) -> mx.array:
    y = mx.conv2d(m.cast(x), m.cast(m.weight), m.stride, m.padding)
    return y if m.bias is None else y + m.cast(m.bias)


def transposed_convolution(m: Part, x: mx.array) -> mx.array:
    return mx.conv_transpose2d(m.cast(x), m.cast(m.weight), m.stride, m.padding) + m.cast(m.bias)


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def gelu(m: Part, x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def sequential(m: Part, x: mx.array) -> mx.array:
    for part in m:
        x = part(x)
    return x


def layer_norm(x: mx.array, eps: float = 1e-6) -> mx.array:
    """Return x in fp32, its last dimension at mean 0 and variance 1."""
    wide = x.astype(mx.float32)
    return (wide - wide.mean(-1, keepdims=True)) * mx.rsqrt(wide.var(-1, keepdims=True) + eps)


def rms_norm(m: Part, x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    return (wide * mx.rsqrt(wide.square().mean(-1, keepdims=True) + 1e-6) * m.weight).astype(x.dtype)


def normalised_groups(x: mx.array, groups: int) -> mx.array:
    """Return x (B, H, W, C) in fp32, each group of its channels at mean 0 and variance 1, row by row."""
    wide = x.astype(mx.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, variance = wide.mean((1, 3), keepdims=True), wide.var((1, 3), keepdims=True)
    return ((wide - mean) * mx.rsqrt(variance + 1e-5)).reshape(x.shape)


def group_norm(m: Part, x: mx.array) -> mx.array:
    return normalised_groups(x, m.groups) * m.weight + m.bias


def batch_norm(m: Part, x: mx.array) -> mx.array:
    """In training by the moments of the batch, which enter the running ones; else by those."""
    wide, mean, variance = x.astype(mx.float32), m.running_mean, m.running_var
    if m.now.training:
        mean, variance = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
        count = x.size // x.shape[-1]
        seen = {"running_mean": mean, "running_var": variance * (count / (count - 1))}
        for name, value in seen.items():
            m.now.changed[m.name + name] = (1 - m.momentum) * getattr(m, name) + m.momentum * mx.stop_gradient(value)
        m.now.changed[f"{m.name}num_batches_tracked"] = m.num_batches_tracked + 1
    return ((wide - mean) * mx.rsqrt(variance + m.eps) * m.weight + m.bias).astype(x.dtype)


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Return softmax(q k' / sqrt(d)) v of q, k, v (B, heads, N, d), in the form that has every derivative."""
    return mx.softmax((q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2), axis=-1, precise=True) @ v


def heads(projected: mx.array, count: int) -> mx.array:
    """Return queries, keys and values (3, B, heads, N, d), which lie beside each other in (B, N, 3 D)."""
    rows, tokens, _ = projected.shape
    return projected.reshape(rows, tokens, 3, count, -1).transpose(2, 0, 3, 1, 4)


def joined(x: mx.array) -> mx.array:
    """Return heads (B, heads, N, d) as tokens (B, N, D)."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def self_attention(m: Part, x: mx.array) -> mx.array:
    projected = m.cast(x) @ m.cast(m.in_proj_weight).T + m.cast(m.in_proj_bias)
    return m.out_proj(joined(attention(*heads(projected, m.num_heads))))


def encoder_layer(m: Part, x: mx.array) -> mx.array:
    """With norm_first and GELU, as the project has it."""
    x = x + m.self_attn(m.norm1(x))
    h = m.linear1(m.norm2(x))
    return x + m.linear2(0.5 * h * (1 + mx.erf(h * 0.5**0.5)))


def squares(m: Part, x: mx.array) -> mx.array:
    """Return pictures (B, H, W, C) as squares that do not overlap, (B, rows, side, columns, side, C); without what is left
    at the far edges.
    """
    rows, high, across, channels = x.shape
    side = m.kernel_size
    high, across = high // side, across // side
    return x[:, : high * side, : across * side].reshape(rows, high, side, across, side, channels)


def identity(m: Part, x: mx.array) -> mx.array:
    return x


FORWARDS: dict[type[nn.Module], Callable[..., mx.array]] = {
    nn.Linear: linear,
    nn.Conv2d: convolution,
    nn.ConvTranspose2d: transposed_convolution,
    nn.SiLU: lambda m, x: silu(x),
    nn.ReLU: lambda m, x: mx.maximum(x, 0),
    nn.GELU: gelu,
    nn.Identity: identity,
    nn.Dropout: identity,  # of share 0: others are refused
    nn.Sequential: sequential,
    nn.BatchNorm2d: batch_norm,
    nn.MaxPool2d: lambda m, x: squares(m, x).max((2, 4)),
    nn.AvgPool2d: lambda m, x: squares(m, x).mean((2, 4)),
    nn.Tanh: lambda m, x: mx.tanh(x),
    nn.Flatten: lambda m, x: x.transpose(0, 3, 1, 2).reshape(len(x), -1),  # in torch's order
    nn.LayerNorm: lambda m, x: layer_norm(x, m.eps) * m.weight + m.bias,
    nn.MultiheadAttention: self_attention,
    NonDynamicallyQuantizableLinear: linear,  # of an attention
    nn.TransformerEncoderLayer: encoder_layer,
}  # networks.py adds the project's own modules
