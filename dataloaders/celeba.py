"""CelebA: faces, aligned, with forty attributes (Liu et al. 2015, arXiv 1411.7766)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from common.errors import UserError
from common.ranges import Count, EpochSize, Size, SizeOr0
from dataloaders.augmentation import AugmentationOptions
from dataloaders.image_stream import ImageStream, PictureReader, require_crop
from dataloaders.picture_files import attribute_classes

PICTURES, PARTS, ATTRIBUTES = "img_align_celeba", "list_eval_partition.txt", "list_attr_celeba.txt"


class CelebA(ImageStream):
    """Aligned faces of 178 x 218 pixels, their middle cut out and resized; part 0 is trained on, part 2 (test) held out.

    The label is the combination of the chosen attributes: of two, 0 for neither, 1 for the first, 2 for the second, 3 for
    both. Part 1 (validation) is left alone.
    """

    def __init__(
        self,
        root: str,
        size: Size,
        num_classes: SizeOr0,
        state_shape: Sequence[Count],
        centre: Size = 140,
        attributes: Sequence[str] = ("Smiling",),
        held_out_most: Count = 10_000,
        epoch_size: EpochSize | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
        **augmentation: Unpack[AugmentationOptions],
    ):
        """centre: pixels a side of the middle that is kept. attributes: names as in list_attr_celeba.txt, at most 10.

        UserError for files that are missing or unfit, and for an attribute that does not exist.
        """
        require_crop(size, "resized", 3)
        if not isinstance(centre, int) or not 1 <= centre <= 178:
            raise UserError(f"dataloaders.centre takes 1 to 178 pixels, as wide as the pictures are, not {centre}")
        place = Path(root).expanduser()
        for name in (PICTURES, PARTS, *([ATTRIBUTES] if attributes else [])):
            file, kind = (place / name).absolute(), "folder" if name == PICTURES else "file"
            if not (file.is_dir() if kind == "folder" else file.is_file()):
                raise UserError(
                    f"there is no {kind} {file}; put the folder of img_align_celeba.zip, {PARTS} and {ATTRIBUTES} of CelebA "
                    f"(mmlab.ie.cuhk.edu.hk/projects/CelebA.html) into {place}"
                )
        parts = read_parts(place / PARTS)
        labels = read_labels(place / ATTRIBUTES, list(attributes)) if attributes else None
        readers = [reader_of(place, [n for n, p in parts.items() if p == part], labels, size, centre) for part in (0, 2)]
        chosen = np.sort(np.random.RandomState(0).permutation(len(readers[1]))[:held_out_most])
        super().__init__(
            readers[0], readers[1].subset(chosen, "resized"), state_shape=state_shape, num_classes=num_classes,
            classes=attribute_classes(attributes), value_range=value_range, epoch_size=epoch_size, **augmentation,
        )  # fmt: skip
        self.class_names = combinations(attributes) if attributes else None


def reader_of(place: Path, names: list[str], labels: dict[str, int] | None, size: int, centre: int) -> PictureReader:
    """Return a reader of the named pictures. UserError when there are none, or one has no label."""
    if not names:
        raise UserError(f"{place / PARTS} names no pictures to train on (0) or none to hold out (2)")
    unknown = [name for name in names if labels is not None and name not in labels]
    if unknown:
        raise UserError(f"{place / ATTRIBUTES} says nothing of {unknown[0]}; fetch it again")
    return PictureReader(
        place / PICTURES, names, None if labels is None else [labels[name] for name in names], size, "resized", centre=centre
    )


def read_parts(file: Path) -> dict[str, int]:
    """Return which part, 0 to 2, each picture belongs to. UserError for a line of another form."""
    parts = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        match line.split():
            case []:
                continue
            case [name, ("0" | "1" | "2") as part] if safe(name):
                parts[name] = int(part)
            case _:
                raise UserError(f"line {number} of {file} is not a picture and its part (0, 1 or 2): {line[:40]!r}")
    return parts


def read_labels(file: Path, attributes: list[str]) -> dict[str, int]:
    """For each picture the combination of the attributes: the sum of 2^k over those present. UserError for unfit files."""
    lines = file.read_text(errors="replace").splitlines()
    names = lines[1].split() if len(lines) > 1 else []
    for attribute in attributes:
        if attribute not in names:
            known = ", ".join(names) or "none: it is not in the official format"
            raise UserError(f"dataloaders.attributes={attribute} is not in {file}; it has {known}")
    columns = [1 + names.index(attribute) for attribute in attributes]
    labels = {}
    for number, line in enumerate(lines[2:], 3):
        words = line.split()
        if not words:
            continue
        if len(words) != 1 + len(names) or not set(words[1:]) <= {"1", "-1"}:
            raise UserError(f"line {number} of {file} is not a picture and {len(names)} times 1 or -1: {line[:40]!r}")
        labels[words[0]] = sum(2**k for k, column in enumerate(columns) if words[column] == "1")
    return labels


def combinations(attributes: Sequence[str]) -> list[str]:
    """Return the name of each label of read_labels, such as "Male, not Smiling"."""
    return [
        ", ".join(name if label >> k & 1 else f"not {name}" for k, name in enumerate(attributes))
        for label in range(2 ** len(attributes))
    ]


def safe(name: str) -> bool:
    """Whether it names a file in the pictures' own folder."""
    return "/" not in name and "\\" not in name and not name.startswith(".")
