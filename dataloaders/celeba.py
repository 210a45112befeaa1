"""CelebA: faces, aligned, with forty attributes (Liu et al. 2015, arXiv 1411.7766)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Unpack

from common.errors import UserError
from common.files import require
from common.ranges import Count, Range, Size
from dataloaders.augmentation import ImageOptions
from dataloaders.download import unfit
from dataloaders.image_stream import ImageStream, PictureReader
from dataloaders.picture_files import attribute_classes
from dataloaders.stream import some_rows

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
        centre: Annotated[int, Range(1, 178)] = 140,
        attributes: Sequence[str] = ("Smiling",),
        held_out_most: Count = 10_000,
        **options: Unpack[ImageOptions],
    ):
        """centre: pixels a side of the middle that is kept. attributes: names as in list_attr_celeba.txt, at most 10.

        UserError for files that are missing or unfit, and for an attribute that does not exist.
        """
        place = Path(root).expanduser()
        require_files(place, bool(attributes))
        parts = read_parts(place / PARTS)
        labels = read_labels(place / ATTRIBUTES, attributes) if attributes else None
        readers = []
        for part in ("0", "2"):
            names = [name for name, its_part in parts.items() if its_part == part]
            numbers = None if labels is None else [label_of(name, labels, place / ATTRIBUTES) for name in names]
            readers.append(PictureReader(place / PICTURES, names, numbers, size, "resized", centre=centre))
        train, unseen = readers
        if not (len(train) and len(unseen)):
            raise unfit(place / PARTS, "it names no pictures to train on (0) or none to hold out (2)")
        chosen = some_rows(len(unseen), held_out_most)
        super().__init__(train, unseen.subset(chosen), attribute_classes(attributes), **options)
        self.class_names = combinations(attributes) if attributes else None


def require_files(place: Path, labelled: bool) -> None:
    """Raise UserError unless the folder of pictures and the lists that are needed are there."""
    lists = f"{PARTS} and {ATTRIBUTES} of CelebA (mmlab.ie.cuhk.edu.hk/projects/CelebA.html)"
    remedy = f"put the folder of img_align_celeba.zip, {lists} into {place}"
    for name in (PICTURES, PARTS, *([ATTRIBUTES] if labelled else [])):
        require(place / name, remedy, "folder" if name == PICTURES else "file")


def read_parts(file: Path) -> dict[str, str]:
    """Return which part, 0 to 2, each picture belongs to. UserError for a line of another form."""
    parts: dict[str, str] = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        match line.split():
            case []:
                continue
            case [name, ("0" | "1" | "2") as part] if not (set(name) & {"/", "\\"} or name.startswith(".")):
                parts[name] = part
            case _:
                raise unfit(file, f"line {number} is not a picture and its part (0, 1 or 2), {line[:40]!r}")
    return parts


def read_labels(file: Path, attributes: Sequence[str]) -> dict[str, int]:
    """Return each picture's combination of the attributes: the sum of 2^k over those present. UserError for unfit files."""
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
        if words and (len(words) != 1 + len(names) or not set(words[1:]) <= {"1", "-1"}):
            raise unfit(file, f"line {number} is not a picture and {len(names)} times 1 or -1, {line[:40]!r}")
        if words:
            labels[words[0]] = sum(2**k for k, column in enumerate(columns) if words[column] == "1")
    return labels


def label_of(name: str, labels: dict[str, int], file: Path) -> int:
    """Return the label of a picture. UserError when the file does not list it."""
    if name not in labels:
        raise unfit(file, f"it says nothing of {name}")
    return labels[name]


def combinations(attributes: Sequence[str]) -> list[str]:
    """Return the name of each label of read_labels, such as "Male, not Smiling"."""
    named = lambda label: (name if label >> k & 1 else f"not {name}" for k, name in enumerate(attributes))  # noqa: E731
    return [", ".join(named(label)) for label in range(2 ** len(attributes))]
