"""Sets of images as files: a folder of pictures, or the .npz that image evaluators read (arr_0, uint8, N x H x W x C)."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.files import replacing
from dataloaders.array_header import reading
from dataloaders.picture_modes import in_eight_bits

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def write_pictures(folder: Path, images: Tensor) -> None:
    """Write bytes (N, 1 or 3, H, W) as 000000.png, 000001.png, ... UserError for a folder that holds anything already.

    A new folder appears once it is whole: a part of a set would be scored as all of it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder, so that no other pictures mix with these")
    if images.shape[1] not in (1, 3):
        raise UserError(f"images of {images.shape[1]} channels have no picture; decode them, or write numbers (out=x.npz)")
    part = folder if folder.exists() else folder.with_name(f".{folder.name}.part")
    if part is not folder:
        shutil.rmtree(part, ignore_errors=True)  # of a command that was killed
        part.mkdir(parents=True)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0]).save(part / f"{i:06d}.png")
    part.rename(folder)


def write_arrays(path: Path, images: Tensor, labels: Tensor | None) -> None:
    """Write bytes (N, C, H, W) as arr_0 (N, H, W, 3 or C), gray as RGB, and labels (N,), if any, as arr_1."""
    shown = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    arrays = [shown.permute(0, 2, 3, 1).cpu().numpy(), *([] if labels is None else [labels.cpu().numpy()])]
    with replacing(path) as file:
        np.savez(file, *arrays)


def read_images(path: Path) -> Tensor:
    """Return bytes (N, C, H, W) of a folder of pictures, its subfolders included, or of a .npz with arr_0 (N, H, W, C).

    Pictures of equal channels throughout are gray, C = 1. UserError for what is missing, unreadable or of unequal sizes.
    """
    if not path.is_dir() and not (path.suffix == ".npz" and path.is_file()):
        raise UserError(f"{path} is neither a folder of pictures nor a .npz file; give one of them")
    images = torch.from_numpy(read_folder(path) if path.is_dir() else read_arrays(path)).permute(0, 3, 1, 2)
    gray = images.shape[1] == 3 and bool((images[:, :1] == images).all())
    return images[:, :1].contiguous() if gray else images


def read_folder(folder: Path) -> np.ndarray:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise UserError(f"there are no pictures ({', '.join(PICTURES)}) in {folder}")
    images: list[np.ndarray] = []
    for file in files:
        with reading(file), Image.open(file) as picture:
            images.append(np.asarray(in_eight_bits(picture, "RGB")))
        if images[-1].shape != images[0].shape:
            one, other = (f"{image.shape[1]}x{image.shape[0]}" for image in (images[-1], images[0]))
            raise UserError(f"{file} is of {one} pixels, {files[0].name} of {other}; the pictures must be of one size")
    return np.stack(images)


def read_arrays(path: Path) -> np.ndarray:
    arrays = open_npz(path)
    if "arr_0" not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}, not arr_0; write it by sample.py with images=true")
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        given = f"{images.dtype} of shape {list(images.shape)}"
        raise UserError(f"arr_0 of {path} is {given}, not uint8 (N, height, width, 1 or 3); write it again so")
    return images


def open_npz(path: Path) -> dict[str, np.ndarray]:
    """Return its arrays. UserError when it is damaged, or holds Python objects."""
    with reading(path), np.load(path, allow_pickle=False) as opened:
        return {name: opened[name] for name in opened.files}


def images_hash(images: Tensor) -> str:
    """Return a hash of all bytes and the shape: names a set of images in cache keys and provenance."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
