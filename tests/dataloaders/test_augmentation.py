"""Augmentation of whole batches: what moves where, how often, and what the network is told of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from backends.submission import prepare
from common.errors import UserError
from configuration.compose import compose_config, resolved
from dataloaders.augmentation import (
    ANISOTROPY,
    ELASTIC_WIDTH,
    SCALE,
    Augmentation,
    Distortion,
    blurred,
    draw_amounts,
    parameters,
    smooth_ways,
    transformed,
    turned,
)
from evaluation.parts import build_objective
from losses.objective import FlowObjective
from models.inputs import join_label, split_label, with_class

COUNT = 20_000


def pictures(count: int = 4, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def amounts(count: int = 4, **rows: float) -> Tensor:
    names = ["mirrored", "upside_down", "scale", "angle", "direction", "stretch", "across", "down"]
    return torch.tensor([rows.get(name, 0.0) for name in names])[:, None].expand(-1, count)


def test_half_of_the_pictures_are_mirrored_and_none_is_otherwise_changed() -> None:
    x = pictures(1).expand(COUNT, -1, -1, -1)
    y, label = Augmentation(flip=True)(x, None, generator())
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert label is None and ((y == x).flatten(1).all(1) ^ mirrored).all()
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(COUNT)


def test_a_shift_is_uniform_and_brings_in_black() -> None:
    """A picture of one marked pixel: where it lands, against all places equally often (chi-square, 80 degrees)."""
    x = torch.zeros(COUNT, 1, 17, 17)
    x[:, :, 8, 8] = 1
    y, _ = Augmentation(crop_padding=4)(x, None, generator())
    places = (y[:, 0] == 1).flatten(1).int().argmax(1)
    rows, columns = places // 17 - 8, places % 17 - 8
    counts = torch.bincount((rows + 4) * 9 + columns + 4, minlength=81).float()
    expected = COUNT / 81
    assert len(counts) == 81 and ((counts - expected) ** 2 / expected).sum() < 80 + 5 * math.sqrt(160)
    for picture, row, column in zip(y[:20, 0], rows[:20].tolist(), columns[:20].tolist(), strict=True):
        assert int((picture == -1).sum()) == 17 * 17 - (17 - abs(row)) * (17 - abs(column))


def test_randomness_comes_from_the_generator_alone() -> None:
    augmentation = Augmentation(flip=True, crop_padding=2, augment=0.5)
    (x, a), (y, b), (z, _) = (augmentation(pictures(), None, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(x, y) and torch.equal(a, b) and not torch.equal(x, z)


def test_nothing_asked_for_changes_nothing() -> None:
    x, label = pictures(), torch.arange(4)
    y, same = Augmentation()(x, label, generator())
    assert y is x and same is label


@pytest.mark.parametrize("changes, expected", [
    ({"mirrored": 1}, lambda x: x.flip(3)),
    ({"upside_down": 1}, lambda x: x.flip(2)),
    ({"angle": math.pi}, lambda x: x.flip(2, 3)),
    ({"angle": math.pi / 2}, lambda x: x.rot90(-1, (2, 3))),
    ({"angle": -math.pi / 2}, lambda x: x.rot90(1, (2, 3))),
    ({"mirrored": 1, "angle": math.pi / 2}, lambda x: x.flip(3).rot90(-1, (2, 3))),  # mirrored first
    ({"across": 1}, lambda x: torch.cat([x[..., :2].flip(3), x[..., :-2]], dim=3)),  # an eighth of 16 pixels, reflected
    ({"down": -1}, lambda x: torch.cat([x[:, :, 2:], x[:, :, -2:].flip(2)], dim=2)),
    ({"angle": math.pi, "across": 1}, lambda x: torch.cat([(y := x.flip(2, 3))[..., :2].flip(3), y[..., :-2]], 3)),
    ({"direction": 1.0}, lambda x: x),
])  # fmt: skip
def test_changes_that_move_whole_pixels_are_exact(changes, expected) -> None:
    x = pictures()
    assert torch.allclose(transformed(x, amounts(**changes)), expected(x), atol=2e-5)


def test_scale_and_stretch_move_a_smooth_picture_as_their_matrices_do() -> None:
    """A picture that is a linear function of place: a change of place changes its slope (bicubic: within 2e-3)."""
    ramp = torch.linspace(-0.3, 0.3, 32)
    across, down = ramp.expand(32, -1), ramp[:, None].expand(-1, 32)
    x = torch.stack([across, down])[None]
    inner = (0, slice(None), slice(12, 20), slice(12, 20))
    larger = transformed(x, amounts(1, scale=1.5))
    assert torch.allclose(larger[inner], x[inner] / SCALE**1.5, atol=2e-3)
    wider = transformed(x, amounts(1, stretch=2.0))
    factors = torch.tensor([ANISOTROPY**-2, ANISOTROPY**2])[:, None, None]
    assert torch.allclose(wider[inner], x[inner] * factors, atol=2e-3)
    diagonal = transformed(x, amounts(1, stretch=2.0, direction=math.pi / 4))[0]
    along, across_it = (diagonal[0] + diagonal[1])[12:20, 12:20], (diagonal[0] - diagonal[1])[12:20, 12:20]
    straight = x[0, :, 12:20, 12:20]
    assert torch.allclose(along, (straight[0] + straight[1]) / ANISOTROPY**2, atol=2e-3)
    assert torch.allclose(across_it, (straight[0] - straight[1]) * ANISOTROPY**2, atol=2e-3)


def test_each_change_is_as_frequent_as_asked_and_distributed_as_published() -> None:
    drawn = draw_amounts(COUNT, 0.12, generator())
    mirrored, upside_down, scale, angle, direction, stretch, across, down = drawn
    tolerance = 4 * math.sqrt(0.12 * 0.88 / COUNT)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / math.sqrt(COUNT) and abs(upside_down.mean() - 0.06) < tolerance
    for row in (scale, angle, stretch, across):
        assert abs((row != 0).float().mean() - 0.12) < tolerance
    assert torch.equal(direction != 0, stretch != 0) and torch.equal(across != 0, down != 0)
    for row in (scale, stretch, across, down):
        assert abs(row[row != 0].std() - 1) < 0.1 and abs(row[row != 0].mean()) < 0.1
    for row in (angle, direction):
        assert row.abs().max() <= math.pi and abs(row[row != 0].std() - math.pi / math.sqrt(3)) < 0.1
    both = ((scale != 0) & (angle != 0)).float().mean()
    assert abs(both - 0.12**2) < 4 * math.sqrt(0.0144 / COUNT)  # independently of each other


def test_an_untouched_picture_is_the_same_and_its_parameters_are_zero() -> None:
    x = pictures(200)
    y, label = Augmentation(augment=0.1)(x, None, generator())
    told = split_label(label)[1]
    assert told.shape == (200, 9)
    untouched = (told == 0).all(1)
    assert 20 < untouched.sum() < 120 and torch.equal(y[untouched], x[untouched])
    assert not (y[~untouched] == x[~untouched]).flatten(1).all(1).any()
    assert y.min() >= -1 and y.max() <= 1


def test_parameters_tell_every_change_apart() -> None:
    told = [parameters(amounts(1, **{name: 0.7}))[0] for name in ("scale", "angle", "across", "down")]
    told += [parameters(amounts(1, **{name: 1.0}))[0] for name in ("mirrored", "upside_down", "stretch")]
    told.append(parameters(amounts(1, stretch=1.0, direction=2.0))[0])
    assert torch.linalg.matrix_rank(torch.stack(told)) == 8
    assert torch.allclose(parameters(amounts(1, angle=math.pi)), parameters(amounts(1, angle=-math.pi)), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(1, 9), st.integers(0, 1000))
def test_a_joined_label_comes_apart_again(classes: list[int], width: int, number: int) -> None:
    label, told = torch.tensor(classes), torch.randn(len(classes), width)
    joined = join_label(label, told)
    assert joined.shape == (len(classes), 1 + width)
    back, parameters_back = split_label(joined)
    assert torch.equal(back, label) and torch.equal(parameters_back, told)
    null, kept = split_label(with_class(joined, number))
    assert null.tolist() == [number] * len(classes) and torch.equal(kept, told)
    assert with_class(label, number).tolist() == [number] * len(classes) and split_label(label) == (label, None)


def objective_of(*words: str) -> FlowObjective:
    base = ["run_name=x", "dataloaders=photos", "model=unet_small", "model.width=8", "model.multipliers=[1,1]"]
    torch.manual_seed(0)
    return build_objective(resolved(compose_config([*base, *words])), torch.device("cpu"))


@pytest.mark.parametrize("loss", ["mse", "meanflow", "shortcut"])
@pytest.mark.parametrize("conditional", ["false", "true"])
def test_a_network_is_told_of_the_augmentation_and_samples_as_if_there_were_none(loss: str, conditional: str) -> None:
    objective = objective_of(f"loss={loss}", f"conditional={conditional}", "dataloaders.augment=0.5")
    for parameter in objective.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, classes = pictures(6, 32), torch.arange(6) % 2
    x, label = Augmentation(augment=0.5)(x, classes, generator())
    batch = objective.draw(torch.randn_like(x), x, label, generator(), 0.5)
    assert batch.label is not None and torch.equal(batch.label[:, 1:], label[:, 1:])
    objective(batch, objective)["loss"].backward()
    weight = objective.network.conditioning.augmentation.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    z, t = x.clone(), torch.tensor(0.4)
    told, zero = objective.velocity(z, t, label), objective.velocity(z, t, join_label(classes, torch.zeros(6, 9)))
    plain = objective.velocity(z, t, classes if conditional == "true" else None)
    assert torch.allclose(zero, plain, atol=1e-5) and not torch.allclose(told, plain, atol=1e-3)


def test_hidden_labels_keep_their_augmentation() -> None:
    objective = objective_of("conditional=true", "dataloaders.augment=0.5", "loss.label_dropout=0.5")
    label = join_label(torch.arange(1000) % 2, torch.randn(1000, 9))
    shown = objective.drop_labels(label, generator())
    classes, told = split_label(shown)
    assert torch.equal(told, label[:, 1:]) and 400 < (classes == 2).sum() < 600
    kept = classes != 2
    assert torch.equal(classes[kept], (torch.arange(1000) % 2)[kept])


def test_meanflow_guidance_sees_the_classes_of_augmented_batches() -> None:
    """Guided targets where the label is shown, the plain velocity where it is hidden, as without augmentation."""
    words = ["loss=meanflow", "conditional=true", "loss/guidance=meanflow", "loss.guidance.omega=2"]
    objective = objective_of(*words, "dataloaders.augment=0.5")
    for parameter in objective.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, classes = pictures(6, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    batch = objective.draw(torch.randn_like(x), x, None, generator())
    batch.label = join_label(classes, torch.zeros(6, 9))
    joined = objective.velocity_target(batch)
    batch.label = classes
    assert torch.allclose(joined, objective.velocity_target(batch), atol=1e-5)
    guided = (joined != batch.conditional_velocity).flatten(1).any(1)
    assert guided.tolist() == [True, True, False] * 2


def test_a_model_without_an_input_for_augmentation_is_one_sentence() -> None:
    with pytest.raises(UserError, match="has no input that says so"):
        prepare(["run_name=x", "dataloaders=photos", "model=cnn", "dataloaders.augment=0.1"])


@pytest.mark.slow
def test_a_run_with_every_augmentation(small_run) -> None:
    settings = ["dataloaders=photos", "dataloaders.crops=60", "dataloaders.held_out_crops=20", "dataloaders.epoch_size=null"]
    words = ["model=unet_small", "model.width=8", "model.multipliers=[1,1]", "dataloaders.augment=0.3"]
    words += ["dataloaders.crop_padding=2", "conditional=true", "max_steps=2", "batch_size=16"]
    words += ["evaluation.samples=8", "evaluation.final_samples=8"]
    folder = small_run("x", *settings, *words)
    assert (folder / "runs/x/status.json").exists()


def test_a_quarter_turn_is_rot90_and_no_turn_nothing() -> None:
    x, still = pictures(), torch.zeros(())
    quarters = torch.tensor([1, -1, 2, 0])
    y = turned(x, quarters * math.pi / 2, still)
    for row, k in enumerate(quarters.tolist()):
        torch.testing.assert_close(y[row], torch.rot90(x[row], k, (1, 2)), atol=1e-5, rtol=0)


def test_turns_and_ways_are_scipys() -> None:
    """On pictures that are not square; scipy reads the places in rows and columns, without units of half a side."""
    x, angle = pictures()[:, :, :10], torch.tensor([0.3, -0.7, 1.5, 0.0])
    ways = 2 * smooth_ways(x, generator(3))
    found = turned(x, angle, ways)
    row, column = torch.meshgrid(torch.arange(10) - 4.5, torch.arange(16) - 7.5, indexing="ij")
    for k in range(4):
        cos, sin = angle[k].cos(), angle[k].sin()
        across, down = cos * column - sin * row + ways[k, ..., 0], sin * column + cos * row + ways[k, ..., 1]
        places = torch.stack([down + 4.5, across + 7.5]).numpy()
        for channel in range(3):
            expected = ndimage.map_coordinates(x[k, channel].numpy(), places, order=1, mode="reflect")
            torch.testing.assert_close(found[k, channel], torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_elastic_ways_have_variance_1_at_edges_too_and_bend_as_slowly_as_stated() -> None:
    x = torch.empty(4000, 1, 8, 12)
    ways = smooth_ways(x, generator())
    assert (ways.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / 4000)
    apart, std = 2, ELASTIC_WIDTH * 12  # a smoothed noise's correlation is a Gaussian of sqrt(2) its width
    correlation = (ways[:, 4, 5] * ways[:, 4, 5 + apart]).mean()
    assert correlation == pytest.approx(math.exp(-(apart**2) / (4 * std**2)), abs=0.05)


def test_a_blurred_point_is_a_gaussian_and_a_constant_stays() -> None:
    point = torch.zeros(3, 1, 21, 25)
    point[:, :, 10, 12] = 1
    std = torch.tensor([0.0, 0.8, 2.0])
    found = blurred(point, std)
    for k in range(3):
        expected = ndimage.gaussian_filter(point[k, 0].double().numpy(), max(std[k].item(), 1e-3), radius=10)
        torch.testing.assert_close(
            found[k, 0, 1:-1, 3:-3].double(), torch.from_numpy(expected)[1:-1, 3:-3], atol=1e-5, rtol=0
        )
    assert torch.equal(found[0], point[0])
    constant = torch.full_like(point, 0.7)
    torch.testing.assert_close(blurred(constant, std), constant)


@pytest.mark.parametrize("side", [1, 4, 5, 8])
def test_cutout_takes_its_share_of_squares(side: int) -> None:
    """Each place along an axis of n is covered by as many of the n centres as its square reaches."""
    x = torch.ones(COUNT // 4, 2, 8, 10)
    y = Distortion(cutout=side)(x, generator())
    assert torch.equal(y[:, 0], y[:, 1]) and set(y.unique().tolist()) == {0.0, 1.0}
    over = [
        torch.tensor([sum(0 <= place - centre + side // 2 < side for centre in range(n)) / n for place in range(n)])
        for n in (8, 10)
    ]
    expected = over[0][:, None] * over[1]
    assert ((y[:, 0] == 0).float().mean(0) - expected).abs().max() < 5 * 0.5 / math.sqrt(COUNT // 4)
    assert (y[:, 0] == 0).sum((1, 2)).max() == side * side


@pytest.mark.parametrize("name, amount", [("rotation", 20.0), ("elastic", 1.0), ("blur", 1.5), ("cutout", 5)])
def test_each_distortion_depends_on_the_generator_alone_and_differs_from_row_to_row(name: str, amount: float) -> None:
    distortion, x = Distortion(**{name: amount}), pictures(1).expand(6, -1, -1, -1)
    one, two, other = (distortion(x, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert len(one.flatten(1).unique(dim=0)) > 1 and one.shape == x.shape and one.abs().max() <= 1


def test_turns_are_as_far_as_asked_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr("dataloaders.augmentation.turned", lambda x, angle, ways: seen.append(angle) or x)
    Distortion(rotation=30.0)(torch.empty(COUNT, 1, 1, 1), generator())
    degrees = seen[0].rad2deg()
    assert -30 <= degrees.min() < -29.9 and 29.9 < degrees.max() <= 30 and degrees.mean().abs() < 5 * 17.4 / math.sqrt(COUNT)


@pytest.mark.parametrize("words, sentence", [
    (["loss=mse", "model=cnn", "loss.rotation=10"], "rotation"),
    (["loss=meanflow", "model=cnn", "loss.cutout=2"], "cutout"),
    (["loss=cross_entropy", "loss.rotation=200"], "loss.rotation takes a number from 0 to 180"),
    (["loss=cross_entropy", "loss.blur=-1"], "loss.blur takes a number of at least 0"),
])  # fmt: skip
def test_only_classifiers_take_distortions(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        prepare(["run_name=x", "dataloaders=digits", *words])
    assert "\n" not in str(caught.value)


def test_a_square_larger_than_the_picture_and_data_that_are_no_pictures_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"loss\.cutout=9 is larger than a picture of 8x12; give at most 8"):
        Distortion(cutout=9)(torch.empty(2, 1, 8, 12), generator())
    with pytest.raises(
        UserError, match=r"loss.blur=0.5 changes images \(C, H, W\), and these data are \(2,\); leave it out"
    ):
        Distortion(blur=0.5)(torch.empty(3, 2), generator())
