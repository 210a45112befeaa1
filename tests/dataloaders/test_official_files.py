"""Data sets in their official formats: what is read from small files like them, and what is said of broken ones."""

import bz2
import gzip
import hashlib
import http.server
import lzma
import os
import pickle
import shutil
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from dataloaders.cifar import Cifar
from dataloaders.photos import CELL, SIDE, Photos, legal_places
from dataloaders.plain_pickle import read_pickled
from tests.conftest import write_archive
from tests.dataloaders.streamed import Official, build, refusal

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


# CIFAR


@pytest.fixture
def archive(official: Official, tmp_path: Path) -> Path:
    """A small cifar-10-python.tar.gz, to be changed."""
    return Path(shutil.copy(Path(official("cifar10")["root"]) / "cifar-10-python.tar.gz", tmp_path))


def settings_of(archive: Path, **more: Any) -> dict[str, Any]:
    return {"root": archive.parent, "md5": None, "flip": "false"} | more


@pytest.mark.parametrize("name", FOLDERS)
def test_cifar_is_what_the_files_hold_and_the_test_part_is_held_out(name: str, official: Official, tmp_path: Path) -> None:
    """By another reader: Python's own, which these harmless files may have."""
    settings = official(name)
    with tarfile.open(next(Path(settings["root"]).glob("*.gz"))) as opened:
        opened.extractall(tmp_path, filter="data")
    from_archive, from_folder = build(name, settings), build(name, settings | {"root": tmp_path})
    for dataset in (from_archive, from_folder):
        assert isinstance(dataset, Cifar) and dataset.states.dtype == torch.uint8
        for part, states, labels in (
            ("train", dataset.train_states, dataset.train_labels),
            ("test", dataset.held_out_states, dataset.held_out_labels),
        ):
            files = [f"data_batch_{k}" for k in range(1, 6)] if (name, part) == ("cifar10", "train") else [part]
            files = ["test_batch"] if (name, part) == ("cifar10", "test") else files
            batches = [pickle.loads((tmp_path / FOLDERS[name] / f).read_bytes(), encoding="bytes") for f in files]
            pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
            key = b"labels" if name == "cifar10" else b"fine_labels"
            assert np.allclose(states.numpy(), pixels / 127.5 - 1, atol=1e-6)
            assert labels is not None and labels.tolist() == [label for batch in batches for label in batch[key]]


def test_cifar100_also_has_its_superclasses(official: Official) -> None:
    dataset = build("cifar100", official("cifar100"), "dataloaders.label_key=coarse_labels", "dataloaders.num_classes=20")
    fine = build("cifar100", official("cifar100"))
    assert torch.equal(dataset.labels, fine.labels // 5) and dataset.num_classes == 20


@pytest.mark.parametrize(
    ("name", "words", "names"),
    [("cifar10", [], [f"labe of kind {k}" for k in range(10)]),
     ("cifar100", [], [f"fine of kind {k}" for k in range(100)]),
     ("cifar100", ["label_key=coarse_labels", "num_classes=20"], [f"coar of kind {k}" for k in range(20)]),
     ("image_folder", [], ["a", "b"]), ("imagenet_pixels", [], ["n01443537", "n01484850", "n02"]),
     ("celeba", [], ["not Smiling", "Smiling"]),
     ("celeba", ["attributes=[Male,Bald]"], ["not Male, not Bald", "Male, not Bald", "not Male, Bald", "Male, Bald"]),
     ("celeba", ["attributes=[]"], None), ("digits", [], None)],
)  # fmt: skip
def test_classes_have_the_names_that_the_files_give(
    name: str, words: list[str], names: list[str] | None, official: Official
) -> None:
    assert build(name, official(name), *(f"dataloaders.{word}" for word in words)).class_names == names


def test_without_a_meta_file_classes_are_numbers(archive: Path) -> None:
    rewrite(archive, lambda members: members.__delitem__("cifar-10-batches-py/batches.meta"))
    assert build("cifar10", settings_of(archive)).class_names is None


def test_a_missing_archive_is_one_sentence_that_says_which_file_goes_where(tmp_path: Path) -> None:
    message = refusal("cifar10", {"root": tmp_path})
    assert "put cifar-10-python.tar.gz from https://" in message and str(tmp_path) in message
    assert "cifar-10-batches-py" in message and "dataloaders.download=true" in message


def test_an_archive_with_another_checksum_is_refused(archive: Path) -> None:
    message = refusal("cifar10", {"root": archive.parent})
    assert "its MD5 sum is" in message and "c58f30108f718f92721af3b95e74349a" in message
    right = hashlib.md5(archive.read_bytes()).hexdigest()
    assert build("cifar10", settings_of(archive, md5=right)).epoch_size == 250


@pytest.mark.parametrize("bytes_left", [0, 100, 200_000])
def test_a_truncated_archive_is_one_sentence(archive: Path, bytes_left: int) -> None:
    archive.write_bytes(archive.read_bytes()[:bytes_left])
    message = refusal("cifar10", settings_of(archive))
    assert "cannot be read to its end" in message and "\n" not in message


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_header_that_asks_for_gigabytes_is_refused_unread(
    kind: bytes, compress: Callable[[bytes], bytes], archive: Path
) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 2**33
    archive.write_bytes(compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096)))
    message = refusal("cifar10", settings_of(archive))
    assert "it asks for 8,589,934,592 bytes at once" in message and "\n" not in message


