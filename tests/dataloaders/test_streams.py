"""Data that streams from disk: what is read, in which order, by whom, and what becomes of files that cannot be read."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.seeds import generator_for
from configuration.compose import compose_config, resolved
from dataloaders.base_dataloaders import EpochPlan, FlowDataset
from dataloaders.image_stream import ImageStream, PictureReader
from dataloaders.latent_cache import LatentCache
from dataloaders.stream import Read, ReadAhead, Reader, Rows, StreamDataset
from evaluation.image_sets import read_images
from evaluation.metrics.base_metric import Generation, Score
from evaluation.metrics.nearest import NearestTraining
from evaluation.parts import build_dataset
from models.vae.stable_diffusion_vae import StableDiffusionVAE
from scripts import cache_latents

ROOT = Path(__file__).resolve().parents[2]
Official = Callable[[str], dict[str, Any]]


class Counting(Reader):
    """Row k is the number k, and the epoch's seed."""

    def __init__(self, count: int, first: int = 0):
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Rows) -> Read:
        stored = torch.tensor([[self.first + number, rows.seed % 1000] for number in rows.numbers]).reshape(-1, 2)
        return Read(stored, stored[:, 0] % 3, [])


class Numbers(StreamDataset):
    """The smallest data set that streams."""

    def __init__(self, count: int, held_out: int = 10):
        super().__init__(Counting(count), Counting(held_out, 1000), [2], 3, None)

    def states(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        return stored.float()


def served(
    dataset: FlowDataset, batch_size: int, start: int = 0, rank: int = 0, world: int = 1, epoch: int = 0
) -> list[list[int]]:
    """The rows of each batch of an epoch."""
    batches = dataset.epoch(EpochPlan(batch_size, generator_for(0, "order", epoch), torch.Generator(), start, rank, world))
    return [x[:, 0].int().tolist() for x, _ in batches]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 20), st.integers(1, 4), st.integers(0, 20), st.integers(1, 4), st.integers(0, 3),
    st.none() | st.integers(1, 70),
)  # fmt: skip
def test_no_row_is_repeated_or_skipped_over_ranks_and_a_resume(
    count: int, batch: int, world: int, stop: int, world_after: int, epoch: int, limit: int | None
) -> None:
    """Batches up to `stop` on so many ranks, the rest on other ones: together each row once, as in one sitting."""
    dataset = Numbers(count)
    dataset.epoch_size = min(count, limit or count)
    whole = served(dataset, batch, epoch=epoch)
    visited = list(chain(*whole))
    assert len(visited) == len(set(visited)) == dataset.epoch_size
    assert len(whole) == dataset.batches_per_epoch(batch)
    before = [served(dataset, batch, 0, rank, world, epoch)[:stop] for rank in range(world)]
    after = [served(dataset, batch, min(stop, len(whole)), rank, world_after, epoch) for rank in range(world_after)]
    for parts, batches in ((before, whole[:stop]), (after, whole[stop:])):
        for number, rows in enumerate(batches):
            assert sorted(chain(*(rank[number] for rank in parts))) == sorted(rows)


def test_epochs_have_different_orders_that_depend_on_the_seed_alone() -> None:
    dataset = Numbers(50)
    first, again, other = (list(chain(*served(dataset, 7, epoch=epoch))) for epoch in (0, 0, 1))
    assert first == again and first != other and sorted(first) == sorted(other)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_serve_what_no_workers_serve_and_a_begun_epoch_can_be_left(workers: int) -> None:
    alone, helped = Numbers(64), Numbers(64)
    helped.num_workers = workers
    global_state = torch.get_rng_state()
    left = helped.epoch(EpochPlan(4, generator_for(0, "order", 5), torch.Generator()))
    next(left), next(left)  # and no more of it
    for epoch in (0, 1):
        assert served(helped, 4, epoch=epoch) == served(alone, 4, epoch=epoch)
        assert served(helped, 4, start=3, rank=1, world=2) == served(alone, 4, start=3, rank=1, world=2)
    assert torch.equal(torch.get_rng_state(), global_state)  # dropout of a resumed run draws from it
    with pytest.raises(AssertionError, match="newer plan"):
        next(left)


