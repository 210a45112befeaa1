"""Distances between samples, their noise floors and the nearest-training scores."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configuration.compose import compose_config, resolved
from dataloaders.synthetic import Gaussian, KMeans
from dataloaders.tensor_dataset import TensorDataset
from evaluation.evaluator import GeneratorEvaluator
from evaluation.metrics import distances
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score
from evaluation.metrics.cache import cached_numbers
from evaluation.metrics.distances import nearest
from evaluation.metrics.energy_distance import EnergyDistance, energy_distance
from evaluation.metrics.feature_scores import FeatureScores
from evaluation.metrics.nearest import NearestTraining
from evaluation.metrics.two_sample import TwoSampleMetric, as_far, upper_end
from evaluation.metrics.wasserstein import SlicedWasserstein, Wasserstein, sliced_wasserstein2, wasserstein2
from evaluation.parts import build_objective
from evaluation.report import verdict_lines


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_energy_distance(x: Tensor, y: Tensor) -> float:
    """The definition, pair by pair, in float64."""
    a, b = x.flatten(1).double().tolist(), y.flatten(1).double().tolist()
    across = np.mean([math.dist(p, q) for p in a for q in b])
    within = [np.mean([math.dist(p, q) for p, q in itertools.permutations(side, 2)]) for side in (a, b)]
    return float(2 * across - within[0] - within[1])


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (8,), (9,), (1, 4, 4)], ids=str)
@pytest.mark.parametrize("elements", [2**20, 60], ids=["one chunk", "many chunks"])
def test_energy_distance_is_its_definition(shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "CPU_ELEMENTS", elements)
    x, y = normal(23, *shape) + 5, 0.5 * normal(31, *shape, seed=1) + 5.3
    assert energy_distance(x, y) == pytest.approx(naive_energy_distance(x, y), abs=2e-6)
    x, y = normal(23, *shape) + 1000, normal(31, *shape, seed=1) + 1000  # far from the origin
    assert energy_distance(x, y) == pytest.approx(naive_energy_distance(x, y), abs=2e-5)


def test_energy_distance_is_unbiased_at_equality() -> None:
    values = np.array([energy_distance(normal(60, 2, seed=2 * i), normal(60, 2, seed=2 * i + 1)) for i in range(300)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))  # a V-statistic: 17 standard errors off
    assert (values < 0).mean() > 0.3


def mean_absolute(mean: float, variance: float) -> float:
    """E|N(mean, variance)|."""
    std = math.sqrt(variance)
    return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * variance)) + mean * math.erf(mean / (std * 2**0.5))


def test_energy_distance_between_gaussians() -> None:
    exact = 2 * mean_absolute(0.7, 1 + 0.16) - mean_absolute(0, 2) - mean_absolute(0, 0.32)
    values = [energy_distance(normal(2000, 1, seed=i), 0.4 * normal(2000, 1, seed=i + 50) + 0.7) for i in range(20)]
    assert np.mean(values) == pytest.approx(exact, abs=4 * float(np.std(values)) / math.sqrt(20))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), dim=st.sampled_from([1, 2, 12]))
def test_energy_distance_ignores_order_and_a_common_shift(seed: int, shift: float, dim: int) -> None:
    x, y = normal(17, dim, seed=seed), normal(12, dim, seed=seed + 1) + 1
    order = torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    value = energy_distance(x, y)
    assert energy_distance(x[order], y) == pytest.approx(value, abs=1e-5)
    assert energy_distance(y, x) == pytest.approx(value, abs=1e-5)
    assert energy_distance(x + shift, y + shift) == pytest.approx(value, abs=2e-5)


def test_wasserstein_is_the_best_pairing() -> None:
    x, y = normal(6, 2), normal(6, 2, seed=1)
    best = min((x - y[list(order)]).square().sum(1).mean() for order in itertools.permutations(range(6)))
    assert wasserstein2(x, y) == pytest.approx(math.sqrt(best), rel=1e-6)


def test_wasserstein_of_a_shift_is_the_shift() -> None:
    x, shift = normal(400, 2), torch.tensor([0.3, -0.4])
    assert wasserstein2(x, (x + shift)[torch.randperm(400)]) == pytest.approx(0.5, abs=1e-6)
    directions = torch.nn.functional.normalize(normal(64, 2, seed=3))
    sliced = sliced_wasserstein2(x, (x + shift)[torch.randperm(400)], directions)
    assert sliced == pytest.approx((directions @ shift).square().mean().sqrt().item(), abs=1e-5)
    assert SlicedWasserstein(2000).distance(x, x + shift) == pytest.approx(0.5 / math.sqrt(2), rel=0.05)


class CountingKMeans(KMeans):
    """Counts the pairs drawn for noise floors."""

    pairs = 0

    def real_pair(self, first: int, second: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        self.pairs += 1
        return super().real_pair(first, second, generator)


def only(metric: Metric, made: Generation) -> Score:
    (score,) = metric.compute(made)
    assert isinstance(score, Score)
    return score


@pytest.mark.parametrize("metric", [EnergyDistance(20), SlicedWasserstein(16, 20), Wasserstein(40, 8)], ids=lambda m: m.name)
def test_floor_is_drawn_once_for_a_dataset_and_its_counts(
    metric: TwoSampleMetric, generation: Callable[..., Generation]
) -> None:
    dataset = CountingKMeans()
    made = generation(dataset, dataset.held_out(100, torch.Generator().manual_seed(9))[0])
    first = only(metric, made)
    pools = min(metric.pools or metric.replicates, metric.replicates)
    assert dataset.pairs == pools
    assert first.floor is not None and first.floor_sd is not None and first.floor_sd > 0
    assert first.floor_q99 is not None and first.floor_q99 > first.floor + first.floor_sd
    again = only(metric, generation(dataset, made.samples, seed=5))
    assert (again.floor, again.floor_sd, again.floor_q99) == (first.floor, first.floor_sd, first.floor_q99)
    assert first.p is None  # of so few splits none could be small
    assert dataset.pairs == pools
    only(metric, generation(dataset, made.samples, key="kmeans std=0.2"))
    assert dataset.pairs == 2 * pools
    only(metric, generation(dataset, made.samples[: 50 if metric.name != "eval/w2" else 30]))
    assert dataset.pairs == 3 * pools


def test_the_energy_distances_floor_of_many_states_is_drawn_once_and_scaled(
    generation: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.metrics.energy_distance.MOST", 50)
    dataset, metric = CountingKMeans(), EnergyDistance(20)
    samples = dataset.held_out(200, torch.Generator().manual_seed(9))[0]
    few, many = (only(metric, generation(dataset, samples[:count])) for count in (50, 200))
    assert dataset.pairs == metric.pools and few.floor_sd is not None
    assert many.floor_sd == pytest.approx(few.floor_sd / 4) and many.floor == pytest.approx((few.floor or 0) / 4)


@pytest.mark.parametrize("metric", [EnergyDistance(4), SlicedWasserstein(16, 20)], ids=lambda m: m.name)
def test_the_distances_of_splits_are_distances(metric: TwoSampleMetric) -> None:
    """All splits at once, of pools whose parts differ in size where the score's may."""
    for dim, first in ((2, 30), (12, 25)):
        first = first if metric.name == "eval/energy_distance" else 30
        pool, seed = normal(60, dim, seed=dim), torch.Generator().manual_seed(1)
        found = metric.of_splits(pool, first, 3, torch.Generator().manual_seed(1))
        if metric.name == "eval/energy_distance":
            places = torch.rand(60, 3, generator=seed).argsort(0).T
        else:
            places = torch.stack([torch.randperm(60, generator=seed) for _ in range(3)])
        expected = [metric.distance(pool[place < first], pool[place >= first]) for place in places]
        assert found == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("first", [30, 31])
