#!/usr/bin/env python
"""Encodes a set of pictures once, so that training reads latents instead of running the encoder.

    python scripts/cache_latents.py out=data/imagenet_latents dataloaders=imagenet_pixels vae.path=sd-vae-ft-ema
    python scripts/cache_latents.py out=data/mine dataloaders=image_folder dataloaders.root=pictures dataloaders.size=256
    python scripts/cache_latents.py out=data/imagenet_latents verify=true     # every checksum again
    python launcher.py run_name=x dataloaders=imagenet dataloaders.path=data/mine model=dit_s

Writes shards of `shard_rows` pictures: <part>-00000.npy, moments (rows, 2, 2, C, h, w) in fp16, of each picture the mean and
standard deviation of its latent, then those of its mirror image; <part>-00000-labels.npy; and manifest.json with a checksum
for each file. A file appears only once it is whole. Killed, the same command goes on at the shard it was at, and its files
are the same as if nothing had happened; files that are missing or cut short are made again,
damaged ones once they are deleted. It refuses when the pictures have changed since: a cache is of one set of them.

Keys: out (required), shard_rows (8192), batch_size (32 pictures encoded at once), num_workers (4 processes that read),
device (auto), verify (false); and any dataloaders or vae setting (dataloaders=imagenet_pixels, vae=stable_diffusion).
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import UserError

if TYPE_CHECKING:
    from torch import device

    from dataloaders.image_stream import ImageStream, PictureReader
    from models.vae.stable_diffusion_vae import StableDiffusionVAE

DEFAULTS: dict[str, Any] = {
    "out": None, "shard_rows": 8192, "batch_size": 32, "num_workers": 4, "device": "auto", "verify": "false",
}  # fmt: skip
FORMAT = 2  # 2: knows the pictures it was made from
OF_NO_MATTER = ("flip", "crop_padding", "augment", "epoch_size", "held_out_most", "value_range")  # for what is encoded


def read_words(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Own settings, and dataloaders and vae overrides, of a command line. UserError for anything else."""
    settings, overrides = dict(DEFAULTS), []
    for word in words:
        key, equals, value = word.partition("=")
        if key.split(".")[0] in ("dataloaders", "vae") and equals:
            overrides.append(word)
        elif key not in DEFAULTS or not equals:
            raise UserError(f"cannot use {word!r}; the keys are {', '.join(DEFAULTS)}, dataloaders and vae, as key=value")
        elif isinstance(DEFAULTS[key], int):
            least = 0 if key == "num_workers" else 1
            if not value.isascii() or not value.isdigit() or int(value) < least:
                raise UserError(f"{key} takes a whole number of at least {least}, not {value!r}")
            settings[key] = int(value)
        else:
            settings[key] = value
    if settings["out"] is None:
        raise UserError("out is missing; add the folder to write to, such as out=data/imagenet_latents")
    if settings["verify"] not in ("true", "false"):
        raise UserError(f"verify takes true or false, not {settings['verify']!r}")
    return settings, overrides


def checksum(file: Path) -> str:
    import hashlib

    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_whole(file: Path, content: bytes) -> None:
    """Write beside the file and move over it, once it is on the disk."""
    import os

    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def as_npy(array: Any) -> bytes:
    """Return an array in NumPy's file format."""
    import io

    import numpy as np

    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


