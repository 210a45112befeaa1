"""The velocity-model contract over every file in configs/model, and the layers that models share.

A new model joins by its config. It must take points (dataloaders=kmeans) or images (dataloaders=digits). One of more than
LARGE parameters is built on the meta device only; its values are checked on a copy of depth 1, or a narrow one.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UserError
from configuration.build import build
from configuration.compose import CONFIG_DIR, compose_config, groups, resolved
from evaluation.parts import build_objective
from models.dit.dit import Attention as DiTAttention
from models.dit.dit import DiT, sincos_positions
from models.inputs import make_unified_flow_matching_input
from models.layers import ClassEmbedding, Conditioning, GroupNorm, RMSNorm, TimeFeatures, modulate
from models.unet.unet import Attention, ResidualBlock
from models.velocity_model import VelocityModel

LARGE = 20_000_000
SIZES = {  # trainable parameters
    "mlp": (1, 1_000_000),
    "cnn": (450_000, 550_000),
    "unet": (50_500_000, 51_500_000),
    "unet_small": (700_000, 1_500_000),
    "dit_s": (32_500_000, 33_500_000),
    "dit_b": (130_000_000, 131_500_000),
    "dit_b4": (130_000_000, 131_500_000),
    "dit_l": (457_000_000, 459_000_000),
    "dit_xl": (674_000_000, 676_000_000),
}
LATENTS = ["model.state_shape=[4,32,32]", "model.num_classes=1000"]
KNOWN_FOR = {"unet": ["model.state_shape=[3,32,32]"]}  # the data a size is quoted for
KNOWN_FOR |= {name: LATENTS for name in SIZES if name.startswith("dit")}
SHALLOW = {
    "depth": 1,
    "hidden_size": 96,
    "width": 16,
    "blocks": 1,
}  # those of these settings that a large model has make it small
ONE_TIME: set[str] = set()  # models that declare to read the time of the state only
ROWS = 4


@cache
def model_node(name: str, dataset: str, *overrides: str) -> dict[str, Any]:
    """configs/model/<name>.yaml as a run on `dataset` resolves it."""
    return resolved(compose_config(["run_name=x", f"dataloaders={dataset}", f"model={name}", *overrides]))["model"]


@cache
def suits(name: str) -> list[str]:
    """The datasets whose states the model takes, one of points and one of images."""
    found = []
    for dataset in ("kmeans", "digits"):
        with suppress(UserError):
            model_node(name, dataset)
            found.append(dataset)
    return found


def is_classifier(name: str) -> bool:
    """Whether it maps images to logits: another contract, tested elsewhere."""
    return OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml")["_target_"].startswith("models.classifier.")


MODELS = [name for name in groups()["model"] if not is_classifier(name)]
every_model = pytest.mark.parametrize("name", MODELS)
conditional_or_not = pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])


@cache
def full_size(name: str, *overrides: str) -> int:
    """Parameters of the model as configured, without their memory."""
    with torch.device("meta"):
        return build(model_node(name, suits(name)[0], *overrides)).parameter_count()


def shallow(name: str) -> list[str]:
    """Overrides that take the dropout away and make a large model small."""
    node = model_node(name, suits(name)[0])
    overrides = ["model.dropout=0.0"] if "dropout" in node else []
    if full_size(name) > LARGE:
        overrides += [f"model.{key}={value}" for key, value in SHALLOW.items() if key in node]
    return overrides


def fresh_model(name: str, conditional: bool = False) -> VelocityModel:
    """The model or its shallow variant, without dropout, as training starts it."""
    torch.manual_seed(0)
    model = build(model_node(name, suits(name)[0], f"conditional={conditional}".lower(), *shallow(name)))
    model.init_weights()
    return model


def small_model(name: str, conditional: bool = False) -> VelocityModel:
    """A fresh model moved off its start, where gates and outputs may be zero and would hide mistakes."""
    model = fresh_model(name, conditional)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def state_shape(name: str) -> list[int]:
    return model_node(name, suits(name)[0])["state_shape"]


def inputs(name: str, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """States (B, ...) and times r < t (B, 2)."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(rows, *state_shape(name), generator=generator, dtype=dtype)
    return z, torch.rand(rows, 2, generator=generator, dtype=dtype).sort(dim=1).values


def fused(z: Tensor, times: Tensor) -> Tensor:
    """The unified input in the states' own precision."""
    return torch.cat([z, times.view(*times.shape, *(1,) * (z.ndim - 2)).expand(-1, -1, *z.shape[2:])], dim=1)


def some_labels(model: VelocityModel) -> Tensor | None:
    """Real labels and, last, the null one; None for an unconditional network."""
    return torch.tensor([0, 1, 2, model.num_classes]) if model.num_classes else None


