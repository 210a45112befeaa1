"""Scores by features: the formulas against closed forms and other code, floors, provenance, and what they catch."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import UserError
from common.seeds import generator_for
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.digits import Digits
from dataloaders.encoded import EncodedImages
from dataloaders.image_folder import ImageFolder
from dataloaders.sources import GaussianSource
from dataloaders.synthetic import KMeans
from evaluation.data_hash import data_hash
from evaluation.feature_networks import ClassifierFeatures, InceptionFeatures, classifier_features, weights_hash
from evaluation.fid import fit_gaussian, frechet_distance, from_moments, kernel_distance, neighbour_shares
from evaluation.image_sets import write_pictures
from evaluation.metrics import distances
from evaluation.metrics.base_metric import Absent, Generation, Score, to_bytes
from evaluation.metrics.energy_distance import EnergyDistance
from evaluation.metrics.feature_scores import FeatureScores, Floor
from evaluation.metrics.features import FeatureMetric, scores_between
from evaluation.metrics.few_step import FewStep
from evaluation.metrics.nearest import NearestTraining
from evaluation.metrics.wasserstein import SlicedWasserstein
from evaluation.parts import dataset_key
from evaluation.report import absent_line, print_table, provenance_lines, rows_of
from run_files.provenance import weights_in_words


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim: int, seed: int) -> Tensor:
    root = normal(dim, dim, seed=seed)
    return root @ root.T / dim


def by_square_root(m1: Tensor, s1: Tensor, m2: Tensor, s2: Tensor) -> float:
    """The textbook formula, by scipy's matrix square root."""
    root = scipy.linalg.sqrtm((s1 @ s2).numpy())
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * np.trace(root).real)


