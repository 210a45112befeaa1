"""The layers that models share, and what is particular to the DiT and the UNet."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from configuration.build import build
from models.dit.dit import Attention as DiTAttention
from models.dit.dit import DiT, sincos_positions
from models.layers import (
    ClassEmbedding,
    Conditioning,
    GroupNorm,
    RMSNorm,
    TimeFeatures,
    attention,
    in_forward_mode,
    modulate,
)
from models.unet.unet import Attention, ResidualBlock
from tests.models.configured import all_in_double, fresh_model, model_node


@pytest.mark.parametrize("shape", [[1, 28, 28], [3, 8, 12], [4, 16, 16]])
def test_the_small_unet_takes_any_channels_and_sides_that_halve_evenly(shape: list[int]) -> None:
    model = build(model_node("unet_small", "digits", f"model.state_shape={shape}".replace(" ", "")))
    assert model(torch.randn(2, shape[0] + 2, *shape[1:])).shape == (2, *shape)


def small_dit(*overrides: str, name: str = "dit_s") -> DiT:
    torch.manual_seed(0)
    model: DiT = build(model_node(name, "digits", "model.hidden_size=48", "model.depth=2", *overrides))
    model.init_weights()
    return model


@pytest.mark.parametrize("shape, patch", [([3, 8, 12], 2), ([4, 16, 8], 4), ([1, 5, 7], 1)])
def test_dit_patches_tile_the_image_row_by_row(shape: list[int], patch: int) -> None:
    channels, height, width = shape
    model = small_dit(f"model.state_shape={shape}".replace(" ", ""), f"model.patch_size={patch}")
    image = torch.arange(2.0 * channels * height * width).view(2, *shape)
    patches = model.patches(image)
    assert torch.equal(model.image(patches), image)
    assert patches.shape == (2, height * width // patch**2, channels * patch**2)
    assert torch.equal(patches[1, width // patch + 1], image[1, :, patch : 2 * patch, patch : 2 * patch].flatten())


def test_dit_starts_at_velocity_zero_with_every_block_the_identity() -> None:
    model = small_dit()
    tokens, embedding = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert all(torch.equal(block(tokens, embedding), tokens) for block in model.blocks)
    assert not model(torch.randn(2, 3, 8, 8)).any()


def test_dit_positions_are_sines_and_cosines_of_row_and_column() -> None:
    positions = sincos_positions(3, 5, 8).view(3, 5, 2, 2, 2)  # axis, sine or cosine, frequency
    for row in range(3):
        for column in range(5):
            for axis, place in enumerate((row, column)):
                angles = torch.tensor([place, place / 100.0])
                assert torch.allclose(positions[row, column, axis], torch.stack([angles.sin(), angles.cos()]), atol=1e-6)
    assert "positions" not in small_dit().state_dict()


def test_dit_knows_where_a_patch_is() -> None:
    """The same pixels elsewhere are another token: without positions attention could not tell."""
    model, image = small_dit(), torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    here, there = model.patches(model(image))[0, [0, 9]]
    assert (here - there).abs().max() > 1e-3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys(qk_norm: bool) -> None:
    torch.manual_seed(0)
    attention, x = DiTAttention(32, 2, qk_norm), torch.randn(2, 6, 32)
    before = attention(x)
    with torch.no_grad():
        for values in (attention.qkv.weight, attention.qkv.bias):
            values[:64] *= 10
    assert torch.allclose(attention(x), before, atol=1e-3) == qk_norm


def test_qk_norm_has_a_forward_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    with all_in_double(monkeypatch), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        attention = DiTAttention(32, 2, qk_norm=True).double()
        x, v = torch.randn(2, 2, 6, 32, dtype=torch.float64)
        _, tangent = torch.func.jvp(attention, (x,), (v,))
        difference = (attention(x + 1e-5 * v) - attention(x - 1e-5 * v)) / 2e-5
    assert tangent.abs().max() > 1e-3 and torch.allclose(tangent, difference, rtol=1e-5, atol=1e-7)


def test_rms_norm_is_torchs_and_keeps_the_precision() -> None:
    ours, theirs = RMSNorm(16), nn.RMSNorm(16, eps=1e-6)
    with torch.no_grad():
        theirs.weight.uniform_(-1, 2)
    ours.load_state_dict(theirs.state_dict())
    x = 3 * torch.randn(2, 5, 16)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_conditioning_tells_close_times_apart_under_autocast() -> None:
    torch.manual_seed(0)
    conditioning = Conditioning(0, 32, [1.0, 4.0])
    times = torch.tensor([[0.5, 0.5], [0.5, 0.5005]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near, exact = conditioning(times), conditioning(times.clone())
    assert near.dtype == torch.float32 and torch.equal(near, exact) and not torch.equal(near[0], near[1])
    assert torch.equal(near, conditioning(times))


def test_a_fresh_unets_blocks_are_their_skips_and_its_velocity_is_zero() -> None:
    model, embedding = fresh_model("unet_small"), torch.randn(2, 128)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 3 + 1 + 6 and any(isinstance(block.attention, Attention) for block in blocks)
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 4, 4)
        assert torch.equal(block(x, embedding), block.skip(x))
    assert not model(torch.randn(2, 3, 8, 8)).any()


def test_modulate_scales_around_one_and_shifts() -> None:
    x, scale, shift = torch.randn(2, 3, 4), torch.randn(2, 3, 1), torch.randn(2, 3, 1)
    assert torch.equal(modulate(x, torch.zeros(1), torch.zeros(1)), x)
    assert torch.allclose(modulate(x, scale, shift), x * (1 + scale) + shift, atol=1e-6)


@pytest.mark.parametrize("name, shape, expected", [
    ("unet", [3, 32, 32], {16, 8, 4}),
    ("unet_small", [1, 28, 28], {7}),
    ("unet_small", [1, 8, 8], {4, 2}),
])  # fmt: skip
def test_the_unet_attends_on_its_coarse_levels(name: str, shape: list[int], expected: set[int]) -> None:
    with torch.device("meta"):
        model = build(model_node(name, "digits", f"model.state_shape={shape}".replace(" ", "")))
        sides: set[int] = set()
        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_hook(lambda _, __, out: sides.add(out.shape[-1]))
        model(torch.empty(1, shape[0] + 2, *shape[1:]))
    assert sides == expected


@settings(max_examples=25, deadline=None)
@given(r=st.floats(0, 1), t=st.floats(0, 1), frequencies=st.lists(st.floats(0.1, 32), max_size=4))
def test_time_features_are_the_times_and_their_sines_and_cosines(r: float, t: float, frequencies: list[float]) -> None:
    features = TimeFeatures(frequencies)
    row = features(torch.tensor([[r, t]]))[0]
    assert row.shape == (features.width,) and row.dtype == torch.float32
    assert torch.equal(row[:2], torch.tensor([r, t]))
    angles = torch.tensor([time * frequency for time in (r, t) for frequency in frequencies])
    assert torch.allclose(row[2:], torch.cat([angles.sin(), angles.cos()]), atol=1e-5)


def test_time_features_stay_fp32_under_autocast_and_travel_in_no_checkpoint() -> None:
    features = TimeFeatures([1.0, 32.0])
    times = torch.tensor([[0.5, 0.5001]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(times), features(times.clone()))
        assert features(times).dtype == torch.float32 and features(times)[0, 0] != features(times)[0, 1]
    assert not features.state_dict()


def test_class_embedding_has_a_null_row_that_none_reads() -> None:
    embedding = ClassEmbedding(3, 8)
    assert embedding.weight.shape == (4, 8)
    assert torch.equal(embedding.rows(None, 2), embedding(torch.tensor([3, 3])))
    assert torch.equal(embedding.rows(torch.tensor([2, 0]), 2), embedding.weight[[2, 0]])


def normalisations(groups: int, channels: int) -> tuple[GroupNorm, nn.GroupNorm]:
    """Ours and torch's with the same scale and shift."""
    ours, theirs = GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(-1, 2, channels))
        theirs.bias.copy_(torch.linspace(3, -1, channels))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 4, 6)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_is_torchs(groups: int, shape: tuple[int, ...]) -> None:
    if groups == 8 and len(shape) == 2:
        pytest.skip("torch refuses groups of a single value")
    ours, theirs = normalisations(groups, 8)
    x = 2 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), theirs(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_has_a_forward_derivative_in_either_layout(layout: torch.memory_format) -> None:
    ours, theirs = (norm.double() for norm in normalisations(2, 8))
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 8, 4, 6, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=layout)
    value, tangent = torch.func.jvp(ours, (x,), (v,))
    h = 1e-6
    assert torch.allclose(value, theirs(x))
    assert tangent.abs().max() > 0.1
    assert torch.allclose(tangent, (theirs(x + h * v) - theirs(x - h * v)) / (2 * h), rtol=1e-5, atol=1e-6)


SHAPES = [(2, 2, 5, 8), (2, 2, 5, 8), (3, 8, 8)]


class Dispatched(TorchDispatchMode):
    """The names of the operations within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_attention_in_forward_mode_is_fused_and_exact() -> None:
    """Value, derivative, and the gradients of both, are those of the form that torch differentiates by itself."""
    x, dx, weights = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES))

    def found(form: Any) -> list[torch.Tensor]:
        own = weights.clone().requires_grad_()
        y, dy = torch.func.jvp(lambda x: form(*(x @ weight for weight in own)), (x,), (dx,))
        gradients = (torch.autograd.grad(part.square().sum(), own, retain_graph=True)[0] for part in (y, dy))
        return [y.detach(), dy.detach(), *gradients]

    with sdpa_kernel(SDPBackend.MATH):
        theirs = found(F.scaled_dot_product_attention)
    with in_forward_mode(), sdpa_kernel(SDPBackend.MATH), Dispatched() as dispatched:
        ours = found(attention)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in dispatched.names