def test_an_unpacked_file_that_is_huge_is_not_read(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(archive.parent, filter="data")
    os.truncate(archive.parent / FOLDERS["cifar10"] / "data_batch_1", 2**40)
    assert "1,099,511,627,776 bytes" in refusal("cifar10", settings_of(archive))


def rewrite(archive: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change the members of an archive."""
    with tarfile.open(archive) as opened:
        members = {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]
    change(members)
    write_archive(archive, members)


BATCH = "cifar-10-batches-py/data_batch_3"


@pytest.mark.parametrize("content, words", [
    (b"not a pickle", "not in the official format: "),
    (b"", "not in the official format: "),
    (pickle.dumps([1, 2]), "holds no dictionary"),
    (pickle.dumps({"labels": [1]}), "holds no pictures"),
    (pickle.dumps({"data": np.zeros((2, 3000), np.uint8), "labels": [1, 2]}, protocol=2), "holds no pictures"),
    (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [1, 2]}, protocol=2), "not one of bytes"),
    (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, protocol=2), "has no `labels` below"),
    (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}, protocol=2), "has no `labels` below"),
])  # fmt: skip
def test_a_broken_batch_is_one_sentence_that_names_it(archive: Path, content: bytes, words: str) -> None:
    rewrite(archive, lambda members: members.update({BATCH: content}))
    message = refusal("cifar10", settings_of(archive))
    assert words in message and "data_batch_3" in message


def test_a_missing_batch_is_named(archive: Path, tmp_path: Path) -> None:
    rewrite(archive, lambda members: members.pop(BATCH) and None)
    assert "has no data_batch_3; delete it, then put" in refusal("cifar10", settings_of(archive))
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    assert "has no data_batch_3; put" in refusal("cifar10", settings_of(archive))


class Command:
    """What a hostile pickle does on being read."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("function", [Path.touch, exec, np.load], ids=lambda f: f.__name__)
def test_a_hostile_pickle_is_refused_and_nothing_runs(archive: Path, function: Any, protocol: int) -> None:
    canary = archive.with_name("canary")
    argument = canary if function is Path.touch else f"open({str(canary)!r}, 'w')"
    hostile = pickle.dumps({"data": Command(function, argument), "labels": []}, protocol=protocol)
    rewrite(archive, lambda members: members.update({BATCH: hostile}))
    message = refusal("cifar10", settings_of(archive))
    assert "not in the official format: UnpicklingError: it names" in message and not canary.exists()


def test_a_pickle_cannot_misuse_the_names_that_are_known() -> None:
    for value in (Command(np.ndarray, (10**9,)), Command(np.dtype, "O"), np.zeros(3), np.array([object()])):
        with pytest.raises(UserError):
            read_pickled(pickle.dumps([value], protocol=2), Path("x"))
    tuples: tuple[Any, ...] = ()
    for _ in range(60):
        tuples = (tuples, tuples)  # each hashed twice as long as the one before
    counted = b"\x80\x02}r" + struct.pack("<I", 2**31) + b"."
    for content in (pickle.dumps({"x": tuples}, protocol=2), pickle.dumps({"x": tuples}, protocol=4), counted):
        with pytest.raises(UserError, match=r"it repeats a tuple|more values than it holds"):
            read_pickled(content, Path("x"))
    lying = pickle.dumps({"data": np.zeros((4, 5), np.uint8)}, protocol=2).replace(b"K\x04K\x05", b"K\x7fK\x7f")
    with pytest.raises(UserError, match="not one of bytes"):
        read_pickled(lying, Path("x"))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_member_that_is_a_link_or_claims_to_be_huge_is_not_read(archive: Path, kind: bytes) -> None:
    header = tarfile.TarInfo(f"{FOLDERS['cifar10']}/data_batch_1")
    header.type, header.size = kind, 2**40 if kind == tarfile.REGTYPE else 0
    header.linkname = "" if kind == tarfile.REGTYPE else str(archive)
    archive.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    message = refusal("cifar10", settings_of(archive))
    assert ("1,099,511,627,776 bytes" if kind == tarfile.REGTYPE else "has no data_batch_1") in message


def test_an_archive_writes_nothing_outside_or_inside_its_folder(archive: Path) -> None:
    def add(members: dict[str, bytes]) -> None:
        members |= {"../outside": b"x", str(archive.with_name("absolute")): b"x"}

    rewrite(archive, add)
    assert build("cifar10", settings_of(archive)).epoch_size == 250
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]
    assert not (archive.parent.parent / "outside").exists()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a web server on this machine and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: Any) -> None: ...

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", folder
    running.shutdown()
    running.server_close()