@settings(max_examples=20, deadline=None)
@given(dim=st.integers(1, 12), seed=st.integers(0, 1000))
def test_frechet_distance_of_gaussians_is_the_closed_form(dim: int, seed: int) -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (sqrt l1 - sqrt l2)^2 over their eigenvalues."""
    rotation = torch.linalg.qr(normal(dim, dim, seed=seed)).Q
    l1, l2 = normal(2, dim, seed=seed + 1).square()
    m1, m2 = normal(2, dim, seed=seed + 2)
    first, second = (rotation @ values.diag() @ rotation.T for values in (l1, l2))
    exact = ((m1 - m2).square().sum() + (l1.sqrt() - l2.sqrt()).square().sum()).item()
    assert frechet_distance(from_moments(m1, first), from_moments(m2, second)) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("rows", [40, 7], ids=["more images than features", "fewer"])
def test_frechet_distance_of_features_is_that_of_their_moments(rows: int) -> None:
    x, y = normal(rows, 10), 0.7 * normal(50, 10, seed=1) + 0.3
    moments = [(side.mean(0), torch.cov(side.T)) for side in (x, y)]
    value = frechet_distance(fit_gaussian(x.float()), fit_gaussian(y.float()))
    tolerance = 1e-5 if rows == 40 else 1e-3  # of a singular product scipy's root knows eight digits fewer
    assert value == pytest.approx(by_square_root(*moments[0], *moments[1]), rel=tolerance, abs=tolerance)
    assert frechet_distance(from_moments(*moments[0]), from_moments(*moments[1])) == pytest.approx(value, abs=1e-5)
    for fit, (mean, cov) in zip((fit_gaussian(x), fit_gaussian(y)), moments, strict=True):
        assert torch.allclose(fit.mean, mean) and torch.allclose(fit.covariance, cov)


def test_frechet_distance_of_general_covariances_and_of_equals() -> None:
    m1, m2, s1, s2 = normal(6), normal(6, seed=1), covariance(6, 2), covariance(6, 3)
    value = frechet_distance(from_moments(m1, s1), from_moments(m2, s2))
    assert value == pytest.approx(by_square_root(m1, s1, m2, s2), abs=1e-6)
    assert value == pytest.approx(frechet_distance(from_moments(m2, s2), from_moments(m1, s1)), abs=1e-9)
    assert frechet_distance(from_moments(m1, s1), from_moments(m1, s1)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="two images"):
        fit_gaussian(normal(1, 3))


@pytest.mark.parametrize("rows", [300, 20], ids=["more images than features", "fewer"])
def test_frechet_distance_against_clean_fid(rows: int) -> None:
    fid = pytest.importorskip("cleanfid.fid")
    x, y = normal(rows, 32), 1.2 * normal(250, 32, seed=1) + 0.1
    theirs = fid.fid_from_feats(x.numpy(), y.numpy())
    assert frechet_distance(fit_gaussian(x), fit_gaussian(y)) == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_distances_against_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.image.fid")
    kernel = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(300, 32), 1.2 * normal(250, 32, seed=1) + 0.1
    moments = [part for side in (x, y) for part in (side.mean(0), torch.cov(side.T))]
    theirs = image._compute_fid(*moments).item()
    assert frechet_distance(fit_gaussian(x), fit_gaussian(y)) == pytest.approx(theirs, rel=1e-4)
    assert kernel_distance(x[:250], y) == pytest.approx(kernel.poly_mmd(x[:250], y).item(), rel=1e-6)


def test_kernel_distance_against_clean_fid() -> None:
    """Of one subset that is all of both sets."""
    fid = pytest.importorskip("cleanfid.fid")
    x, y = normal(60, 8), normal(60, 8, seed=1) + 0.2
    theirs = fid.kernel_distance(x.numpy(), y.numpy(), num_subsets=1, max_subset_size=60)
    assert kernel_distance(x, y) == pytest.approx(theirs, rel=1e-6)


def naive_kernel_distance(x: Tensor, y: Tensor) -> float:
    k = lambda a, b: (float(a @ b) / len(a) + 1) ** 3  # noqa: E731
    within = [np.mean([k(p, q) for i, p in enumerate(s) for j, q in enumerate(s) if i != j]) for s in (x, y)]
    return float(within[0] + within[1] - 2 * np.mean([k(p, q) for p in x for q in y]))


@pytest.mark.parametrize("elements", [2**20, 30], ids=["one chunk", "many chunks"])
def test_kernel_distance_is_the_full_unbiased_estimator(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "CPU_ELEMENTS", elements)
    x, y = normal(11, 5), normal(8, 5, seed=1) + 0.4
    assert kernel_distance(x, y) == pytest.approx(naive_kernel_distance(x, y), rel=1e-9)
    with pytest.raises(UserError, match="two images"):
        kernel_distance(x[:1], y)


def test_kernel_distance_is_unbiased_at_equality() -> None:
    values = np.array([kernel_distance(normal(30, 4, seed=2 * i), normal(40, 4, seed=2 * i + 1)) for i in range(400)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert (values < 0).mean() > 0.3


def naive_shares(x: Tensor, y: Tensor, k: int) -> dict[str, float]:
    inner = {name: [sorted(math.dist(p, q) for q in s)[k] for p in s] for name, s in (("x", x.tolist()), ("y", y.tolist()))}
    gaps = [[math.dist(p, q) for q in y.tolist()] for p in x.tolist()]
    in_y = [[gap <= inner["y"][j] for j, gap in enumerate(row)] for row in gaps]
    in_x = [[row[j] <= inner["x"][i] for i, row in enumerate(gaps)] for j in range(len(y))]
    return {
        "precision": float(np.mean([any(row) for row in in_y])),
        "recall": float(np.mean([any(row) for row in in_x])),
        "density": float(np.mean([sum(row) / k for row in in_y])),
        "coverage": float(np.mean([any(row[j] for row in in_y) for j in range(len(y))])),
    }


@pytest.mark.parametrize("elements", [2**20, 60], ids=["one chunk", "many chunks"])
def test_neighbour_shares_are_their_definition(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "CPU_ELEMENTS", elements)
    x, y = normal(23, 3) + 0.5, normal(31, 3, seed=1)
    assert neighbour_shares(x, y, 3) == pytest.approx(naive_shares(x, y, 3))
    with pytest.raises(UserError, match="more than 4 images"):
        neighbour_shares(x[:4], y, 3)


def test_neighbour_shares_tell_a_collapse_from_outliers() -> None:
    real = normal(400, 4)
    collapsed, scattered = 0.05 * normal(400, 4, seed=1), 4 * normal(400, 4, seed=2)
    few, wide, good = (neighbour_shares(x, real) for x in (collapsed, scattered, normal(400, 4, seed=3)))
    assert few["precision"] > 0.95 and few["recall"] < 0.1 and few["coverage"] < 0.3
    assert wide["precision"] < 0.4 and wide["density"] < 0.3
    assert min(good["precision"], good["recall"], good["coverage"]) > 0.85 and good["density"] == pytest.approx(1, abs=0.15)


def test_bytes_are_what_a_png_would_hold() -> None:
    values = torch.tensor([-1.2, -1.0, -0.998, 0.0, 0.5, 1.0, 7.0]).view(1, 1, 1, 7)
    assert to_bytes(values, None).flatten().tolist() == [0, 0, 0, 128, 191, 255, 255]
    assert to_bytes(torch.tensor([[[[0.0, 0.5, 1.0]]]]), (0.0, 1.0)).flatten().tolist() == [0, 128, 255]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture
def generation(tmp_path: Path) -> Callable[..., Generation]:
    def make(
        dataset: FlowDataset, samples: Tensor, label: Tensor | None = None, key: str = "digits", **more: Any
    ) -> Generation:
        return Generation(
            samples, samples, label, None, None, None,  # type: ignore[arg-type]
            dataset, GaussianSource(list(dataset.state_shape)), key, tmp_path, False, lambda name: generator_for(0, name),
            **more,
        )  # fmt: skip

    return make


NAMES = [f"eval/{name}_digits_classifier" for name in (
    "frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"
)]  # fmt: skip


def scored(made: Generation, **settings: object) -> dict[str, Score]:
    results = FeatureMetric("digits_classifier", **settings).compute(made)  # type: ignore[arg-type]
    return {result.name: result for result in results if isinstance(result, Score)}


def test_the_shipped_digits_classifier_is_right_about_held_out_digits(digits: Digits) -> None:
    network = classifier_features("digits_classifier")
    assert digits.held_out_labels is not None
    taken = network.answers(network.features(to_bytes(digits.held_out_states, (-1, 1)), torch.device("cpu")))
    assert (taken == digits.held_out_labels).float().mean() >= 0.98
    assert (Path(__file__).parents[2] / "models/classifier/digits_classifier.safetensors").stat().st_size < 1_000_000
    assert network.weights == weights_hash(network.classifier) and network.num_classes == 10


def test_real_digits_score_within_their_floor_and_others_are_caught(
    digits: Digits, generation: Callable[..., Generation]
) -> None:
    order = torch.randperm(1438, generator=torch.Generator().manual_seed(5))
    train, train_label = digits.train_states[order], digits.train_labels
    assert train_label is not None
    train_label = train_label[order]
    made = scored(generation(digits, train[:500], train_label[:500]))
    assert [*made] == [*NAMES, "eval/classifier_accuracy"]
    for name in NAMES:
        score = made[name]
        assert score.floor is not None and score.floor_sd is not None and score.floor_sd > 0
        assert abs(score.value - score.floor) < 5 * score.floor_sd, name
        assert score.extra is not None and abs(score.extra[f"{name}_train"] - score.floor) < 5 * score.floor_sd, name
    kernel = made[NAMES[1]]
    assert abs(kernel.floor) < kernel.floor_sd  # type: ignore[arg-type, operator]
    energy = EnergyDistance().compute(generation(digits, train[:500]))[0]
    assert isinstance(energy, Score) and abs(energy.floor) < energy.floor_sd  # type: ignore[arg-type, operator]
    assert made["eval/classifier_accuracy"].value >= 0.98 and made["eval/classifier_accuracy"].floor >= 0.98  # type: ignore[operator]

    def far(name: str, states: Tensor, label: Tensor | None = None) -> float:
        score = scored(generation(digits, states, label))[name]
        return (score.value - score.floor) / score.floor_sd  # type: ignore[operator]

    shifted = torch.roll(train[:500], 1, dims=3)  # by one pixel
    collapsed = train[train_label == 3][:100].repeat(5, 1, 1, 1) + 0.02 * torch.randn(500, 1, 8, 8)
    for states in (shifted, collapsed):
        assert far(NAMES[0], states) > 10 and far(NAMES[1], states) > 10
        assert far("eval/coverage_digits_classifier", states) < -5
    assert far("eval/recall_digits_classifier", collapsed) < -5
    wrong = scored(generation(digits, train[:500], (train_label[:500] + 1) % 10))["eval/classifier_accuracy"]
    assert wrong.value < 0.05


def test_scores_say_what_they_depend_on_and_reference_features_are_cached_by_it(
    digits: Digits, generation: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = ClassifierFeatures.features

    def counted(self: ClassifierFeatures, images: Tensor, device: torch.device) -> Tensor:
        seen.append(len(images))
        return original(self, images, device)

    monkeypatch.setattr(ClassifierFeatures, "features", counted)
    samples = digits.held_out_states[:100]
    first = scored(generation(digits, samples, weights="some weights", steps="50 steps"))[NAMES[0]]
    assert sorted(seen) == [100, 100, 200, 1438]  # samples, reference, the pool of the floor, the training set
    for word in (
        "digits_classifier (weights ",
        "no resize",
        "100 samples",
        "100 held-out images of digits (data ",
        "8 bits",
        "seed 0 by some weights, 50 steps",
        "floor: 100 against 100 real images, 20 times",
    ):
        assert word in first.provenance
    seen.clear()
    again = scored(generation(digits, samples, weights="some weights", steps="50 steps"))[NAMES[0]]
    assert seen == [100] and again == first
    scored(generation(digits, samples, key="other digits"))
    assert sorted(seen) == [100, 100, 100, 200, 1438]
    seen.clear()
    train = scored(generation(digits, samples), reference="train")[NAMES[0]]
    assert "1,438 training images" in train.provenance and train.extra is None and train.value != first.value
    assert 1438 not in seen  # known already
    decoded = scored(generation(digits, samples, decode=lambda z: z))[NAMES[0]]
    assert "reconstructions" in decoded.provenance and "reconstructions" not in first.provenance


def test_other_pictures_in_the_same_place_have_their_own_reference_and_floor(generation: Callable[..., Generation]) -> None:
    """The settings are the same, so is the cache; only the data differ."""
    alike, other = Digits(), Digits()
    other.states = 0.5 * other.states.flip(3)
    samples = alike.held_out_states[:100]
    first, same, changed = (scored(generation(data, samples), replicates=2)[NAMES[0]] for data in (alike, Digits(), other))
    assert same == first and "data " in first.provenance
    assert changed.value > 4 * first.value and changed.floor != first.floor
    assert changed.provenance != first.provenance
    apart = EnergyDistance(2).compute(generation(other, samples)) + EnergyDistance(2).compute(generation(alike, samples))
    assert apart[0].floor != apart[1].floor  # type: ignore[union-attr]
    held_out = [NearestTraining().compute(generation(data, samples))[2].floor for data in (alike, other)]  # type: ignore[union-attr]
    assert held_out[0] == held_out[1]  # halved and mirrored, the classes are what they were
    moved = Digits()
    moved.states[: moved.train_size] = moved.states[:1]
    assert NearestTraining().compute(generation(moved, samples))[2].floor == 0  # type: ignore[union-attr]


class Encoder(torch.nn.Module):
    """What EncodedImages asks of an autoencoder, with one weight."""

    latent_channels, factor = 4, 8

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))


def test_the_hash_of_data_is_of_what_scores_read(tmp_path: Path) -> None:
    cpu, digits = torch.device("cpu"), Digits()
    assert data_hash(digits, cpu) == data_hash(Digits(), cpu)
    changed = Digits()
    changed.states[-1, 0, 0, 0] += 1 / 8
    assert data_hash(changed, cpu) != data_hash(digits, cpu)
    assert data_hash(KMeans(), cpu) == data_hash(KMeans(), cpu) != data_hash(KMeans(std=0.2), cpu)
    folders = {"a": 0, "b": 0, "c": 1}
    for name, value in folders.items():
        write_pictures(tmp_path / name, torch.full((30, 3, 8, 8), value, dtype=torch.uint8))
    a, b, c = (data_hash(ImageFolder(str(tmp_path / name), 8, 0, [3, 8, 8]), cpu) for name in folders)
    assert a == b != c
    encoded = []
    for name, weight in (("a", 1.0), ("b", 1.0), ("c", 1.0), ("a", 2.0)):
        pictures = ImageFolder(str(tmp_path / name), 8, 0, [3, 8, 8])
        encoded.append(data_hash(EncodedImages(pictures, Encoder(weight), [4, 1, 1], 0), cpu))  # type: ignore[arg-type]
    assert encoded[0] == encoded[1] and len(set(encoded)) == 3


def test_the_shares_look_at_images_of_all_classes() -> None:
    """Samples sorted by class against unsorted ones: which rows come first must not matter."""
    centres = 6 * normal(10, 16)
    x, y = (centres[torch.arange(900) * 10 // 900] + normal(900, 16, seed=seed) for seed in (1, 2))
    shuffled = torch.randperm(900, generator=torch.Generator().manual_seed(3))
    scores = FeatureScores(5, 300)
    sorted_, mixed = scores.measure(x, y[shuffled]), scores.measure(x[shuffled], y[shuffled])
    assert sorted_[:2] == pytest.approx(mixed[:2]) and sorted_[2:] == pytest.approx(mixed[2:], abs=0.1)
    assert (
        scores.drawn_words(900, 200) == "; precision, recall, density, coverage of 300 against 200 of them, drawn at random"
    )
    assert scores.drawn_words(300, 300) == ""


def test_floors_of_small_sets_tell_their_counts(digits: Digits, generation: Callable[..., Generation]) -> None:
    scores, pool = FeatureScores(), normal(60, 8)
    expected = {(60, 30, 30): (30, 30), (60, 60, 60): (30, 30), (8, 8, 8): (4, 4), (60, 10_000, 60): (53, 7),
                (60, 60, 10_000): (7, 53), (14, 7, 7): (7, 7), (4, 2, 2): (2, 2)}  # fmt: skip
    for (rows, first, second), counts in expected.items():
        floor = scores.fitting(min(first, second)).replicated(pool[:rows], first, second, 2)
        assert (floor.first, floor.second) == counts
        assert floor.rows.shape == (2, 6 if min(counts) >= 7 else 2) and floor.rows.isfinite().all()
        again = Floor.of(floor.numbers())
        assert torch.allclose(again.rows, floor.rows) and again.note(*counts) == "" != again.note(1, 1)
    large = Floor(torch.empty(0, 0), 6000, 300, 6300)
    assert large.note(9000, 300) == "of 6,000 against 300" and large.note(9000, 300, 5000) == ""  # 5,000 of either
    none = scores.replicated(pool[:3], 3, 3, 2)
    assert none.rows.shape == Floor.of(none.numbers()).rows.shape == (0, 0)
    many = digits.train_states.repeat(2, 1, 1, 1)[:2000]
    enough = scored(generation(digits, many[:1000]), replicates=2, k=0)[NAMES[0]]
    assert enough.floor_note == "" and "floor: 1,000 against 359 real images" in enough.provenance  # of 1,797 states
    small = scored(generation(digits, many), replicates=2, k=0)[NAMES[0]]
    assert small.floor_note == "of 1,523 against 273" and "floor: 1,523 against 273 real images" in small.provenance
    energy = EnergyDistance(2).compute(generation(digits, many))[0]
    assert isinstance(energy, Score) and energy.floor_note == ""  # its floor keeps the 359 held-out states
    sliced = SlicedWasserstein(4, 2).compute(generation(digits, many))[0]
    assert isinstance(sliced, Score) and sliced.floor_note == ""  # it looks at 359 of each side
    assert "(of 1,523 against 273), training set" in rows_of([small])[0][2]


def test_few_images_have_the_scores_and_floors_that_can_be_had(tmp_path: Path) -> None:
    network, cpu = classifier_features("digits_classifier"), torch.device("cpu")
    images = to_bytes(Digits().held_out_states[:40], (-1, 1))

    def of(first: int, second: int) -> list[Score | Absent]:
        return scores_between(network, images[:first], images[20:][:second], tmp_path, cpu, replicates=2)

    eight = of(8, 8)
    assert all(isinstance(score, Score) for score in eight) and len(eight) == 6
    assert [score.floor is None for score in eight] == [False] * 2 + [True] * 4  # type: ignore[union-attr]
    assert eight[0].floor_note == "of 4 against 4" and "too few" in eight[2].floor_note  # type: ignore[union-attr]
    assert rows_of(eight)[2][2] == "none, 8 real images are too few for two sets"  # type: ignore[arg-type]
    five = of(5, 5)
    assert [isinstance(result, Score) for result in five] == [True] * 2 + [False] * 4
    assert "5 samples and 5 real images are fewer than the 7" in five[2].reason  # type: ignore[union-attr]
    assert [result.reason[-24:] for result in of(1, 5)[:2]] == ["the 2 on a side it takes"] * 2  # type: ignore[union-attr]


def test_scores_that_cannot_be_given_say_why(digits: Digits, generation: Callable[..., Generation]) -> None:
    metric = FeatureMetric("digits_classifier", replicates=2)
    assert metric.names() == [*NAMES, "eval/classifier_accuracy"]
    bad = digits.held_out_states[:20].clone()
    bad[3] = math.nan
    results = metric.compute(generation(digits, bad))
    assert [r.name for r in results] == metric.names() and all(isinstance(r, Absent) for r in results)
    assert "1 of 20 samples are not finite" in results[0].reason  # type: ignore[union-attr]
    unlabelled = metric.compute(generation(digits, digits.held_out_states[:20]))[-1]
    assert isinstance(unlabelled, Absent) and "conditional=true" in unlabelled.reason
    large = generation(digits, torch.zeros(20, 3, 16, 16))
    assert "sees images of shape [1, 8, 8], not [3, 16, 16]" in metric.compute(large)[0].reason  # type: ignore[union-attr]
    few = metric.compute(generation(digits, digits.held_out_states[:6]))
    assert [isinstance(result, Score) for result in few] == [True] * 2 + [False] * 5
    assert "6 samples and 6 real images are fewer than the 7" in few[2].reason  # type: ignore[union-attr]
    assert FeatureMetric("digits_classifier", final_only=True).compute(large) == []
    assert FeatureMetric(None).compute(large) == [] and FeatureMetric(None).names() == []
    for settings_ in ({"reference": "test"}, {"replicates": 1}):
        with pytest.raises(UserError, match=r"correct evaluation\.metrics"):
            FeatureMetric("digits_classifier", **settings_)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"not tensors", None])
def test_a_file_that_is_no_classifier_is_one_sentence(content: bytes | None, tmp_path: Path, small_run) -> None:
    if content is None:
        path = small_run("x", "max_steps=1") / "runs/x/model.safetensors"
    else:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
    with pytest.raises(UserError, match="holds no classifier" if content is None else "cannot be read as a checkpoint"):
        classifier_features(str(path))
    with pytest.raises(UserError, match="no checkpoint at"):
        classifier_features(str(tmp_path / "nothing.pt"))


def test_a_run_on_digits_is_judged_by_the_shipped_classifier(small_run, capsys) -> None:
    folder = small_run(
        "x", "dataloaders=digits", "model=unet_small", "dataloaders.epoch_size=1438", "conditional=true", "max_steps=2",
        "evaluation=generator", "evaluation.metrics.features.replicates=2", "loss=meanflow", "loss/weighting=adaptive",
    )  # fmt: skip
    status = json.loads((folder / "runs/x/status.json").read_text())["scores"]
    for name in ("eval/frechet_distance_digits_classifier", "eval/kernel_distance_digits_classifier_floor_sd"):
        assert name in status
    assert {"eval/classifier_accuracy", "eval/classifier_accuracy_1nfe", "eval/classifier_accuracy_1nfe_3"} <= set(status)
    assert f"{NAMES[0]}_1nfe_train" in status
    assert "digits_classifier (weights " in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "runs/x/metrics.jsonl").read_text().splitlines()]
    words = rows[-1]["provenance"]
    made = r"64 samples from seed 0 by the EMA weights \(decay 0.995\) at step 2, 8 evaluations by \w+; 64 held-out images"
    assert re.search(made, words[NAMES[0]])
    assert "at step 2, steps of the flow map: as many as the name says" in words[f"{NAMES[0]}_1nfe"]


def test_few_step_names_what_it_cannot_give() -> None:
    metric = FewStep({"energy": EnergyDistance(), "features": FeatureMetric("digits_classifier")}, [1])

    class Velocities:
        learns_flow_map = False

    made = Generation(*[None] * 3, Velocities(), *[None] * 4, *[None] * 4)  # type: ignore[arg-type]
    names = [result.name for result in metric.compute(made)]
    assert names == [f"{name}_1nfe" for name in ("eval/energy_distance", *NAMES, "eval/classifier_accuracy")]


def test_fid_says_which_file_goes_where(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt") as caught:
        InceptionFeatures(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


class Layers(torch.nn.Module):
    """2,048 features that are the mean of each colour, over and over."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).repeat(1, 683)[:, :2048]