def test_more_workers_than_cores_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    ReadAhead(Counting(10), 500)
    assert not recwarn.list


def test_readers_hold_nothing_that_grows_with_use() -> None:
    ahead = ReadAhead(Counting(10), 0)
    assert [read.stored[:, 0].tolist() for read in ahead.batches([Rows([1, 2], 0), Rows([3], 0)])] == [[1, 2], [3]]


# Pictures


def build(name: str, settings: dict[str, Any], *more: str, model: str = "cnn") -> Any:
    words = [f"dataloaders.{key}={value}".replace(" ", "") for key, value in settings.items()]
    config = resolved(
        compose_config(["run_name=x", f"model={model}", f"dataloaders={name}", "num_workers=0", *words, *more])
    )
    return build_dataset(config, torch.device("cpu"))


def refusal(name: str, settings: dict[str, Any], *more: str) -> str:
    with pytest.raises(UserError) as caught:
        build(name, settings, *more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures of 30 x 20 pixels in two classes; the red of each is its number, the green the column."""
    for k in range(12):
        pixels = np.zeros((20, 30, 3), dtype=np.uint8)
        pixels[:, :, 0], pixels[:, :, 1], pixels[:, :, 2] = 20 * k, np.arange(30) * 8, np.arange(20)[:, None] * 8
        (tmp_path / f"class{k % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"class{k % 2}" / f"{k:02d}.png")
    return tmp_path


def folder(root: Path, **more: Any) -> dict[str, Any]:
    return {"root": root, "size": 10, "held_out_fraction": 0.25, "flip": "false"} | more


def pixels_of(dataset: ImageStream, epoch: int = 0, start: int = 0, batch: int = 4) -> tuple[Tensor, Tensor]:
    """All pictures of an epoch as bytes, and their labels."""
    order = generator_for(0, "order", epoch)
    parts = list(dataset.epoch(EpochPlan(batch, order, torch.Generator().manual_seed(0), start)))
    return torch.cat([(x + 1) * 127.5 for x, _ in parts]).round().long(), torch.cat([label for _, label in parts])  # type: ignore[misc]


def test_each_picture_has_the_class_of_its_folder_and_the_split_is_by_class(pictures: Path) -> None:
    dataset = build("image_folder", folder(pictures))
    states, labels = pixels_of(dataset)
    numbers = states[:, 0, 0, 0] // 20
    assert torch.equal(numbers % 2, labels) and len(numbers.unique()) == len(numbers) == 9
    unseen, unseen_labels = dataset.held_out(100, torch.Generator())
    others = ((unseen[:, 0, 0, 0] + 1) * 127.5).round().long() // 20
    assert sorted([*numbers.tolist(), *others.tolist()]) == list(range(12))
    assert torch.equal(others % 2, unseen_labels) and unseen_labels.bincount().min() >= 1


def test_ways_of_cutting(pictures: Path) -> None:
    """Of a picture whose green is its column: which columns are seen, how far apart."""
    green = {}
    for crop in ("resized", "whole", "random"):
        states, _ = pixels_of(build("image_folder", folder(pictures, crop=crop)))
        green[crop] = states[:, 1].float() / 8
    across = {crop: image[0].diff(dim=1).mean().item() for crop, image in green.items()}
    assert abs(across["resized"] - 2) < 0.1 and abs(across["whole"] - 3) < 0.15 and across["random"] == 1
    assert abs(green["resized"].mean() - 14.5) < 0.1 and abs(green["whole"].mean() - 14.5) < 0.1
    assert len(green["random"][:, 0, 0].unique()) > 4


def test_a_random_cut_depends_on_seed_epoch_and_picture_alone(pictures: Path) -> None:
    settings = folder(pictures, crop="random")
    alone, helped = build("image_folder", settings, "num_workers=0"), build("image_folder", settings, "num_workers=2")
    (first, _), (again, _), (other, _) = (pixels_of(alone, epoch) for epoch in (0, 0, 1))
    assert torch.equal(first, again) and torch.equal(pixels_of(helped)[0], first)
    assert torch.equal(pixels_of(alone, start=1)[0], first[4:]) and torch.equal(pixels_of(alone, batch=2)[0], first)
    by_number = [{int(picture[0, 0, 0]): picture for picture in pictures} for pictures in (first, other)]
    assert by_number[0].keys() == by_number[1].keys()
    assert any(not torch.equal(by_number[0][number], by_number[1][number]) for number in by_number[0])


def test_what_is_held_out_of_random_cuts_is_cut_at_random_once_for_all(pictures: Path) -> None:
    """So that it is of the distribution that is learned."""
    settings = folder(pictures, crop="random", held_out_fraction=0.5)
    unseen, again = (build("image_folder", settings).held_out(6, torch.Generator().manual_seed(0))[0] for _ in range(2))
    assert torch.equal(unseen, again) and (unseen[:, 1].diff(dim=2).mean() * 127.5 / 8 - 1).abs() < 1e-3  # at full size
    assert len(unseen[:, 1, 0, 0].unique()) > 2


def test_pictures_without_folders_have_no_labels(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for file in pictures.glob("class*/*.png"):
        shutil.copy(file, tmp_path / "flat")
    dataset = build("image_folder", folder(tmp_path / "flat", channels=1))
    x, label = next(dataset.epoch(EpochPlan(4, torch.Generator(), torch.Generator())))
    assert label is None and x.shape == (4, 1, 10, 10) and dataset.num_classes == 0
    assert "needs labels" in refusal("image_folder", folder(tmp_path / "flat"), "conditional=true")


def test_turned_photographs_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by a quarter, clockwise
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    reader = PictureReader(tmp_path, ["a.png"], None, 8, "resized")
    assert reader[Rows([0], 0)].stored[0, 0].float().mean(0).tolist() == pytest.approx([0] * 4 + [255] * 4, abs=40)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_kind_show_what_they_hold(tmp_path: Path, channels: int) -> None:
    """The same ramp in 8 and 16 bits, whole numbers and fractions; red over nothing, by three kinds of transparency."""
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    kinds = {"a.png": (255 * ramp).round().astype(np.uint8), "b.png": (65535 * ramp).round().astype(np.uint16)}
    kinds |= {"c.tif": kinds["b.png"].astype(np.int32), "d.tif": ramp.astype(np.float32)}
    for name, pixels in kinds.items():
        Image.fromarray(pixels).save(tmp_path / name)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "e.png")
    clear.quantize(2).save(tmp_path / "f.png")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "g.png", transparency=(255, 0, 0))
    bad = {
        "x.tif": (255 * ramp).astype(np.float32),
        "y.tif": np.full((8, 8), 70_000, np.int32),
        "z.tif": np.full((8, 8), np.nan),
    }
    for name, pixels in bad.items():
        Image.fromarray(pixels.astype(np.float32 if pixels.dtype == float else pixels.dtype)).save(tmp_path / name)
    reader = PictureReader(tmp_path, [*kinds, "e.png", "f.png", "g.png", *bad], None, 8, "whole", channels)
    read = reader[Rows(list(range(7)), 0)].stored
    assert (read[:4] == torch.from_numpy(kinds["a.png"])).all() and (read[4:] == 255).all()
    assert reader[Rows([7, 8, 9], 0)].unreadable == [7, 8, 9]
    for file in tmp_path.glob("*.tif"):  # read_images takes none
        file.unlink()
    assert torch.equal(read_images(tmp_path).expand(-1, channels, -1, -1), read[[0, 1, 4, 5, 6]])


def broken(place: Path) -> list[str]:
    """Spoils three pictures: a text, half a file, nothing."""
    files = sorted(place.glob("class*/*.png"))[:9:4]
    files[0].write_text("this is no picture")
    files[1].write_bytes(files[1].read_bytes()[:60])
    files[2].write_bytes(b"")
    return [file.relative_to(place).as_posix() for file in files]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_counted_and_named_in_one_line(pictures: Path, workers: int, capsys: Any) -> None:
    names = broken(pictures)
    dataset = build("image_folder", folder(pictures), f"num_workers={workers}")
    trained_on = [name for name in names if name in [dataset.train.name(row) for row in range(len(dataset.train))]]
    states, labels = pixels_of(dataset)
    assert len(states) == 9 and torch.equal(states[:, 0, 0, 0] // 20 % 2, labels)  # stand-ins bring their own labels
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{len(trained_on)} of 9 pictures" in said and all(name in said for name in trained_on)
    pixels_of(dataset, epoch=1)
    assert capsys.readouterr().out == ""  # known by now


def test_unreadable_held_out_pictures_are_named_and_nothing_stands_in_for_them(pictures: Path, capsys: Any) -> None:
    settings = folder(pictures, held_out_fraction=0.5)
    whole = build("image_folder", settings)
    names = [whole.unseen.name(row) for row in (0, 3)]
    for name in names:
        (pictures / name).write_text("this is no picture")
    dataset = build("image_folder", settings)
    unseen, labels = dataset.held_out(100, torch.Generator())
    numbers = ((unseen[:, 0, 0, 0] + 1) * 127.5 / 20).round().long()
    expected = sorted(int(Path(whole.unseen.name(row)).stem) for row in (1, 2, 4, 5))
    assert sorted(numbers.tolist()) == expected and torch.equal(numbers % 2, labels)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "2 of 6 pictures" in said and all(name in said for name in names)
    x, y = dataset.real_pair(100, 4, torch.Generator())
    assert (len(x), len(y)) == (6, 4) and len(
        {float(row[0, 0, 0]) for row in [*x, *y]}
    ) == 10  # the training ones beside them
    (pictures / whole.unseen.name(1)).write_text("x"), (pictures / whole.unseen.name(2)).write_text("x")
    (pictures / whole.unseen.name(4)).write_text("x")
    with pytest.raises(UserError, match="only 1 of the 6 files"):
        build("image_folder", settings).held_out(100, torch.Generator())


@pytest.mark.parametrize("count, held_out, asked, sides", [
    (40, 10, (5, 4), (5, 4)), (40, 10, (20, 10), (20, 10)), (40, 10, (2000, 10), (40, 10)), (10, 3, (2000, 3), (10, 3)),
    (2, 2, (2000, 2), (2, 2)), (2, 2, (2, 2000), (2, 2)), (3, 4, (2000, 2000), (4, 3)),
])  # fmt: skip
def test_few_held_out_rows_are_one_side_of_a_floor_and_training_rows_the_other(
    count: int, held_out: int, asked: tuple[int, int], sides: tuple[int, int]
) -> None:
    dataset = Numbers(count, held_out)
    for _ in range(2):
        pair = dataset.real_pair(*asked, torch.Generator().manual_seed(0))
        assert tuple(map(len, pair)) == sides and len(torch.cat(pair)[:, 0].unique()) == sum(sides)
    assert sorted(dataset.held_out(100, torch.Generator())[0][:, 0].tolist()) == list(range(1000, 1000 + held_out))
    if sum(sides) <= held_out:
        assert min(torch.cat(pair)[:, 0]) >= 1000  # no training row where there is no need


def test_a_held_out_part_of_one_is_refused_before_anything_is_trained(pictures: Path, tmp_path: Path) -> None:
    assert "has 1 held out" in refusal("image_folder", folder(pictures, held_out_most=1))
    few = tmp_path / "few"
    few.mkdir()
    for k in range(4):
        assert k == 0 or "4 pictures or more" in refusal("image_folder", folder(few))
        shutil.copy(pictures / "class0" / f"{2 * k:02d}.png", few)
    assert len(build("image_folder", folder(few)).unseen) == 2


def test_a_small_folder_is_scored_by_what_it_holds_out(pictures: Path, small_run: Any) -> None:
    """Twelve pictures with the defaults: the energy distance of 2,000 samples, its floor of three against nine."""
    words = [f"dataloaders.{key}={value}" for key, value in (folder(pictures) | {"epoch_size": "null"}).items()]
    words += ["dataloaders=image_folder", "model=cnn", "model.width=8", "model.inner_width=8", "model.embedding=8"]
    words += ["evaluation=generator", "max_steps=1", "solver.steps=1"]
    words += ["evaluation.samples=100", "evaluation.final_samples=200"]
    scores = json.loads((small_run("x", *words) / "runs/x/status.json").read_text())["scores"]
    assert scores["eval/energy_distance_floor_sd"] > 0
    assert scores["eval/copies"] == 0 and scores["eval/nearest_distance_ratio"] > 0


@pytest.mark.parametrize("count", [9, 4])
def test_copies_of_a_folders_pictures_are_found(pictures: Path, tmp_path: Path, count: int) -> None:
    """A model that gives its training pictures back, judged by all nine of them or by four; the note says which."""
    dataset = build("image_folder", folder(pictures))
    samples = dataset.training_part(9)[0].clone()
    dataset.seen = None
    made = Generation(
        objective=None, dataset=dataset, source=None, solver=None, seed=0, dataset_key="pictures", cache=tmp_path,  # type: ignore[arg-type]
        final=False, noise=samples, samples=samples,
    )  # fmt: skip
    ratio, copies, *_ = NearestTraining(points=count).compute(made)
    assert isinstance(ratio, Score) and isinstance(copies, Score)
    assert copies.note.endswith("against 9 training states" if count == 9 else "against 4 of 9 training states")
    assert copies.value == 1 if count == 9 else copies.value <= 1
    assert copies.floor == 0 and (ratio.value == 0 if count == 9 else ratio.value >= 0)


def test_a_folder_of_which_nothing_can_be_read_is_one_sentence(pictures: Path) -> None:
    for file in pictures.glob("class*/*.png"):
        file.write_text("this is no picture")
    dataset = build("image_folder", folder(pictures))
    with pytest.raises(UserError, match="none of the 9 files"):
        pixels_of(dataset)
    with pytest.raises(UserError, match="none of the 3 files"):
        dataset.held_out(3, torch.Generator())


@pytest.mark.parametrize("change, words", [
    ({"root": "/nowhere"}, "no folder /nowhere"),
    ({"size": 0}, "dataloaders.size takes"),
    ({"crop": "square"}, "takes resized, whole or random"),
    ({"channels": 4}, "dataloaders.channels takes 1 or 3"),
    ({"held_out_fraction": 1.5}, "held_out_fraction takes"),
    ({"held_out_root": "/nowhere"}, "no folder /nowhere"),
    ({"num_classes": 3}, "has num_classes=2, not 3"),
    ({"epoch_size": 5}, "leave dataloaders.epoch_size out"),
])  # fmt: skip
def test_image_folder_refuses_in_one_sentence(pictures: Path, change: dict[str, Any], words: str) -> None:
    assert words in refusal("image_folder", folder(pictures) | change)


def test_empty_folders_are_one_sentence(tmp_path: Path) -> None:
    assert "there are no pictures" in refusal("image_folder", folder(tmp_path))
    assert "has no class folders; unpack ILSVRC 2012" in refusal("imagenet_pixels", {"root": tmp_path})


def test_imagenet_holds_out_val_whatever_the_order_of_its_folders(official: Official) -> None:
    dataset = build("imagenet_pixels", official("imagenet_pixels"))
    assert (len(dataset.train), len(dataset.unseen), dataset.num_classes) == (252, 81, 3)
    for reader in (dataset.train, dataset.unseen):
        of = {reader.name(k).partition("/")[0]: int(reader.labels[k]) for k in range(len(reader))}
        assert of == {"n01443537": 0, "n01484850": 1, "n02": 2}


# CelebA


def test_celeba_is_split_by_its_list_and_labelled_by_combinations(official: Official) -> None:
    settings = official("celeba")
    dataset = build("celeba", settings | {"attributes": "[Smiling,Bald]"})
    assert (len(dataset.train), len(dataset.unseen), dataset.num_classes) == (210, 85, 4)
    for reader, first in ((dataset.train, 0), (dataset.unseen, 215)):
        assert reader.name(0) == f"{first + 1:06d}.jpg"
        for row in range(20):  # row k of the file: attribute j is there where bit j of k is 0
            smiling, bald = (first + row) >> 2 & 1 == 0, (first + row) & 1 == 0
            assert int(reader.labels[row]) == smiling + 2 * bald
    assert build("celeba", settings | {"attributes": "[]"}).num_classes == 0
    middle = build("celeba", settings | {"size": 140}).train
    with Image.open(Path(settings["root"]) / "img_align_celeba" / "000001.jpg") as image:
        expected = torch.from_numpy(np.array(image)[39:179, 19:159]).permute(2, 0, 1)
    assert torch.equal(middle[Rows([0], 0)].stored[0], expected)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage, words", [
    (lambda place: (place / "list_eval_partition.txt").unlink(), "list_eval_partition.txt; put"),
    (lambda place: (place / "list_attr_celeba.txt").unlink(), "list_attr_celeba.txt; put"),
    (lambda place: shutil.rmtree(place / "img_align_celeba"), "img_align_celeba; put"),
    (lambda place: as_folder(place / "list_eval_partition.txt"), "there is no file"),
    (lambda place: as_folder(place / "list_attr_celeba.txt"), "there is no file"),
    (lambda place: (place / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg"), "line 2 is"),
    (lambda place: (place / "list_eval_partition.txt").write_text("../../etc/passwd 0\n"), "line 1 is"),
    (lambda place: (place / "list_eval_partition.txt").write_text("000001.jpg 0\n"), "none to hold out"),
    (lambda place: (place / "list_attr_celeba.txt").write_text("<html>"), "not in the official format"),
    (lambda place: (place / "list_attr_celeba.txt").write_text("2\nSmiling\n000001.jpg maybe\n"), "line 3 is"),
    (lambda place: (place / "list_attr_celeba.txt").write_text("1\nSmiling\n000001.jpg 1\n"), "says nothing of 000002.jpg"),
])  # fmt: skip
def test_broken_celeba_is_one_sentence(
    official: Official, tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    place = shutil.copytree(official("celeba")["root"], tmp_path / "celeba")
    damage(place)
    assert words in refusal("celeba", {"root": place})


def test_an_attribute_that_does_not_exist_is_one_sentence(official: Official) -> None:
    message = refusal("celeba", official("celeba") | {"attributes": "[Smiles]"})
    assert "dataloaders.attributes=Smiles is not in" in message and "Bald, Male, Smiling" in message
    assert "names Male twice" in refusal("celeba", official("celeba") | {"attributes": "[Male,Bald,Male]"})


# Cached latents


@pytest.fixture
def cache(official: Official, tmp_path: Path) -> Path:
    """A copy of the small cache, to be changed."""
    return Path(shutil.copytree(official("imagenet")["path"], tmp_path / "latents"))


def words_of(official: Official, out: Path) -> list[str]:
    """The command that made the cache."""
    made = Path(official("imagenet")["path"]).parent
    words = [f"out={out}", "shard_rows=100", "batch_size=50", "num_workers=0", "device=cpu", "dataloaders=imagenet_pixels"]
    return [*words, f"dataloaders.root={made / 'pictures'}", "dataloaders.size=16", f"vae.path={made / 'vae'}"]


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_cached_latents_are_the_autoencoders_own(official: Official, cache: Path) -> None:
    made = cache_of(official)
    vae = StableDiffusionVAE(str(made.parent / "vae"))
    pictures = build("imagenet_pixels", {"root": made.parent / "pictures", "size": 16})
    read = pictures.train[Rows(list(range(252)), 0)]
    means = build("imagenet", {"path": cache, "sample": "false", "flip": "false"})
    x = read.stored.float() / 127.5 - 1
    expected, std = vae.moments(x)
    stored = means.train[Rows(list(range(0, 504, 2)), 0)]
    assert torch.equal(stored.labels, read.labels)
    torch.testing.assert_close(stored.stored[:, 0].float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(stored.stored[:, 1].float(), std, rtol=2e-3, atol=2e-3)
    mirrored = means.train[Rows(list(range(1, 504, 2)), 0)]
    torch.testing.assert_close(mirrored.stored[:, 0].float(), vae.moments(x.flip(3))[0], rtol=2e-3, atol=2e-3)
    assert means.num_classes == 3 and means.state_shape == (4, 2, 2) and len(means.unseen) == 81


def cache_of(official: Official) -> Path:
    return Path(official("imagenet")["path"])


def test_latents_are_drawn_from_their_moments_half_of_them_mirrored(official: Official) -> None:
    dataset = build("imagenet", official("imagenet"))
    assert isinstance(dataset, LatentCache)
    mean, std = torch.full((2000, 4, 2, 2), 1.5), torch.full((2000, 4, 2, 2), 0.25)
    drawn = dataset.states(torch.stack([mean, std], dim=1).half(), torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and abs(drawn.mean() - 1.5) < 0.01 and abs(drawn.std() - 0.25) < 0.01
    numbers = dataset.chosen(torch.arange(2000), torch.Generator().manual_seed(0))
    assert torch.equal(numbers // 2, torch.arange(2000)) and abs((numbers % 2).float().mean() - 0.5) < 0.05
    (first, _), (again, _) = (
        next(dataset.epoch(EpochPlan(9, generator_for(0, "o"), torch.Generator().manual_seed(k)))) for k in (0, 1)
    )
    assert not torch.equal(first, again) and torch.allclose(first, again, atol=20 * float(std.max()))


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_encoding_goes_on_and_ends_the_same(official: Official, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "latents"
    words = words_of(official, out)
    code = f"""
import os, sys
sys.path.insert(0, '.')
from scripts import cache_latents
add = cache_latents.Cache.add
def once(self, *shard):
    add(self, *shard)
    (self.folder / '.train-00001.npy.99.tmp').write_bytes(b'half')
    os.kill(os.getpid(), 9)
cache_latents.Cache.add = once
cache_latents.main({words!r})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -9
    assert {path.suffix for path in out.iterdir()} == {".npy", ".json", ".tmp"}
    assert "is not finished; give the command that began it again" in refusal("imagenet", {"path": out})
    before = (out / "train-00000.npy").stat().st_mtime_ns
    assert cache_latents.main(words) == 0
    assert (out / "train-00000.npy").stat().st_mtime_ns == before  # not made again
    assert contents(out) == contents(cache_of(official))
    assert cache_latents.main([f"out={out}", "verify=true"]) == 0 and "every checksum right" in capsys.readouterr().out


def test_damage_is_found_and_mended(official: Official, cache: Path, capsys: Any) -> None:
    whole, shard = contents(cache), cache / "train-00001.npy"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    (cache / "held_out-00000-labels.npy").unlink()
    assert "held_out-00000-labels.npy is missing or cut short; repeat the command" in refusal("imagenet", {"path": cache})
    assert cache_latents.main([f"out={cache}", "verify=true"]) == 1
    said = capsys.readouterr().err
    assert "2 of 8 files" in said and "train-00001.npy" in said and "held_out-00000-labels.npy" in said
    assert "delete those that are there, then repeat the command" in said
    shard.unlink()
    assert "is missing or cut short" in refusal("imagenet", {"path": cache})
    assert cache_latents.main(words_of(official, cache)) == 0
    assert contents(cache) == whole


def test_pictures_that_cannot_be_read_are_left_out_of_a_cache(official: Official, tmp_path: Path, capsys: Any) -> None:
    made = cache_of(official).parent
    place = shutil.copytree(made / "pictures", tmp_path / "pictures")
    (place / "train" / "n02" / "n02_3.JPEG").write_text("no picture")
    words = [w for w in words_of(official, tmp_path / "latents") if not w.startswith("dataloaders.root")]
    assert cache_latents.main([*words, f"dataloaders.root={place}"]) == 0
    assert "1 pictures cannot be read and were left out: n02/n02_3.JPEG" in capsys.readouterr().out
    dataset = build("imagenet", {"path": tmp_path / "latents"})
    assert len(dataset.train) == 251 and dataset.train.labels.bincount().tolist() == [84, 84, 83]


def test_a_cache_of_pictures_that_have_changed_is_left_alone(official: Official, cache: Path, capsys: Any) -> None:
    """Killed before its end, it would else go on with a picture that is both trained on and held out."""
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["made_from"]["files"] = {"count": 332, "blake2b": "of one picture less"}
    (cache / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    (cache / "train-00001.npy").unlink()
    before = contents(cache)
    assert cache_latents.main(words_of(official, cache)) == 1
    said = capsys.readouterr().err
    assert "the pictures are not those that out=" in said and "(332 then, 333 now;" in said and said.count("\n") == 1
    assert contents(cache) == before


def test_what_tells_one_set_of_pictures_from_another(pictures: Path) -> None:
    """A name, a size in bytes, a class and a part; not when or in which order it was written."""

    def state() -> dict[str, Any]:
        return cache_latents.files_of(build("image_folder", folder(pictures, held_out_fraction=fraction)))

    fraction, found = 0.25, []
    file, other = pictures / "class0" / "00.png", pictures / "class1" / "00.png"
    for change in (
        lambda: None,
        lambda: shutil.copy(file, pictures / "class0" / "99.png"),
        lambda: file.write_bytes(file.read_bytes() + b" "),
        lambda: file.rename(other),
    ):
        change()
        found.append(state())
        os.utime(pictures / "class1" / "01.png", (0, 0))
        assert state() == found[-1]
    fraction = 0.5
    assert len({each["blake2b"] for each in [*found, state()]}) == 5
    assert [each["count"] for each in found] == [12, 13, 13, 13]


@pytest.mark.parametrize("words, sentence", [
    ([], "out is missing"),
    (["out={out}", "rows=3"], "cannot use 'rows=3'"),
    (["out={out}", "shard_rows=0"], "shard_rows takes a whole number of at least 1"),
    (["out={out}", "verify=true"], "to verify"),
    (["out={out}", "verify=yes"], "verify takes true or false"),
    (["out={out}", "dataloaders=kmeans"], "dataloaders=kmeans has no coloured pictures"),
])  # fmt: skip
def test_the_script_refuses_in_one_sentence(words: list[str], sentence: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert cache_latents.main([word.format(out=out) for word in words] or ["verify=false"]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not out.exists()


def test_a_folder_of_other_things_is_never_written_to(official: Official, cache: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    assert cache_latents.main(words_of(official, other)) == 1 and "holds other things" in capsys.readouterr().err
    before = contents(cache)
    assert cache_latents.main([w.replace("shard_rows=100", "shard_rows=50") for w in words_of(official, cache)]) == 1
    assert "made with another shard_rows" in capsys.readouterr().err and contents(cache) == before


@pytest.mark.parametrize("text, words", [
    (None, "there are no cached latents in"),
    ("{", "is no manifest"),
    (json.dumps({"finished": True}), "is no manifest"),
    (json.dumps({"finished": False, "shards": []}), "is not finished"),
])  # fmt: skip
def test_a_folder_that_is_no_cache_is_one_sentence(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    assert words in refusal("imagenet", {"path": tmp_path})


def test_encoding_on_the_fly_needs_an_autoencoder(official: Official) -> None:
    settings = {key: value for key, value in official("imagenet_encoded").items() if key != "vae"}
    assert "add vae=stable_diffusion vae.path=<folder>" in refusal("imagenet_encoded", settings)


@pytest.mark.slow
@pytest.mark.process
def test_a_run_on_streamed_pictures_resumes_in_the_middle_of_an_epoch(
    official: Official, small_run: Any, tmp_path: Path
) -> None:
    """With workers, random cuts and mirroring: the weights of a run stopped and resumed are those of one sitting."""
    settings = official("image_folder")
    words = ["dataloaders=image_folder", "model=cnn", "model.dropout=0.1", "dataloaders.crop=random", "batch_size=32"]
    words += ["model.width=8", "model.inner_width=8", "model.inner_blocks=1", "model.embedding=8"]
    words += [f"dataloaders.{key}={value}" for key, value in settings.items()]
    words += ["dataloaders.epoch_size=null", "num_workers=2", "epochs=3", "schedule=constant"]
    small_run("x", *words, "max_steps=11", output="whole")
    with contextlib.suppress(SystemExit):
        small_run("x", *words, "max_steps=4", output="parts")
    small_run("x", "resume=true", "max_steps=11", "num_workers=1", output="parts")
    saved = [
        torch.load(tmp_path / place / "ckpts/cnn/x_last.pt", weights_only=True)["network"] for place in ("whole", "parts")
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