def test_an_odd_number_of_states_is_split_into_halves_but_for_one(first: int) -> None:
    metric, pool = SlicedWasserstein(16, 20), normal(61, 2, seed=1)
    odd, even = (metric.of_splits(x, k, 3, torch.Generator().manual_seed(1)) for x, k in ((pool, first), (pool[:60], 30)))
    assert odd == even


def test_long_noise_floors_say_how_long_they_take(
    generation: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0.0, 2.0)  # seconds, two more at each look
    monkeypatch.setattr("common.progress.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    only(Wasserstein(10, 20), generation(KMeans(), normal(20, 2)))
    assert "noise floor of eval/w2: about 3" in capsys.readouterr().err
    FeatureScores(0).replicated(normal(20, 3), 10, 10, 20)
    said = capsys.readouterr().err
    assert "noise floor of feature scores: about" in said and "kernel distance" not in said  # of one block each


def test_floors_of_two_sets_share_no_draws(generation: Callable[..., Generation]) -> None:
    """Gaussians of other means and widths have the same law between equals, up to the width, but not the same floor."""
    sds = []
    for mean, std in ((0.0, 1.0), (3.0, 1.0), (-2.0, 2.0)):
        dataset = Gaussian(mean, std, state_shape=[1])
        score = only(EnergyDistance(40), generation(dataset, mean + std * normal(300, 1), key=f"{mean} {std}"))
        assert score.floor_sd is not None
        sds.append(score.floor_sd / std)
    assert len({round(sd, 7) for sd in sds}) == 3 and max(sds) < 2 * min(sds)


@pytest.mark.parametrize("count", [10, 40, 250])
def test_the_upper_end_of_a_floor_holds_99_percent_with_90_percent_confidence(count: int) -> None:
    values = torch.randn(800, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = np.mean([scipy.stats.norm.cdf(upper_end(row.tolist())) >= 0.99 for row in values])
    assert held == pytest.approx(0.91, abs=0.03)


def test_real_data_is_seldom_told_from_real_and_a_shift_is(generation: Callable[..., Generation]) -> None:
    """The short form of dev/floor_check.py: at a true rate of 1 % more than 5 of 100 have a chance of .05 %."""
    dataset, metric = Gaussian(), EnergyDistance()
    score = only(metric, generation(dataset, dataset.held_out(300, torch.Generator().manual_seed(9))[0], key="gaussian"))
    assert score.floor_q99 is not None and score.p is not None
    pairs = [dataset.real_pair(300, 300, torch.Generator().manual_seed(100 + i)) for i in range(100)]
    assert sum(metric.distance(x, y) > score.floor_q99 for x, y in pairs) <= 5
    assert sum(metric.distance(x + 0.3 * 0.4, y) > score.floor_q99 for x, y in pairs) >= 80
    assert (as_far(2.0, [1.0, 2.0, 3.0, 0.0]), as_far(9.0, [0.0] * 999)) == (0.6, 0.001)


def test_the_floor_of_many_samples_against_few_held_out_ones_is_of_their_counts(
    generation: Callable[..., Generation],
) -> None:
    """A finite set keeps as many on the smaller side as are held out, and the law is scaled by 1/n + 1/m."""
    dataset = TensorDataset(normal(400, 2), None, torch.arange(80))
    score = only(EnergyDistance(), generation(dataset, normal(5000, 2, seed=7), key="finite"))
    fresh = [energy_distance(normal(5000, 2, seed=2 * i + 50), normal(80, 2, seed=2 * i + 51)) for i in range(60)]
    assert score.floor_sd == pytest.approx(float(np.std(fresh)), rel=0.35) and score.floor_note == ""


def test_damaged_cache_is_computed_anew(tmp_path: Path) -> None:
    calls = []

    def compute() -> list[float]:
        calls.append(1)
        return [0.1, float(np.float64(1) / 3)]

    assert cached_numbers(tmp_path, "a/b", {"k": 1}, compute) == cached_numbers(tmp_path, "a/b", {"k": 1}, compute)
    (file,) = tmp_path.glob("a_b_*")
    assert json.loads(file.read_text())["k"] == 1
    for damage in ("", '{"values": [0.1', "[]", '{"values": null}', "{}"):
        file.write_text(damage)
        assert cached_numbers(tmp_path, "a/b", {"k": 1}, compute) == [0.1, 1 / 3]
    assert len(calls) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{file.name}.lock", file.name]


@pytest.mark.slow
def test_floor_covers_real_samples_and_not_a_missing_blob(generation: Callable[..., Generation]) -> None:
    dataset = KMeans()
    real, label = dataset.held_out(2000, torch.Generator().manual_seed(4))
    good, bad = (only(EnergyDistance(), generation(dataset, samples)) for samples in (real, real[label != 2]))
    assert good.floor is not None and good.floor_sd is not None
    assert good.name == "eval/energy_distance" and good.spread is None
    assert abs(good.floor) < 3 * good.floor_sd
    assert abs(good.value - good.floor) < 5 * good.floor_sd
    assert bad.value > 20 * good.floor_sd


def test_unscorable_samples_are_absent(generation: Callable[..., Generation]) -> None:
    samples = torch.randn(10, 2)
    samples[3, 1] = math.nan
    for metric in (EnergyDistance(), SlicedWasserstein(), Wasserstein()):
        (absent,) = metric.compute(generation(KMeans(), samples))
        assert absent == Absent(metric.name, "1 of 10 samples are not finite")
    digits = TensorDataset(normal(30, 1, 2, 2), None, torch.arange(10))
    (absent,) = Wasserstein().compute(generation(digits, normal(10, 1, 2, 2)))
    assert isinstance(absent, Absent) and "images" in absent.reason


def test_a_weighted_loss_stands_beside_its_raw_squared_error(generation: Callable[..., Generation]) -> None:
    """Of one network: what adaptive weighting with p = 1 makes about 1 is beside it what the plain loss is."""

    def losses(*words: str) -> dict[str, float]:
        config = resolved(compose_config(["run_name=x", "model.width=8", *words]))
        data = KMeans()
        made = generation(data, torch.zeros(2, 2))
        objective = build_objective(config, torch.device("cpu"))
        with torch.no_grad():
            return GeneratorEvaluator(500, 500, {}).held_out_loss(objective, made)  # type: ignore[arg-type]

    plain, weighted = losses(), losses("loss/weighting=adaptive")
    assert [*plain] == ["eval/loss"] and weighted["eval/loss"] == pytest.approx(1, abs=0.05)
    assert weighted["eval/squared_error"] == pytest.approx(plain["eval/loss"], rel=1e-6)
    assert losses("loss=meanflow")["eval/squared_error"] > 2


def test_a_line_says_by_which_scores_samples_differ_from_real_data() -> None:
    far = Score("eval/w2", 5.0, floor=2.0, floor_sd=0.5, floor_q99=3.0)
    near, unknown = Score("eval/fid", 2.5, floor=2.0, floor_sd=0.5, floor_q99=3.0), Score("eval/loss", 1.0)
    low = Score("eval/recall", 0.1, floor=0.9, floor_sd=0.1, floor_q01=0.6)
    assert verdict_lines([far, near, low, unknown]) == [
        "the samples differ from real data by eval/w2 (6 sd beyond its floor), eval/recall (8 sd beyond its floor); "
        "no difference is seen by eval/fid"
    ]
    assert verdict_lines([near]) == ["no difference from real data is seen by eval/fid"]
    still = replace(far, floor_sd=0.0)  # a floor of which every replicate is the same
    assert verdict_lines([still]) == ["the samples differ from real data by eval/w2 (beyond its floor)"]
    rare = [replace(score, p=p) for score, p in ((far, 0.0043), (near, 0.5), (replace(near, name="eval/kid"), 0.25))]
    assert verdict_lines(rare) == [
        "the samples differ from real data by eval/w2 (6 sd beyond its floor, p = 0.0043); "
        "no difference is seen by eval/fid, eval/kid (p = 0.5, 0.25)"
    ]
    assert verdict_lines([unknown]) == []


def finite_set(labelled: bool = True) -> TensorDataset:
    """Three well separated clusters of 1 x 4 x 4 images, a fifth held out."""
    label = torch.arange(300) % 3
    states = (0.1 * normal(300, 1, 4, 4) + (label - 1)[:, None, None, None]).clamp(-1, 1)
    classes = 3 if labelled else 0
    return TensorDataset(states, label if labelled else None, torch.arange(60), num_classes=classes, value_range=[-1, 1])


def test_nearest_training_tells_copies_and_missing_classes(generation: Callable[..., Generation]) -> None:
    dataset = finite_set()
    fresh = dataset.held_out_states
    ratio, copies, share = NearestTraining().compute(generation(dataset, fresh))
    assert isinstance(ratio, Score) and isinstance(copies, Score) and isinstance(share, Score)
    assert ratio.value == pytest.approx(1)
    assert copies.value == 0
    assert (share.value, share.floor) == pytest.approx((1 / 3, 1 / 3))
    train, label = dataset.train_states, dataset.train_labels
    assert label is not None
    kept = torch.cat([train[label == 0][:30], fresh[20:].flip(-1), train[label == 2][:10] + 5e-4])
    ratio, copies, share = NearestTraining().compute(generation(dataset, kept))
    assert isinstance(copies, Score) and isinstance(share, Score) and share.extra is not None
    assert copies.value == pytest.approx(40 / 80)
    assert isinstance(ratio, Score) and ratio.value < 0.5  # half of them sit on a training state
    assert sum(share.extra.values()) == pytest.approx(1)
    assert list(share.extra) == [f"eval/class_share_{k}" for k in range(3)]
    ratio, copies, share = NearestTraining().compute(generation(dataset, train[label == 1] * 100 - 3))
    assert isinstance(share, Score) and share.value == 0


def test_nearest_training_is_absent_where_senseless(generation: Callable[..., Generation]) -> None:
    results = NearestTraining().compute(generation(KMeans(), torch.randn(5, 2)))
    assert {result.name for result in results} == {
        "eval/nearest_distance_ratio", "eval/copies", "eval/class_share_min"
    }  # fmt: skip
    assert all(isinstance(result, Absent) for result in results)
    unlabelled = finite_set(labelled=False)
    *scores, absent = NearestTraining().compute(generation(unlabelled, unlabelled.held_out_states))
    assert isinstance(absent, Absent) and "no labels" in absent.reason
    assert all(isinstance(score, Score) for score in scores)


def test_nearest_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, points = normal(50, 5), normal(70, 5, seed=1)
    exact = torch.cdist(x.double(), points.double())
    monkeypatch.setattr(distances, "CPU_ELEMENTS", 200)
    distance, index = nearest(x, points)
    assert torch.equal(index, exact.argmin(1))
    assert torch.allclose(distance.double(), exact.amin(1), atol=1e-5)
