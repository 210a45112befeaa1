"""Scores of samples by features: values, floors, provenance, and what they catch."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from configuration.overrides import settings_from_overrides
from dataloaders.digits import Digits
from dataloaders.encoded import EncodedImages
from dataloaders.image_folder import ImageFolder
from dataloaders.synthetic import KMeans
from evaluation.data_hash import data_hash
from evaluation.evaluator import checked_results
from evaluation.feature_networks import ClassifierFeatures, classifier_features, weights_hash
from evaluation.image_sets import write_pictures
from evaluation.metrics.base_metric import Absent, Generation, Metric, Score, to_bytes
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


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


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
        assert abs(score.value - score.floor) < 5 * score.floor_sd, name  # the held-out ones are of other writers
        higher = name.split("_")[0] not in ("eval/frechet", "eval/kernel")
        assert (score.floor_q99 is None, score.floor_q01 is None) == (higher, not higher), name
        assert score.extra is not None and abs(score.extra[f"{name}_train"] - score.floor) < 5 * score.floor_sd, name
    kernel = made[NAMES[1]]
    assert abs(kernel.floor) < kernel.floor_sd  # type: ignore[arg-type, operator]
    energy = EnergyDistance().compute(generation(digits, train[:500]))[0]
    assert isinstance(energy, Score) and abs(energy.floor) < energy.floor_sd  # type: ignore[arg-type, operator]
    assert made["eval/classifier_accuracy"].value >= 0.98 and made["eval/classifier_accuracy"].floor >= 0.98  # type: ignore[operator]

    shifted = torch.roll(train[:500], 1, dims=3)  # by one pixel
    collapsed = train[train_label == 3][:100].repeat(5, 1, 1, 1) + 0.02 * torch.randn(500, 1, 8, 8)
    for states in (shifted, collapsed):
        made = scored(generation(digits, states))
        ends = [made[name].floor_end.split()[0] for name in NAMES]
        assert ends[:2] == ["above"] * 2 and ends[5] == "below" and (ends[3] == "below" or states is shifted)
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
        "digits_classifier (weights ", "no resize", "100 samples", "100 held-out images of data (data ", "8 bits",
        "seed 0 by some weights, 50 steps", "floor: 100 against 100 real images, 20 times",
    ):  # fmt: skip
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
    a, b, c = (data_hash(ImageFolder(str(tmp_path / name), 8), cpu) for name in folders)
    assert a == b != c
    encoded = []
    for name, weight in (("a", 1.0), ("b", 1.0), ("c", 1.0), ("a", 2.0)):
        pictures = ImageFolder(str(tmp_path / name), 8)
        encoded.append(data_hash(EncodedImages(pictures, Encoder(weight), state_shape=[4, 1, 1], num_classes=0), cpu))  # type: ignore[arg-type]
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
    for word, allowed in (("reference=test", "held_out or train"), ("replicates=1", "at least 2")):
        with pytest.raises(UserError, match=allowed):
            settings_from_overrides([f"evaluation.metrics.features.{word}"])


@pytest.mark.parametrize("content", [b"", b"not tensors", None])
def test_a_file_that_is_no_classifier_is_one_sentence(content: bytes | None, tmp_path: Path, small_run) -> None:
    if content is None:
        path = small_run("x", "max_steps=1") / "runs/x/model.safetensors"
    else:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
    with pytest.raises(UserError, match="holds no classifier" if content is None else "cannot be read as a checkpoint"):
        classifier_features(str(path))
    with pytest.raises(UserError, match="there is no file"):
        classifier_features(str(tmp_path / "nothing.pt"))


@pytest.mark.slow
def test_a_run_on_digits_is_judged_by_the_shipped_classifier(small_run, capsys) -> None:
    folder = small_run(
        "x", "dataloaders=digits", "model=unet_small", "model.width=8", "model.multipliers=[1,1]", "conditional=true",
        "dataloaders.epoch_size=1438", "max_steps=2",
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


def test_few_step_names_what_it_cannot_give(generation: Callable[..., Generation]) -> None:
    metric = FewStep({"energy": EnergyDistance(), "features": FeatureMetric("digits_classifier")}, [1])

    class Velocities:
        learns = "velocity"

    made = generation(KMeans(), torch.zeros(2, 2), objective=Velocities())
    names = [result.name for result in metric.compute(made)]
    assert names == [f"{name}_1nfe" for name in ("eval/energy_distance", *NAMES, "eval/classifier_accuracy")]


def test_a_table_fits_a_terminal(capsys) -> None:
    kinds = ("eval/energy_distance", "eval/frechet_distance_digits_classifier", "oracle/flow_map_error")
    names = [f"{name}_{n}nfe" for n in (1, 2, 4) for name in kinds]
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


@pytest.mark.parametrize("given", [3.0, {"eval/mine": 3.0}, [3.0], [Score("eval/mine", torch.tensor(3.0))]])  # type: ignore[arg-type]
def test_what_a_metric_gives_wrong_is_one_sentence(given: object) -> None:
    class Mine(Metric):
        name = "eval/mine"

        def compute(self, generation: Generation) -> list[Score | Absent]:
            return given  # type: ignore[return-value]

    with pytest.raises(UserError, match=r"the metric mine \(Mine\) gives .*returns a list of Score"):
        checked_results("mine", Mine(), None)  # type: ignore[arg-type]