@contextmanager
def all_in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a model insists on fp32 by x.float(), let it have fp64, so that differences can be compared."""
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        yield


@every_model
def test_it_is_a_velocity_model_of_points_or_images(name: str) -> None:
    assert suits(name), f"model={name} can be composed neither with dataloaders=kmeans nor with dataloaders=digits"
    assert issubclass(get_class(model_node(name, suits(name)[0])["_target_"]), VelocityModel)


@pytest.mark.parametrize("name, bounds", SIZES.items(), ids=SIZES)
def test_it_has_the_size_it_is_known_for(name: str, bounds: tuple[int, int]) -> None:
    assert bounds[0] < full_size(name, *KNOWN_FOR.get(name, [])) < bounds[1]


@conditional_or_not
@every_model
def test_full_size_gives_velocities_of_the_states_shape(name: str, conditional: bool) -> None:
    with torch.device("meta"):
        model = build(model_node(name, suits(name)[0], f"conditional={conditional}".lower()))
        unified = make_unified_flow_matching_input(*(part.to("meta") for part in inputs(name)))
        label = some_labels(model)
    assert model(unified, label).shape == (ROWS, *state_shape(name))
    assert model.num_classes == ({"kmeans": 5, "digits": 10}[suits(name)[0]] if conditional else 0)


@conditional_or_not
@every_model
def test_a_fresh_model_answers_finitely_and_later_every_parameter_can_learn(name: str, conditional: bool) -> None:
    fresh, moved = fresh_model(name, conditional), small_model(name, conditional)
    unified, label = make_unified_flow_matching_input(*inputs(name)), some_labels(fresh)
    answer = fresh(unified, label)
    assert answer.shape == (ROWS, *state_shape(name)) and answer.dtype == torch.float32
    assert answer.isfinite().all() and answer.abs().max() < 10
    moved(unified, label).square().sum().backward()
    assert not [n for n, p in moved.named_parameters() if p.grad is None or not p.grad.any()]


@every_model
def test_labels_matter_and_no_label_is_the_null_label(name: str) -> None:
    model = small_model(name, conditional=True)
    unified = make_unified_flow_matching_input(*inputs(name))
    null = torch.full((ROWS,), model.num_classes)
    assert torch.allclose(model(unified, None), model(unified, null), atol=1e-6)
    answers = [model(unified, torch.full((ROWS,), label)) for label in range(model.num_classes + 1)]
    for i, answer in enumerate(answers):
        assert all((answer - other).abs().amax() > 1e-4 for other in answers[:i])
    mixed = model(unified, torch.arange(ROWS))
    for row in range(ROWS):
        assert torch.allclose(mixed[row], answers[row][row], atol=1e-5)


@pytest.mark.parametrize("direction", ["along the flow", "the time headed to"])
@conditional_or_not
@every_model
def test_forward_mode_is_the_central_difference(
    name: str, conditional: bool, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with all_in_double(monkeypatch), sdpa_kernel(SDPBackend.MATH):
        model = small_model(name, conditional).double()
        z, times = inputs(name, dtype=torch.float64)
        flow = direction == "along the flow"
        tangent_z = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype) * flow
        tangent_t = torch.tensor([1.0, 0.0] if flow else [0.0, 1.0], dtype=z.dtype).expand(ROWS, 2)

        def u(z: Tensor, times: Tensor) -> Tensor:
            return model(fused(z, times), some_labels(model))

        value, tangent = torch.func.jvp(u, (z, times), (tangent_z, tangent_t))
        h = 1e-5
        with torch.no_grad():
            difference = u(z + h * tangent_z, times + h * tangent_t) - u(z - h * tangent_z, times - h * tangent_t)
            assert torch.allclose(value, u(z, times)) and value.dtype == torch.float64
    assert tangent is not None
    if flow or name not in ONE_TIME:
        assert tangent.abs().max() > 1e-4
    assert torch.allclose(tangent, difference / (2 * h), rtol=1e-5, atol=1e-6)


@every_model
def test_forward_mode_can_be_differentiated_in_the_parameters(name: str) -> None:
    """What MeanFlow-type losses do without a stop-gradient: reverse over forward."""
    model, (z, times) = small_model(name), inputs(name)
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda z: model(fused(z, times)), (z,), (torch.ones_like(z),))
        tangent.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


@every_model
def test_bf16_autocast_stays_near_fp32(name: str) -> None:
    model, unified = small_model(name), make_unified_flow_matching_input(*inputs(name))
    exact = model(unified)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(unified).float()
    assert half.isfinite().all() and not torch.equal(half, exact)
    assert (half - exact).norm() < 0.05 * exact.norm()


@every_model
def test_channels_last_changes_nothing(name: str) -> None:
    if len(state_shape(name)) != 3:
        pytest.skip("vectors have no memory format")
    model, unified = small_model(name), make_unified_flow_matching_input(*inputs(name))
    expected = model(unified)
    turned = model.to(memory_format=torch.channels_last)(unified.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(turned, expected, atol=1e-5)
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(
            lambda x: model(x.contiguous(memory_format=torch.channels_last)), (unified,), (torch.ones_like(unified),)
        )
    assert tangent.isfinite().all() and tangent.any()


@every_model
def test_it_reads_both_times_and_tells_them_apart(name: str) -> None:
    model, (z, times) = small_model(name), inputs(name)
    here = model(make_unified_flow_matching_input(z, times))
    for move in [(0.2, 0.0)] if name in ONE_TIME else [(0.2, 0.0), (0.0, 0.2), (0.2, -0.2)]:
        moved = times + torch.tensor(move)
        there = model(make_unified_flow_matching_input(z, moved))
        assert ((there - here).flatten(1).abs().amax(1) > 1e-4).all(), move


@conditional_or_not
@every_model
def test_rows_of_a_batch_do_not_see_each_other(name: str, conditional: bool) -> None:
    model, unified = small_model(name, conditional), make_unified_flow_matching_input(*inputs(name))
    label = some_labels(model)
    together = model(unified, label)
    for row in range(ROWS):
        alone = model(unified[row : row + 1], None if label is None else label[row : row + 1])
        assert torch.allclose(alone[0], together[row], atol=1e-5)


@every_model
def test_the_answer_is_repeatable_and_the_input_left_alone(name: str) -> None:
    model, unified = small_model(name), make_unified_flow_matching_input(*inputs(name))
    before = unified.clone()
    assert torch.equal(model(unified), model(unified))
    assert torch.equal(unified, before)


ONE_OF_EACH_CLASS = {model_node(name, suits(name)[0])["_target_"]: name for name in MODELS if "digits" in suits(name)}


@pytest.mark.parametrize("loss", ["mse", "meanflow"])
@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS.values())
def test_the_compiled_loss_is_the_eager_one(name: str, loss: str) -> None:
    """Traced whole, with the derivative inside; no kernels are generated, which would take a minute each."""
    has = model_node(name, "digits")
    small = {"width": 16, "multipliers": "[1,1]", "inner_width": 16, "inner_blocks": 1, "embedding": 16, "qk_norm": "true"}
    node = ["run_name=x", "dataloaders=digits", f"model={name}", f"loss={loss}", *shallow(name)]
    node += [f"model.{key}={value}" for key, value in small.items() if key in has]
    objective = build_objective(resolved(compose_config(node)), torch.device("cpu"))
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(0.02 * torch.randn_like(p))
    data = torch.randn(2, ROWS, *state_shape(name), generator=torch.Generator().manual_seed(0))
    batch = objective.draw(data[0], data[1], None, torch.Generator().manual_seed(0))
    parameters = list(objective.parameters())
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager_decomp_partition")
    (ours, theirs) = (run(batch)["loss"] for run in (compiled, objective))
    assert torch.allclose(ours, theirs, rtol=1e-4)
    for mine, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-3 * other.abs().max().item() + 1e-6)


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


@pytest.mark.parametrize("overrides, word", [
    (["model=mlp", "dataloaders=digits"], "model=cnn"),
    (["model=cnn", "dataloaders=kmeans"], "model=mlp"),
    (["model=cnn", "dataloaders=digits", "dataloaders.state_shape=[1,7,8]"], "even"),
    (["model=unet_small", "dataloaders=digits", "model.state_shape=[1,8,6]"], "multiples of 4, not 8x6"),
    (["model=unet_small", "dataloaders=digits", "model.width=12"], "multiples of 8"),
    (["model=unet", "dataloaders=kmeans"], "takes images"),
    (["model=dit_b4", "dataloaders=digits", "model.state_shape=[1,8,6]"], "4x4, which do not tile images of 8x6"),
    (["model=dit_s", "dataloaders=digits", "model.hidden_size=100"], "multiple of 4 and of model.heads=6"),
    (["model=dit_s", "dataloaders=digits", "model.hidden_size=18"], "multiple of 4"),
    (["model=mlp", "dataloaders=kmeans", "dataloaders.num_classes=0", "conditional=true"], "labels"),
])  # fmt: skip
def test_an_impossible_pair_is_one_sentence(overrides: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        build(resolved(compose_config(["run_name=x", *overrides]))["model"])
    assert "\n" not in str(caught.value)