class FakeInception(torch.nn.Module):
    """What clean-fid asks of the TorchScript file: .layers, called on resized images between -1 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_fid_goes_through_clean_fids_resize_and_wrapper(tmp_path: Path, generation: Callable[..., Generation]) -> None:
    """On a stand-in for the weights: the mean of an image's colours is known, and survives the resize."""
    pytest.importorskip("cleanfid")
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    network = InceptionFeatures(str(tmp_path))
    flat = torch.tensor([[0, 128, 255], [64, 64, 64]], dtype=torch.uint8)[:, :, None, None].expand(2, 3, 8, 8)
    features = network.features(flat, torch.device("cpu"))
    assert features.shape == (2, 2048)
    assert torch.allclose(features[:, :3], (flat[:, :, 0, 0].float() - 128) / 128, atol=1e-5)
    assert network.metric("frechet_distance") == "eval/fid" and network.metric("kernel_distance") == "eval/kid"
    assert network.metric("recall") == "eval/recall" and network.refusal((4, 32, 32)) is not None
    assert "clean-fid" in network.describe() and len(network.weights) == 16
    gray = network.features(flat[1:, :1], torch.device("cpu"))
    assert torch.equal(gray, features[1:])


def test_weights_that_are_no_inception_are_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("cleanfid")
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"not TorchScript")
    with pytest.raises(UserError, match="cannot be read as TorchScript"):
        InceptionFeatures(str(tmp_path)).features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.device("cpu"))