class Cache:
    """A folder of shards and its manifest."""

    def __init__(self, folder: Path, made_from: dict[str, Any]):
        """made_from: everything the latents depend on, `files` being the pictures. UserError when the folder holds
        others, or something else."""
        from dataloaders.picture_files import MANIFEST

        self.folder, self.file = folder, folder / MANIFEST
        self.manifest: dict[str, Any] = {"format": FORMAT, "finished": False, "made_from": made_from, "shards": []}
        if not self.file.exists():
            if folder.exists() and any(path.suffix != ".partial" and path.suffix != ".npy" for path in folder.iterdir()):
                raise UserError(f"out={folder} holds other things than cached latents; give a new folder")
            folder.mkdir(parents=True, exist_ok=True)
            return
        self.manifest = read_manifest(self.file)
        before = self.manifest["made_from"]
        changed = [key for key in made_from if before.get(key) != json.loads(json.dumps(made_from[key]))]
        if changed == ["files"]:
            raise UserError(
                f"the pictures are not those that out={folder} was made from ({before['files']['count']:,} then, "
                f"{made_from['files']['count']:,} now; names, sizes or labels differ); give another folder, or delete it"
            )
        if changed:
            raise UserError(f"out={folder} holds latents made with another {', '.join(changed)}; give another folder")

    def holds(self, name: str) -> bool:
        """Whether a shard is listed and its files have their sizes."""
        listed = [shard for shard in self.manifest["shards"] if shard["file"] == name]
        files = [(self.folder / shard[key], shard[f"{key}_bytes"]) for shard in listed for key in ("file", "labels")]
        return bool(files) and all(file.is_file() and file.stat().st_size == size for file, size in files)

    def add(self, part: str, name: str, moments: Any, labels: Any, unreadable: list[str]) -> None:
        """Write a shard, then list it."""
        shard: dict[str, Any] = {"part": part, "rows": len(moments), "unreadable": unreadable}
        for key, file, array in (("file", name, moments), ("labels", name.replace(".npy", "-labels.npy"), labels)):
            write_whole(self.folder / file, as_npy(array))
            size, digest = (self.folder / file).stat().st_size, checksum(self.folder / file)
            shard |= {key: file, f"{key}_bytes": size, f"{key}_blake2b": digest}
        others = [other for other in self.manifest["shards"] if other["file"] != name]
        self.manifest["shards"] = sorted([*others, shard], key=lambda entry: str(entry["file"]))
        self.write()

    def write(self) -> None:
        write_whole(self.file, (json.dumps(self.manifest, indent=1) + "\n").encode())

    def finish(self, shape: list[int], num_classes: int) -> None:
        """Say that every shard is there."""
        shards = self.manifest["shards"]
        parts = {part: sum(s["rows"] for s in shards if s["part"] == part) for part in ("train", "held_out")}
        self.manifest |= {"finished": True, "shape": shape, "num_classes": num_classes, "parts": parts}
        self.write()
        for left in self.folder.glob("*.partial"):
            left.unlink()


def read_manifest(file: Path) -> dict[str, Any]:
    """Raise UserError when it is not one."""
    try:
        manifest = json.loads(file.read_text())
        known = manifest["format"] == FORMAT and isinstance(manifest["shards"], list) and "made_from" in manifest
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{file} cannot be read as the manifest of cached latents ({error}); give another folder") from error
    if not known:
        raise UserError(f"{file} is of another format; give another folder")
    return dict(manifest)


def verify(folder: Path) -> None:
    """Raise UserError naming every damaged file."""
    from dataloaders.picture_files import MANIFEST

    if not (folder / MANIFEST).is_file():
        raise UserError(f"there is no {folder / MANIFEST} to verify")
    manifest = read_manifest(folder / MANIFEST)
    shards = manifest["shards"]
    files = [(folder / shard[key], shard[f"{key}_blake2b"]) for shard in shards for key in ("file", "labels")]
    bad = [file.name for file, digest in files if not file.is_file() or checksum(file) != digest]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(files)} files in {folder} are missing or damaged: {', '.join(bad)}; "
            "delete those that are there, then repeat the command that made the cache, which makes them again"
        )
    state = "" if manifest["finished"] else ", unfinished"
    print(f"{folder}: {len(shards)} shards, {sum(s['rows'] for s in shards):,} pictures, every checksum right{state}")


def build_pictures(overrides: list[str]) -> tuple["ImageStream", str, dict[str, Any]]:
    """Return the set of pictures, the autoencoder's path, and what both are. UserError when they cannot be encoded."""
    from omegaconf import DictConfig, OmegaConf

    from configuration.build import build
    from configuration.compose import compose_config, resolved
    from dataloaders.image_stream import ImageStream

    chosen = any(word.startswith("vae=") for word in overrides)
    cfg = compose_config(["run_name=cache", *([] if chosen else ["vae=stable_diffusion"]), *overrides])
    node = OmegaConf.create({"dataloaders": cfg["dataloaders"]})
    assert isinstance(node, DictConfig)
    config = resolved(node)["dataloaders"]
    if "held_out_most" in config:
        config["held_out_most"] = sys.maxsize  # the cache has them all
    dataset = build(config)
    if not isinstance(dataset, ImageStream) or dataset.train.channels != 3 or dataset.train.crop == "random":
        raise UserError(
            f"dataloaders={cfg['choices']['dataloaders']} has no coloured pictures, each cut in one way, to encode; choose "
            "imagenet_pixels, celeba, or image_folder with dataloaders.crop=resized"
        )
    matters = {key: value for key, value in config.items() if key not in (*OF_NO_MATTER, "training")}
    return dataset, str(cfg["vae"]["path"]), matters