def test_a_download_appears_whole_or_not_at_all(archive: Path, server: tuple[str, Path], tmp_path: Path) -> None:
    address, served = server
    shutil.copy(archive, served)
    right = hashlib.md5(archive.read_bytes()).hexdigest()
    place = tmp_path / "new" / "place"
    settings = {"root": place, "url": f"{address}/{archive.name}", "download": "true"}
    assert "its MD5 sum is" in refusal("cifar10", settings | {"md5": "0" * 32})
    assert list(place.iterdir()) == []
    assert "cannot be fetched (HTTP Error 404" in refusal("cifar10", settings | {"url": f"{address}/elsewhere.gz"})
    assert "is no web address" in refusal("cifar10", settings | {"url": f"file://{archive}"})
    assert list(place.iterdir()) == []
    assert build("cifar10", settings | {"md5": right}).epoch_size == 250
    assert (place / archive.name).read_bytes() == archive.read_bytes() and len(list(place.iterdir())) == 1


def test_without_a_network_a_download_is_one_sentence(tmp_path: Path) -> None:
    settings = {"root": tmp_path, "url": "http://127.0.0.1:9/x.gz", "download": "true"}
    assert "cannot be fetched" in refusal("cifar10", settings) and not list(tmp_path.iterdir())


# Photos


def test_no_training_piece_touches_a_held_out_cell_and_held_out_pieces_lie_inside_one() -> None:
    """By painting every place on the photograph."""
    train, held_out = legal_places((427, 640))
    painted = {}
    for name, corners in (("train", train), ("held_out", held_out)):
        painted[name] = np.zeros((427, 640), dtype=bool)
        for row, column in corners:
            painted[name][row : row + SIDE, column : column + SIDE] = True
    assert not (painted["train"] & painted["held_out"]).any()
    cells = [painted["held_out"][i : i + CELL, j : j + CELL] for i in range(0, 427, CELL) for j in range(0, 640, CELL)]
    whole = [cell for cell in cells if cell.shape == (CELL, CELL)]
    assert 0.15 < np.mean([cell.all() for cell in whole]) < 0.25 and all(cell.all() or not cell.any() for cell in whole)
    assert len(train) > 100_000 and len(held_out) > 5_000


def test_photos_are_pieces_of_the_photographs_the_same_in_every_run() -> None:
    from sklearn.datasets import load_sample_images

    first, again = Photos(crops=40, held_out_crops=10), Photos(crops=40, held_out_crops=10)
    assert torch.equal(first.states, again.states) and first.labels is not None
    view = np.lib.stride_tricks.sliding_window_view
    windows = [view(image, (SIDE, SIDE), axis=(0, 1)) for image in load_sample_images().images]
    for piece, label in zip(first.states.numpy()[:6], first.labels.tolist()[:6], strict=True):
        corner = (windows[label][:, :, :, 0, 0] == piece[:, 0, 0]).all(axis=2)
        assert any((windows[label][row, column] == piece).all() for row, column in np.argwhere(corner))
    assert first.labels[:40].bincount().tolist() == [20, 20] and len(first.states.flatten(1).unique(dim=0)) == 50


@pytest.mark.parametrize("wrong", ["crops=1", "crops=1000000", "held_out_crops=100000", "augment=2", "crop_padding=-1"])
def test_photos_refuse_what_they_cannot_give(wrong: str) -> None:
    assert f"dataloaders.{wrong.partition('=')[0]} takes" in refusal("photos", {}, f"dataloaders.{wrong}")