def test_a_table_fits_a_terminal(capsys) -> None:
    names = [f"eval/{name}_{n}nfe" for n in (1, 2, 4) for name in ("energy_distance", "frechet_distance_digits_classifier")]
    absent = [*(Absent(name, "it learns no map across time") for name in [*names, "eval/w2"]), Absent("oracle/x", "no")]
    assert absent_line(absent) == "few-step scores, eval/w2 (it learns no map across time); oracles (no)"
    score = Score("eval/w2", 1.0, provenance="a network " * 40)
    print_table([score], [*absent, *(Absent(f"eval/{n:050}", "no") for n in range(9))])
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 110 and len(provenance_lines([score])) == 1


def test_weights_are_named_as_they_are() -> None:
    assert weights_in_words({"ema": {"decay": 0.0}}, 5) == "the weights themselves (no EMA) at step 5"
    assert weights_in_words({"ema": {"decay": 0.995}}, 1200) == "the EMA weights (decay 0.995) at step 1,200"
    assert weights_in_words({}, 1) == "the EMA weights at step 1"


def test_the_key_of_a_dataset_knows_the_weights_that_decode_it(tmp_path: Path) -> None:
    config: dict[str, Any] = {"choices": {"dataloaders": "latents"}, "dataloaders": {"path": "x"}}
    keys = [dataset_key(config)]
    for folder, content in (("a", b"one"), ("a", b"two"), ("b", b"two")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "diffusion_pytorch_model.safetensors").write_bytes(content)
        keys.append(dataset_key(config | {"vae": {"path": str(tmp_path / folder)}}))
    assert len(set(keys)) == 4 and keys[-1] == dataset_key(config | {"vae": {"path": str(tmp_path / "b")}})