def files_of(dataset: "ImageStream") -> dict[str, Any]:
    """Return how many pictures there are, and a hash of their names, sizes in bytes, labels and parts."""
    import hashlib
    import os

    digest, count = hashlib.blake2b(digest_size=16), 0
    for reader in (dataset.train, dataset.unseen):
        for row in range(len(reader)):
            file = reader.root / reader.name(row)
            digest.update(os.fsencode(f"{reader.name(row)}/{file.stat().st_size if file.is_file() else 'missing'}\n"))
        digest.update(b"" if reader.labels is None else reader.labels.numpy().tobytes())
        count += len(reader)
    return {"count": count, "blake2b": digest.hexdigest()}


def encode(settings: dict[str, Any], overrides: list[str]) -> None:
    """Carry out the command: every shard that is not there yet, of both parts."""
    from common.device import pick_device
    from models.vae.stable_diffusion_vae import WEIGHTS_FILE, StableDiffusionVAE

    dataset, path, pictures = build_pictures(overrides)
    vae = StableDiffusionVAE(path).to(pick_device(settings["device"]))
    weights = Path(path).expanduser() / WEIGHTS_FILE
    made_from = {
        "files": files_of(dataset), "pictures": pictures,
        "vae": checksum(weights) if weights.is_file() else path, "vae_scale": [vae.scale, vae.shift],
        "shard_rows": settings["shard_rows"], "batch_size": settings["batch_size"],
    }  # fmt: skip
    cache = Cache(Path(settings["out"]).expanduser(), made_from)
    for part, reader in (("train", dataset.train), ("held_out", dataset.unseen)):
        encode_part(cache, part, reader, vae, settings)
    height, width = dataset.state_shape[1:]
    shape = [vae.latent_channels, height // vae.factor, width // vae.factor]
    cache.finish(shape, dataset.num_classes)
    shards = cache.manifest["shards"]
    lost = [name for shard in shards for name in shard["unreadable"]]
    print(f"{cache.folder}: {len(shards)} shards, {sum(s['rows'] for s in shards):,} pictures, latents of shape {shape}")
    if lost:
        named = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        print(f"note: {len(lost):,} pictures cannot be read and were left out: {named}")


def encode_part(
    cache: Cache, part: str, reader: "PictureReader", vae: "StableDiffusionVAE", settings: dict[str, Any]
) -> None:
    """The missing shards of one part."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from dataloaders.stream import ReadAhead, Rows

    rows, step = settings["shard_rows"], settings["batch_size"]
    names = {first: f"{part}-{first // rows:05d}.npy" for first in range(0, len(reader), rows)}
    missing = [first for first in names if not cache.holds(names[first])]
    plans = {first: batches(first, min(first + rows, len(reader)), step) for first in missing}
    reads = ReadAhead(reader, settings["num_workers"]).batches(
        [Rows(numbers, 0) for first in missing for numbers in plans[first]]
    )
    device = next(vae.parameters()).device
    for first in tqdm(missing, desc=f"{part}, {len(names) - len(missing)} of {len(names)} shards were there", disable=None):
        moments, labels, unreadable = [], [], list[int]()
        for numbers in plans[first]:
            read = next(reads)
            lost = set(read.unreadable)
            kept = [k for k, number in enumerate(numbers) if number not in lost]
            unreadable += [number for number in numbers if number in lost]
            if kept:
                moments.append(moments_of(read.stored[kept], vae, device))
                labels.append(torch.zeros(len(kept), dtype=torch.int64) if read.labels is None else read.labels[kept])
        if not moments:
            raise UserError(f"none of the pictures of {names[first]} can be read; are they damaged?")
        cache.add(
            part, names[first], np.concatenate(moments), torch.cat(labels).numpy(), [reader.name(k) for k in unreadable]
        )


def batches(first: int, end: int, step: int) -> list[list[int]]:
    """Return first .. end - 1 in lists of `step`."""
    return [list(range(begin, min(begin + step, end))) for begin in range(first, end, step)]


def moments_of(pictures: Any, vae: "StableDiffusionVAE", device: "device") -> Any:
    """Return pictures (B, 3, H, W) uint8 -> (B, 2, 2, C, h, w) fp16: mean and standard deviation, of each and of its mirror
    image.

    UserError for latents that fp16 cannot hold.
    """
    import torch

    from dataloaders.tensor_dataset import as_states

    x = as_states(pictures.to(device))
    both = torch.stack([torch.stack(vae.moments(view), dim=1) for view in (x, x.flip(3))], dim=1).half()
    if not both.isfinite().all():
        raise UserError("the autoencoder gives latents that are not finite in fp16; is it the one meant for these pictures?")
    return both.cpu().numpy()


def main(words: list[str]) -> int:
    if not words or "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        settings, overrides = read_words(words)
        if settings["verify"] == "true":
            verify(Path(settings["out"]).expanduser())
        else:
            encode(settings, overrides)
    except UserError as error:
        print(f"cache_latents.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
