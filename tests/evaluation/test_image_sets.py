"""Images in files: exports that others read, and scripts/eval_fid.py over checkpoints, folders and .npz files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from dataloaders.digits import Digits
from evaluation.evaluator import GeneratorEvaluation
from evaluation.feature_networks import ClassifierFeatures, classifier_features
from evaluation.fid import fit_gaussian, frechet_distance
from evaluation.image_sets import images_hash, read_images, write_arrays, write_pictures
from evaluation.metrics.base_metric import Absent, Score, to_bytes
from evaluation.metrics.features import scores_between
from evaluation.report import draw_neighbours
from evaluation.sample import load
from models.classifier.classifier import Classifier
from scripts import eval_fid, sample
from tests.conftest import DIGITS

NAME = "eval/frechet_distance_digits_classifier"
NETWORK = "network=digits_classifier"


def pictures(channels: int, count: int = 12, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_byte_for_byte(channels: int, tmp_path: Path) -> None:
    images = pictures(channels)
    write_pictures(tmp_path / "folder", images)
    write_arrays(tmp_path / "x.npz", images, torch.arange(12))
    assert torch.equal(read_images(tmp_path / "folder"), images)
    assert torch.equal(read_images(tmp_path / "x.npz"), images)
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (12, 8, 8, 3)
    assert arrays["arr_1"].tolist() == list(range(12))
    assert images_hash(images) != images_hash(images.flip(0))


def test_files_that_are_no_images_are_one_sentence(tmp_path: Path) -> None:
    write_pictures(tmp_path / "folder", pictures(3))
    with pytest.raises(UserError, match="is not empty"):
        write_pictures(tmp_path / "folder", pictures(3))
    with pytest.raises(UserError, match="4 channels"):
        write_pictures(tmp_path / "latents", pictures(4))
    (tmp_path / "folder/zz.png").write_text("text")
    with pytest.raises(UserError, match=r"zz\.png is damaged"):
        read_images(tmp_path / "folder")
    Image.new("RGB", (9, 8)).save(tmp_path / "folder/zz.png")
    with pytest.raises(UserError, match=r"zz\.png is of 9x8 pixels, 000000\.png of 8x8"):
        read_images(tmp_path / "folder")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    (tmp_path / "bad.npz").write_text("text")
    for name, sentence in (
        ("empty", "no pictures"), ("nothing", "neither a folder"), ("x.npz", "holds x, not arr_0"),
        ("float.npz", r"float64 of shape \[2, 4, 4, 3\]"), ("bad.npz", "is damaged"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            read_images(tmp_path / name)


@pytest.fixture(scope="module")
def checkpoint(shared_run) -> Path:
    return shared_run("d", *DIGITS, "solver.steps=2") / "ckpts/cnn/d_last.pt"


def test_a_set_of_pictures_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    kept = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda image, path: kept(image, path) if path.stem == "000000" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_pictures(tmp_path / "folder", pictures(3))
    assert not (tmp_path / "folder").exists()
    monkeypatch.undo()
    write_pictures(tmp_path / "folder", pictures(3))  # what the first one left is gone
    assert len([*(tmp_path / "folder").iterdir()]) == len(pictures(3)) and len([*tmp_path.iterdir()]) == 1
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "empty", pictures(3))
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {path.name for path in (tmp_path / "folder").iterdir()}


@pytest.mark.slow
def test_a_checkpoints_samples_are_exported_and_score_as_it_does(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """The same samples by way of the checkpoint, a folder of pictures and a .npz have the same distance to the same data."""
    common = [f"ckpt={checkpoint}", "n=40", "label=all", "solver=euler", "solver.steps=2"]
    assert sample.main([*common, f"out={tmp_path}/folder/"]) == 0
    assert sample.main([*common, f"out={tmp_path / 'x.npz'}", "images=true"]) == 0
    model = load(checkpoint)
    model.config |= {"solver": model.config["solver"]}
    made = np.load(tmp_path / "x.npz")
    assert made["arr_0"].shape == (40, 8, 8, 3) and made["arr_1"].tolist() == [k for k in range(10) for _ in range(4)]
    assert len(list((tmp_path / "folder").glob("*.png"))) == 40
    data = Digits()
    write_arrays(tmp_path / "real.npz", to_bytes(data.held_out_states, (-1, 1)), None)
    cache, out = f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'scores.json'}"
    values = []
    for source in (f"samples={tmp_path / 'folder'}", f"samples={tmp_path / 'x.npz'}", *[f"ckpt={checkpoint}"]):
        words = [source, f"reference={tmp_path / 'real.npz'}", NETWORK, cache, out]
        assert eval_fid.main(words + (common[1:] if source.startswith("ckpt") else [])) == 0
        scores = {score["name"]: score for score in json.loads((tmp_path / "scores.json").read_text())}
        values.append(scores[NAME]["value"])
        assert ("by the EMA weights (decay 0.995) at step 1" in scores[NAME]["provenance"]) == source.startswith("ckpt")
        assert "real images, 20 times" in scores[NAME]["provenance"]
        assert scores[NAME]["floor_sd"] > 0 and "359 reference images" in scores[NAME]["provenance"]
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])
    network = classifier_features("digits_classifier")
    x, y = (network.features(read_images(tmp_path / name), torch.device("cpu")) for name in ("folder", "real.npz"))
    assert values[0] == pytest.approx(frechet_distance(fit_gaussian(x), fit_gaussian(y)))
    fit = fit_gaussian(y)
    np.savez(tmp_path / "statistics.npz", mu=fit.mean.numpy(), sigma=fit.covariance.numpy())
    words = [f"samples={tmp_path / 'folder'}", f"reference={tmp_path / 'statistics.npz'}", NETWORK]
    (score,) = eval_fid.evaluate(words)
    assert isinstance(score, Score) and score.value == pytest.approx(values[0], abs=1e-4)
    assert score.floor is None and "statistics.npz (" in score.provenance
    assert "floor none, statistics hold no images to draw one from" in capsys.readouterr().out
    results = eval_fid.evaluate([*common, NETWORK, cache, "replicates=3"])
    assert isinstance(results[0], Score) and "real images, 3 times" in results[0].provenance
    assert "by the EMA weights (decay 0.995) at step 1, 2 evaluations by Euler;" in results[0].provenance
    assert {"eval/classifier_accuracy", NAME} <= {result.name for result in results if isinstance(result, Score)}


def test_samples_are_the_same_for_any_batch_size_and_count(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoint)
    many = model.sample(60, seed=1)
    monkeypatch.setattr("evaluation.generate.CHUNK", 7)
    torch.testing.assert_close(model.sample(20, seed=1), many[:20], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give either ckpt="),
        (["ckpt={c}", "samples={t}"], "give either ckpt="),
        (["samples={t}"], "give reference="),
        (["samples={t}", "reference={t}"], "network is missing"),
        (["samples={t}", "reference={t}", NETWORK], "no pictures"),
        (["ckpt={c}", "n=1"], "n takes a whole number of at least 2"),
        (["ckpt={c}", "nfe=0"], "nfe takes"),
        (["ckpt={c}", "replicates=1"], "replicates takes a whole number of at least 2"),
        (["ckpt={c}", "steps=3"], "cannot use 'steps=3'"),
        (["ckpt={c}", "network={t}"], "FID needs the weights of its Inception network"),
        (["ckpt={c}", "network=nothing"], "nothing; `python scripts/runs.py list`"),
        (["ckpt={c}", "reference={t}/nothing"], "there is nothing at reference="),
        (["ckpt={c}", "label=each"], "label takes"),
        (["ckpt={c}", "n=5", "label=10"], "classes 0 to 9"),
        (["ckpt=/nowhere.pt"], "there is no file /nowhere.pt"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], sentence: str, tmp_path: Path, capsys, request) -> None:
    found = any("{c}" in word for word in words) and request.getfixturevalue("checkpoint")
    folder = tmp_path / "none"
    folder.mkdir()
    filled = [word.format(c=found, t=folder) for word in words] or ["n=5"]
    assert eval_fid.main(filled) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


@pytest.mark.parametrize("words, sentence", [
    (["images=true"], "images=true writes a .npz"),
    (["images=yes", "out=x.npz"], "images takes"),
    (["out={t}/full/"], "is not empty"),
])  # fmt: skip
def test_an_export_that_cannot_be_is_one_sentence(words: list[str], sentence: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert sample.main(["ckpt=x.pt", *[word.format(t=tmp_path) for word in words]]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_images_of_another_size_are_refused_by_a_classifier(tmp_path: Path) -> None:
    write_arrays(tmp_path / "large.npz", pictures(3, side=16), None)
    results = eval_fid.evaluate([f"samples={tmp_path / 'large.npz'}", f"reference={tmp_path / 'large.npz'}", NETWORK])
    assert results and all(isinstance(result, Absent) for result in results)
    assert "sees images of shape [1, 8, 8]" in results[0].reason  # type: ignore[union-attr]


def test_neighbours_are_the_nearest_training_images_of_the_samples_nearest_to_any(
    tmp_path: Path, monkeypatch, generation
) -> None:
    drawn: list = []
    monkeypatch.setattr("evaluation.report.neighbours_picture", lambda *words: drawn.append(words))
    data = Digits()
    samples = torch.cat([0.5 * torch.randn(30, 1, 8, 8), data.train_states[700:701], data.train_states[3:4] + 0.01])
    samples[4] = float("nan")
    made = generation(data, samples, final=True)
    evaluation = GeneratorEvaluation([], [], {}, 0.0, made, samples)
    assert draw_neighbours(tmp_path / "x.png", evaluation, "x", rows=3, k=2)
    _, images, neighbours, value_range, _ = drawn[0]
    assert images.shape == (3, 1, 8, 8) and neighbours.shape == (6, 1, 8, 8) and value_range == (-1.0, 1.0)
    assert (images[0] == neighbours[0]).all() and (neighbours[0] == data.train_states[700].numpy()).all()
    assert (images[1] == samples[31].numpy()).all() and (neighbours[2] == data.train_states[3].numpy()).all()
    made.final = False
    assert not draw_neighbours(tmp_path / "x.png", evaluation, "x")


class Colours(Classifier):
    """An RGB classifier whose features are the mean of each colour."""

    num_classes = 2

    def features(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def test_a_gray_set_of_rgb_pictures_is_seen_by_an_rgb_classifier(tmp_path: Path) -> None:
    """All pictures gray, as those of a collapsed generator, are read as one channel and shown as three."""
    network = ClassifierFeatures(Colours(), "colours", [3, 8, 8], (0.0, 255.0))
    gray = torch.full((9, 3, 8, 8), 50, dtype=torch.uint8)
    write_arrays(tmp_path / "gray.npz", gray, None)
    images = read_images(tmp_path / "gray.npz")
    assert images.shape == (9, 1, 8, 8) and network.refusal((1, 8, 8)) is None and network.refusal((1, 9, 8)) is not None
    assert torch.equal(network.features(images, torch.device("cpu")), torch.full((9, 3), 50.0))
    scores = scores_between(network, images, pictures(3, 20), tmp_path, torch.device("cpu"))
    assert all(isinstance(score, Score) for score in scores)
