"""What a folder of pictures holds, from its names alone: the classes a config needs before anything is loaded.

Imports neither torch nor NumPy: the launcher composes configs with it.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import require
from common.stores import below, is_address, read

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
MOST_ATTRIBUTES = 10  # 1,024 classes
IDX_IMAGES = "images-idx3-ubyte"  # how the names of MNIST's files of images end, but for .gz
SHARD_KEYS = {
    "part": str, "rows": int, "file": str, "labels": str, "file_bytes": int, "labels_bytes": int, "file_blake2b": str,
    "labels_blake2b": str,
}  # fmt: skip
MANIFEST = "manifest.json"  # of a folder of cached latents
MOST_BYTES = 2**28  # of it in a store
SHARD = re.compile(r"(train|held_out)-\d{5,9}(-labels)?\.npy")  # of one


def is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def class_folders(root: Path) -> list[str]:
    """Return the folders in `root` in order, each a class; none where pictures lie in it. UserError where it is none."""
    require(root, "put the pictures there, or correct dataloaders.root", "folder")
    entries = list(root.iterdir())
    if any(is_picture(entry.name) for entry in entries):
        return []
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def folder_classes(root: str) -> int:
    """Return how many classes the folders of a tree of pictures make: 0 where pictures lie in the root itself."""
    return len(class_folders(Path(root).expanduser()))


def imagenet_classes(root: str) -> int:
    """Return how many classes ImageNet's folder has. UserError unless train and val in it have class folders."""
    place = Path(root).expanduser()
    for part in ("train", "val"):
        if not (place / part).is_dir() or not class_folders(place / part):
            raise UserError(
                f"{(place / part).absolute()} has no class folders; unpack ILSVRC 2012 (image-net.org) so that pictures lie "
                f"in {place}/train/<class>/ and {place}/val/<class>/, and give that folder as root"
            )
    return len(class_folders(place / "train"))


def attribute_classes(attributes: Sequence[str]) -> int:
    """Return how many combinations attributes have, 0 without any. UserError for more than 10 of them, or one twice."""
    twice = next((name for place, name in enumerate(attributes) if name in attributes[:place]), None)
    if twice is not None:
        raise UserError(f"dataloaders.attributes names {twice} twice; name each attribute once")
    if len(attributes) > MOST_ATTRIBUTES:
        raise UserError(f"dataloaders.attributes takes at most {MOST_ATTRIBUTES} names, a class being a combination of them")
    return 2 ** len(attributes) if attributes else 0


def list_pictures(root: Path) -> list[str]:
    """Return the pictures below `root`, by paths from it, in order; links to folders around are left. UserError for none."""
    found, above = [], {root: {root.resolve()}}
    for folder, folders, files in os.walk(root, followlinks=True):
        ends = {name: Path(folder, name).resolve() for name in folders if not name.startswith(".")}
        folders[:] = [name for name, end in ends.items() if end not in above[Path(folder)]]
        above |= {Path(folder, name): above[Path(folder)] | {ends[name]} for name in folders}
        place = Path(folder).relative_to(root).as_posix()
        found += [name if place == "." else f"{place}/{name}" for name in files if is_picture(name)]
    if not found:
        raise UserError(f"there are no pictures ({', '.join(SUFFIXES)}) in {root.absolute()}")
    return sorted(found)


def idx_root(root: str) -> str | None:
    """Return the folder itself where it holds images in MNIST's format, else None."""
    return root if any(Path(root).expanduser().glob(f"*{IDX_IMAGES}*")) else None


def wrong_in_manifest(manifest: Any) -> str | None:
    """Return the first key of cached latents' manifest that holds what no such manifest does, or None.

    The files of a shard are in the folder itself: a manifest may be anyone's, and leads nowhere else.
    """
    known = manifest if isinstance(manifest, dict) else {}
    shards, sizes = known.get("shards"), known.get("shape", [])
    if not isinstance(known.get("made_from"), dict):
        return "made_from"
    if known.get("finished") and not isinstance(known.get("num_classes"), int):
        return "num_classes"
    if not isinstance(sizes, list) or not all(isinstance(n, int) and 0 < n < 2**20 for n in sizes):
        return "shape"
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return "shards"
    wrong = (key for shard in shards for key, kind in SHARD_KEYS.items() if not isinstance(shard.get(key), kind))
    led_out = (key for shard in shards for key in ("file", "labels") if not SHARD.fullmatch(shard[key]))
    return next(wrong, None) or next(led_out, None)


def latent_manifest(folder: str) -> dict[str, Any]:
    """Return what scripts/cache_latents.py says it put into a folder. UserError when missing, damaged or not whole."""
    file = Path(folder).expanduser() / MANIFEST
    how, where = (
        f"`python scripts/cache_latents.py out={folder} ...`",
        folder if is_address(folder) else file.parent.absolute(),
    )
    text = read(below(folder, MANIFEST), MOST_BYTES) if is_address(folder) else file.read_bytes() if file.is_file() else None
    if text is None:
        raise UserError(f"there are no cached latents in {where}; make them by {how}, or correct the path")
    try:
        manifest = json.loads(text)
        wrong = wrong_in_manifest(manifest)
    except ValueError:
        wrong = "text"
    if wrong:
        raise UserError(
            f"{where}/{MANIFEST} is no manifest of cached latents ({wrong}); delete its folder and make it again by {how}"
        )
    if not manifest.get("finished") or not manifest.get("shape"):
        raise UserError(f"{where} is not finished; give the command that began it again, and it goes on: {how}")
    return dict(manifest)


def latent_shape(folder: str) -> list[int]:
    """Return the shape [C, H, W] of the latents cached in a folder."""
    return list(latent_manifest(folder)["shape"])


def latent_classes(folder: str) -> int:
    """Return how many classes there are of the latents cached in a folder."""
    return int(latent_manifest(folder)["num_classes"])


def listed(shards: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """Return the files of the shards in a manifest that has been read: name, size in bytes, checksum."""
    return [(shard[key], shard[f"{key}_bytes"], shard[f"{key}_blake2b"]) for shard in shards for key in ("file", "labels")]
