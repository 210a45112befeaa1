"""Pictures from folders: how they are cut, labelled and held out, and what becomes of files that cannot be read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from dataloaders.base_dataloaders import EpochPlan
from dataloaders.image_stream import PictureReader
from dataloaders.stream import Rows
from evaluation.image_sets import read_images
from evaluation.metrics.base_metric import Generation, Score
from evaluation.metrics.nearest import NearestTraining
from tests.dataloaders.streamed import Official, build, folder, pixels_of, refusal


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
    far, nothing = np.full((8, 8), 70_000, np.int32), np.full((8, 8), np.nan)
    bad = {"x.tif": (255 * ramp).astype(np.float32), "y.tif": far, "z.tif": nothing}
    for name, pixels in bad.items():
        Image.fromarray(pixels.astype(np.float32 if pixels.dtype == float else pixels.dtype)).save(tmp_path / name)
    reader = PictureReader(tmp_path, [*kinds, "e.png", "f.png", "g.png", *bad], None, 8, "whole", channels)
    read = reader[Rows(list(range(7)), 0)].stored
    assert (read[:4] == torch.from_numpy(kinds["a.png"])).all() and (read[4:] == 255).all()
    assert reader[Rows([7, 8, 9], 0)].unreadable == [7, 8, 9]
    for file in tmp_path.glob("*.tif"):  # read_images takes none
        file.unlink()
    assert torch.equal(read_images(tmp_path).expand(-1, channels, -1, -1), read[[0, 1, 4, 5, 6]])


def test_pipes_and_circles_of_links_among_pictures_are_passed_over(pictures: Path) -> None:
    """Two links to the folder above make 2^40 paths, and a pipe would be waited for."""
    whole = build("image_folder", {"root": pictures, "size": 8})
    names = [whole.train.name(row) for row in range(len(whole.train))]
    (pictures / names[0]).unlink()
    os.mkfifo(pictures / names[0])
    for name in ("up", "up2"):
        (pictures / Path(names[0]).parent / name).symlink_to(pictures)
    again = build("image_folder", {"root": pictures, "size": 8})
    assert [again.train.name(row) for row in range(len(again.train))] == names
    assert again.train[Rows([0], 0)].unreadable == [0]


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


def test_a_held_out_part_of_one_is_refused_before_anything_is_trained(pictures: Path, tmp_path: Path) -> None:
    assert "has 1 held out" in refusal("image_folder", folder(pictures, held_out_most=1))
    few = tmp_path / "few"
    few.mkdir()
    for k in range(4):
        assert k == 0 or "put 4 or more into" in refusal("image_folder", folder(few))
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
    dataset.kept.seen = None
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
    ({"epoch_size": 5}, "not 5 as dataloaders.epoch_size says; set"),
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
    (lambda place: as_folder(place / "list_eval_partition.txt"), "is not a file"),
    (lambda place: as_folder(place / "list_attr_celeba.txt"), "is not a file"),
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
