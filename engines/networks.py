"""The project's networks in MLX, each forward pass beside the one in models/ that it is: states (B, D) or (B, H, W, C)."""

import mlx.core as mx
from torch import nn

from common.errors import UserError
from engines.layers import (
    FORWARDS,
    Part,
    attention,
    group_norm,
    heads,
    identity,
    joined,
    layer_norm,
    normalised_groups,
    rms_norm,
    silu,
)
from models.classifier.lenet import LeNet
from models.classifier.residual_classifier import BasicBlock, Bottleneck, PreactivatedBlock, ResidualClassifier
from models.classifier.resnet9 import Residual, ResNet9
from models.classifier.vision_transformer import VisionTransformer
from models.dit import dit
from models.flow_matching import small_cnn
from models.flow_matching.mlp import MLP
from models.layers import ClassEmbedding, Conditioning, GroupNorm, ReplayedDropout, RMSNorm, TimeFeatures
from models.unet import unet


def check_network(network: nn.Module) -> None:
    """Raise UserError for a network with a part that is not written in MLX, or with dropout."""
    for part in network.modules():
        if type(part) not in FORWARDS and not isinstance(part, nn.ModuleList):
            raise UserError(f"engine=mlx does not have {type(part).__name__}, a part of this model; use engine=torch")
        if isinstance(part, nn.Dropout | ReplayedDropout) and part.p > 0:
            raise UserError("engine=mlx has no dropout, whose masks torch draws; use model.dropout=0, or engine=torch")


def time_features(m: Part, times: mx.array) -> mx.array:
    angles = (times[..., None] * m.frequencies).reshape(len(times), -1)
    return mx.concatenate([times, mx.sin(angles), mx.cos(angles)], axis=1)


def class_rows(m: Part, label: mx.array | None, rows: int) -> mx.array:
    """Return (rows, width) embeddings of labels (rows,), of None the null row's."""
    return mx.broadcast_to(m.weight[-1], (rows, m.weight.shape[1])) if label is None else m.weight[label]


def conditioning(m: Part, times: mx.array, label: mx.array | None) -> mx.array:
    m = m.in_fp32()
    embedding = m.time(m.features(times))
    joint = label is not None and label.ndim == 2  # a class, and beside it what an augmentation did
    if m.label is not None:
        classes = label[:, 0].astype(mx.int32) if joint and label is not None else label
        embedding = embedding + m.label(classes, len(times))
    if m.augmentation is not None and joint and label is not None:
        embedding = embedding + m.augmentation(label[:, 1:])
    return silu(embedding)


def mlp(m: Part, z: mx.array, times: mx.array, label: mx.array | None) -> mx.array:
    features = [z, m.time_features(times)]
    if m.class_embedding is not None:
        features.append(m.class_embedding(label, len(z)))
    return m.layers(mx.concatenate(features, axis=1))


def channels(vector: mx.array) -> mx.array:
    """Return (B, C) as (B, 1, 1, C), to act on pictures."""
    return vector[:, None, None]


