"""Any tree of pictures, and ImageNet's among them."""

from pathlib import Path
from typing import Literal, Unpack

import numpy as np

from common.errors import UserError
from common.ranges import Count, Inside, Size
from dataloaders.augmentation import ImageOptions
from dataloaders.image_stream import Crop, ImageStream, PictureReader
from dataloaders.picture_files import class_folders, imagenet_classes, list_pictures
from dataloaders.stream import some_rows
from dataloaders.tensor_dataset import stratified_rows

FEWEST = 4  # pictures of which a part is held out: two on each side


class ImageFolder(ImageStream):
    """Pictures below a folder; the folders in it are the classes, or there are none where pictures lie in it directly.

    A share of each class is held out, the same files in every run, or another tree of the same classes.
    """

    def __init__(
        self,
        root: str,
        size: Size,
        crop: Crop = "resized",
        channels: Literal[1, 3] = 3,
        held_out_fraction: Inside = 0.1,
        held_out_root: str | None = None,
        held_out_most: Count = 10_000,
        standardize: bool = False,
        **options: Unpack[ImageOptions],
    ):
        """size, crop, channels: see PictureReader. held_out_most: pictures that are kept in memory to evaluate on.

        UserError for folders that are missing or differ, and for unfit values.
        """
        place = Path(root).expanduser()
        classes = class_folders(place)
        train = unseen = labelled(place, classes, size, crop, channels)
        if held_out_root is not None:
            other = Path(held_out_root).expanduser()
            if class_folders(other) != classes:
                raise UserError(f"{other} has other class folders than {place}; it needs the same ones to be held out")
            unseen = labelled(other, classes, size, crop, channels)
            rows = np.arange(len(unseen))
        else:
            rows = held_out_rows(train, held_out_fraction)
            train = train.subset(np.setdiff1d(np.arange(len(train)), rows))
        chosen = rows[some_rows(len(rows), held_out_most)]
        super().__init__(train, unseen.subset(chosen), len(classes), **options)
        self.standardize, self.class_names = standardize, classes or None


def held_out_rows(pictures: PictureReader, fraction: float) -> np.ndarray:
    """Return the rows that are held out, a share of each class. UserError where there are too few to hold out any."""
    if len(pictures) < FEWEST:
        raise UserError(f"of {len(pictures)} pictures none can be held out; put {FEWEST} or more into {pictures.root}")
    return stratified_rows(pictures.labels, len(pictures), fraction, seed=0).numpy()


class ImageNet(ImageFolder):
    """ILSVRC 2012 with a folder for each class: root/train/<class>/*.JPEG, and root/val/<class>/*.JPEG held out."""

    def __init__(self, root: str, **settings: object):
        """root: the folder of both. settings: as for ImageFolder. UserError when one is missing."""
        imagenet_classes(root)
        place = Path(root).expanduser()
        super().__init__(str(place / "train"), held_out_root=str(place / "val"), **settings)  # type: ignore[arg-type]


def labelled(root: Path, classes: list[str], size: int, crop: Crop, channels: int) -> PictureReader:
    """Return a reader of all pictures below `root`, the class of each being the folder it lies in."""
    names = list_pictures(root)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[name.partition("/")[0]] for name in names] if classes else None
    return PictureReader(root, names, labels, size, crop, channels)
