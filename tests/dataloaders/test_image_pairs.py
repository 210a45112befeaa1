"""Pictures drawn from pictures: which is whose, what is done to both alike, and every mistake in a sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.base_dataloaders import EpochPlan
from tests.dataloaders.streamed import build, refusal


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Any]:
    """Sixteen pictures in two classes, no two alike; the condition of each is its negative, grey, in another format."""
    for k in range(16):
        pixels = np.full((12, 20, 3), 10 * k, dtype=np.uint8)
        pixels[:, :10] += 40
        for root, suffix, shown in (("x", ".png", pixels), ("y", ".bmp", 255 - pixels)):
            file = tmp_path / root / f"class{k % 2}" / f"{k:02d}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shown).save(file)
    roots = {"root": tmp_path / "x", "condition_root": tmp_path / "y"}
    return roots | {"size": 8, "condition_channels": 1, "held_out_fraction": 0.25}


@pytest.mark.parametrize("workers", [0, 1])
def test_each_picture_keeps_its_condition_through_order_flips_and_shifts(pairs: dict[str, Any], workers: int) -> None:
    dataset = build("image_pairs", pairs | {"crop_padding": 2}, f"num_workers={workers}", "conditional=true")
    assert (dataset.condition_shape, dataset.num_classes, dataset.epoch_size) == ((1, 8, 8), 2, 12)
    parts = [*dataset.epoch(EpochPlan(5, torch.Generator(), torch.Generator())), dataset.held_out(4, torch.Generator())]
    for x, label in parts:
        condition = label[:, 2:].reshape(-1, 1, 8, 8)
        outside = (x[:, :1] == -1) & (condition == -1)  # black that came in from beyond the edges
        assert ((x[:, :1] + condition).abs()[~outside] < 0.02).all() and (label[:, 1] == 1).all()
        brightest = x[:, 0].amax((1, 2))
        assert ((brightest * 127.5 + 127.5 - 40) / 10 % 2).round().tolist() == label[:, 0].tolist()
    mirrored = [bool(row[0, 4, 2] < row[0, 4, 5]) for x, _ in parts[:-1] for row in x]
    assert 0 < sum(mirrored) < 12 and not (parts[-1][0][:, 0, 4, 1] < parts[-1][0][:, 0, 4, 6]).any()


def test_a_pair_of_which_one_cannot_be_read_is_replaced(pairs: dict[str, Any]) -> None:
    (pairs["condition_root"] / "class0" / "12.bmp").write_bytes(b"no picture")  # the last of its class to train on
    dataset = build("image_pairs", pairs | {"held_out_fraction": 0.13}, "conditional=true")
    x, label = next(dataset.epoch(EpochPlan(14, torch.Generator(), torch.Generator())))
    value = (x[:, 0].amax((1, 2)) * 127.5 + 87.5) / 10
    assert len(x) == 14 and len(dataset.unreadable) == 1 and (value - 12).abs().min() > 0.5
    assert torch.equal(value.round() % 2, label[:, 0])


def test_pictures_without_a_partner_are_named(pairs: dict[str, Any]) -> None:
    wrong = {"condition_root": pairs["condition_root"] / "none"}
    assert "there is no folder" in refusal("image_pairs", pairs | wrong)
    (pairs["condition_root"] / "class1" / "03.bmp").rename(pairs["condition_root"] / "class1" / "99.bmp")
    assert "1 of the 16 pictures" in (said := refusal("image_pairs", pairs)) and "class1/03.png" in said
    for suffix in (".png", ".bmp"):
        Image.new("L", (8, 8)).save(pairs["condition_root"] / "class1" / f"03{suffix}")
    assert "differ in their suffix alone" in refusal("image_pairs", pairs)


def test_one_folder_can_be_both_to_colour_what_is_grey(pairs: dict[str, Any]) -> None:
    for file in pairs["root"].rglob("*.png"):  # no two columns alike: they tell how both are cut
        Image.fromarray(np.tile(np.arange(20, dtype=np.uint8)[:, None] * 12, (12, 1, 3))).save(file)
    dataset = build("image_pairs", pairs | {"condition_root": pairs["root"], "flip": "false", "crop": "whole"})
    x, label = dataset.held_out(4, torch.Generator())
    assert x.min() < -0.9 and x.max() > 0.7
    assert torch.allclose(x.mean(1).flatten(1), label[:, 2:], atol=0.02) and x.shape[1] == 3