def tiles(x: mx.array, p: int) -> mx.array:
    """Return pictures (B, H, W, C) as patches of p x p pixels (B, H/p, W/p, C p p), in torch's order."""
    rows, high, across, _ = x.shape
    return (
        x.reshape(rows, high // p, p, across // p, p, -1)
        .transpose(0, 1, 3, 5, 2, 4)
        .reshape(rows, high // p, across // p, -1)
    )


def untiled(x: mx.array, p: int) -> mx.array:
    """Undo `tiles`."""
    rows, high, across, _ = x.shape
    return x.reshape(rows, high, across, -1, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(rows, high * p, across * p, -1)


def cnn_block(m: Part, x: mx.array, embedding: mx.array) -> mx.array:
    scale, shift = mx.split(channels(m.modulation(embedding)), 2, axis=-1)
    h = m.conv1(silu(m.norm1(x)))
    return x + m.conv2(silu(m.norm2(h) * (1 + scale) + shift))


def cnn(m: Part, z: mx.array, times: mx.array, label: mx.array | None) -> mx.array:
    embedding = m.time_embedding(m.time_features(times))
    if m.class_embedding is not None:
        embedding = embedding + m.class_embedding(label, len(times))
    embedding = silu(embedding)
    constant = mx.broadcast_to(channels(times), (*z.shape[:3], 2))
    outer = m.outer_in(m.stem(mx.concatenate([z, constant], axis=-1)), embedding)
    h = m.down(outer)
    for block in m.inner:
        h = block(h, embedding)
    h = m.join(mx.concatenate([outer, m.up(h)], axis=-1))
    return m.head(m.outer_out(h, embedding))


def unet_attention(m: Part, x: mx.array) -> mx.array:
    q, k, v = heads(m.qkv(m.norm(x).reshape(x.shape[0], -1, x.shape[-1])), m.heads)
    return x + m.project(joined(attention(q, k, v))).reshape(x.shape)


def unet_block(m: Part, x: mx.array, embedding: mx.array) -> mx.array:
    scale, shift = mx.split(channels(m.modulation(embedding)), 2, axis=-1)
    h = normalised_groups(m.conv1(silu(m.norm(x))), scale.shape[-1] // unet.GROUP_CHANNELS)
    return m.attention(m.skip(x) + m.conv2(silu(h * (1 + scale) + shift)))


def unet_level(m: Part, x: mx.array, embedding: mx.array) -> mx.array:
    kept = [x]
    for block in m.down:
        kept.append(block(kept[-1], embedding))
    h = m.inner(kept[-1], embedding)
    for block in m.up:
        h = block(mx.concatenate([h, kept.pop()], axis=-1), embedding)
    return h


def unet_halved(m: Part, x: mx.array, embedding: mx.array) -> mx.array:
    h = m.level(m.shrink(x), embedding)
    return m.enlarge(mx.repeat(mx.repeat(h, 2, axis=1), 2, axis=2))


def unet_network(m: Part, z: mx.array, times: mx.array, label: mx.array | None) -> mx.array:
    h = m.pyramid(m.stem(tiles(z, m.patch_size)), m.conditioning(times, label))
    return untiled(m.head(silu(m.norm(h))), m.patch_size)


def dit_attention(m: Part, x: mx.array) -> mx.array:
    q, k, v = heads(m.qkv(x), m.heads)
    return m.project(joined(attention(m.query_norm(q), m.key_norm(k), v)))


def dit_block(m: Part, x: mx.array, embedding: mx.array) -> mx.array:
    scale1, shift1, gate1, scale2, shift2, gate2 = mx.split(m.modulation(embedding)[:, None], 6, axis=2)
    x = x + gate1 * m.attention(layer_norm(x) * (1 + scale1) + shift1)
    return x + gate2 * m.mlp(layer_norm(x) * (1 + scale2) + shift2)


def dit_network(m: Part, z: mx.array, times: mx.array, label: mx.array | None) -> mx.array:
    embedding, patches = m.conditioning(times, label), tiles(z, m.patch_size)
    x = m.stem(patches.reshape(len(z), -1, patches.shape[-1])) + m.positions
    for block in m.blocks:
        x = block(x, embedding)
    scale, shift = mx.split(m.modulation(embedding)[:, None], 2, axis=2)
    x = m.head(layer_norm(x) * (1 + scale) + shift)
    return untiled(x.reshape(patches.shape), m.patch_size)


def basic_block(m: Part, x: mx.array) -> mx.array:
    h = m.norm2(m.conv2(m.relu(m.norm1(m.conv1(x)))))
    return m.relu(h + m.skip(x))


def bottleneck(m: Part, x: mx.array) -> mx.array:
    return m.relu(m.inner(x) + m.skip(x))


def preactivated_block(m: Part, x: mx.array) -> mx.array:
    h = m.before(x)
    return m.inner(h) + (x if m.same else m.skip(h))


def residual_classifier(m: Part, images: mx.array) -> mx.array:
    return m.head(m.stages(m.stem(images)).mean((1, 2)))


def resnet9(m: Part, images: mx.array) -> mx.array:
    return m.head(m.layers(images).max((1, 2)) / 8)


def lenet(m: Part, images: mx.array) -> mx.array:
    return m.head(m.layers(images))


def vision_transformer(m: Part, images: mx.array) -> mx.array:
    patches = m.patches(images)
    tokens = patches.reshape(len(images), -1, patches.shape[-1])
    first = mx.broadcast_to(m.token, (len(tokens), *m.token.shape[1:])).astype(tokens.dtype)
    return m.head(m.blocks(mx.concatenate([first, tokens], axis=1) + m.position)[:, 0])


FORWARDS.update(
    {
        TimeFeatures: time_features,
        ClassEmbedding: class_rows,
        Conditioning: conditioning,
        GroupNorm: group_norm,
        RMSNorm: rms_norm,
        ReplayedDropout: identity,
        MLP: mlp,
        small_cnn.ResidualBlock: cnn_block,
        small_cnn.SmallCNN: cnn,
        unet.Attention: unet_attention,
        unet.ResidualBlock: unet_block,
        unet.Level: unet_level,
        unet.Halved: unet_halved,
        unet.UNet: unet_network,
        dit.Attention: dit_attention,
        dit.DiTBlock: dit_block,
        dit.DiT: dit_network,
        BasicBlock: basic_block,
        Bottleneck: bottleneck,
        PreactivatedBlock: preactivated_block,
        ResidualClassifier: residual_classifier,
        Residual: lambda m, x: x + m.inner(x),
        ResNet9: resnet9,
        LeNet: lenet,
        VisionTransformer: vision_transformer,
    }
)
