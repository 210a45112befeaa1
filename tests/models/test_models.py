"""The velocity-model contract over every file in configs/model, and the layers that models share.

A new model joins by its config. It must take points (dataloaders=kmeans) or images (dataloaders=digits). One of more than
LARGE parameters is built on the meta device only; its values are checked on a copy of depth 1, or a narrow one.
"""

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UserError
from configuration.build import build
from configuration.compose import CONFIG_DIR, compose_config, groups, resolved
from evaluation.parts import build_objective
from models.inputs import make_unified_flow_matching_input
from models.unet.unet import UNet
from models.velocity_model import VelocityModel
from tests.models.configured import ROWS, all_in_double, fresh_model, full_size, model_node, shallow, suits

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
ONE_TIME: set[str] = set()  # models that declare to read the time of the state only


def class_of(name: str) -> str:
    return str(OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml")["_target_"])


MODELS = [name for name in groups()["model"] if not class_of(name).startswith("models.classifier.")]  # they map to logits
every_model = pytest.mark.parametrize("name", MODELS)
conditional_or_not = pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])


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


@pytest.mark.slow
@pytest.mark.parametrize("name", {class_of(name): name for name in MODELS}.values())
def test_the_compiled_loss_is_the_eager_one(name: str) -> None:
    """Traced whole, MeanFlow's derivative inside, which holds every evaluation of flow matching; no kernels are generated,
    which would take a minute each.
    """
    if "digits" not in suits(name):
        pytest.skip("a model of points: see tests/losses/test_compiled_losses.py")
    has = model_node(name, "digits")
    small = {"width": 16, "multipliers": "[1,1]", "inner_width": 16, "inner_blocks": 1, "embedding": 16}
    small |= {"qk_norm": "true"}
    node = ["run_name=x", "dataloaders=digits", f"model={name}", "loss=meanflow", *shallow(name)]
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


def test_a_unet_of_patches_is_one_of_the_pixels_of_each_patch_as_channels() -> None:
    sizes = {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention_up_to": 2, "embedding": 8}
    whole, plain = UNet([3, 8, 4], patch_size=2, **sizes), UNet([12, 4, 2], **sizes)
    plain.load_state_dict(whole.state_dict())
    state, times = torch.randn(ROWS, 3, 8, 4), torch.rand(ROWS, 2)
    patches = state.reshape(ROWS, 3, 4, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    v = plain.eval()(make_unified_flow_matching_input(patches, times))
    v = v.reshape(ROWS, 3, 2, 2, 4, 2).permute(0, 1, 4, 2, 5, 3).reshape(state.shape)
    torch.testing.assert_close(whole.eval()(make_unified_flow_matching_input(state, times)), v)


@pytest.mark.parametrize("overrides, word", [
    (["model=mlp", "dataloaders=digits"], "model=cnn"),
    (["model=cnn", "dataloaders=kmeans"], "model=mlp"),
    (["model=cnn", "dataloaders=digits", "dataloaders.state_shape=[1,7,8]"], "even"),
    (["model=unet_small", "dataloaders=digits", "model.state_shape=[1,8,6]"], "multiples of 4, not 8x6"),
    (["model=unet_small", "dataloaders=digits", "model.width=12"], "multiples of 8"),
    (["model=unet_small", "dataloaders=digits", "model.patch_size=4"], "patches of 4x4 and .* multiples of 16, not 8x8"),
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
