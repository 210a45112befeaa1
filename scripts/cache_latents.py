#!/usr/bin/env python
"""Encodes a set of pictures once, so that training reads latents instead of running the encoder.

    python scripts/cache_latents.py out=data/imagenet_latents dataloaders=imagenet_pixels vae.path=sd-vae-ft-ema
    python scripts/cache_latents.py out=data/mine dataloaders=image_folder dataloaders.root=pictures dataloaders.size=256
    python scripts/cache_latents.py out=data/imagenet_latents verify=true     # every checksum again
    python scripts/cache_latents.py out=s3://bucket/latents dataloaders=imagenet_pixels   # then dataloaders.path=s3://bucket/latents
    torchrun --nproc-per-node 8 scripts/cache_latents.py out=data/imagenet_latents dataloaders=imagenet_pixels   # eight GPUs
    python launcher.py run_name=x dataloaders=imagenet dataloaders.path=data/mine model=dit_s

Writes shards of `shard_rows` pictures: <part>-00000.npy, moments (rows, 2, 2, C, h, w) in fp16, of each picture the mean and
standard deviation of its latent, then those of its mirror image; <part>-00000-labels.npy; and manifest.json with a checksum
for each file. A file appears only once it is whole. Killed, the same command goes on at the shard it was at, and its files
are the same as if nothing had happened; so are those of several processes of torchrun, which share the shards. Files that
are missing or cut short are made again, damaged ones once they are deleted. It refuses when the pictures have changed since:
a cache is of one set of them.

How long the encoding will take is said on stderr, measured on its first batch.

An address as out (s3://, gs://) has each file stored there once it is whole, and the manifest after it; a copy is kept on
this machine below $XDG_CACHE_HOME or ~/.cache.

Keys: out (required), shard_rows (8192), batch_size (32 pictures encoded at once), num_workers (4 processes that read),
device (auto), verify (false); and any dataloaders or vae setting (dataloaders=imagenet_pixels, vae=stable_diffusion).
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import device

from common.device import pick_device
from common.distributed import barrier, rank, world
from common.errors import UserError
from common.files import locked, remove_temporaries, replacing, write_atomically
from common.progress import each, watched
from common.ranges import Range
from common.stores import below, checksum, is_address, local_copy, names_below, put, size
from common.stores import read as read_stored
from configuration.build import build
from configuration.compose import compose_config, resolved
from configuration.settings import read_settings
from configuration.values import Name
from dataloaders.image_stream import ImageStream, PictureReader
from dataloaders.picture_files import MANIFEST, MOST_BYTES, SHARD, listed, wrong_in_manifest
from dataloaders.stream import ReadAhead, Rows
from dataloaders.tensor_dataset import as_states
from models.vae.stable_diffusion_vae import WEIGHTS_FILE, StableDiffusionVAE
from run_files.run_lock import RunLock
from scripts.ranks import front_of_ranks

FORMAT = 2  # 2: knows the pictures it was made from
# Settings of the data that change nothing of what is encoded.
IGNORED = ("flip", "crop_padding", "augment", "epoch_size", "held_out_most", "value_range", "training")


@dataclass(frozen=True)
class Settings:
    """The command line."""

    out: Name = field(metadata={"example": "out=data/imagenet_latents, the folder to write to"})
    shard_rows: Annotated[int, Range(1)] = 8192
    batch_size: Annotated[int, Range(1)] = 32
    num_workers: Annotated[int, Range(0)] = 4
    device: str = "auto"
    verify: bool = False


def read_words(words: list[str]) -> tuple[Settings, list[str]]:
    """Own settings, and dataloaders and vae overrides, of a command line. UserError for anything else."""
    return read_settings(words, Settings, ("dataloaders", "vae"))


class Cache:
    """A folder of shards and its manifest; of an address the copy here, each file of which is stored there once it is whole.

    What is done is then what the store's manifest lists, which is written after what it lists.
    """

    def __init__(self, out: str, made_from: dict[str, Any]):
        """made_from: everything the latents depend on, `files` being the pictures. UserError when the folder holds
        others, or something else."""
        self.store = out if is_address(out) else None
        self.folder = folder = local_copy(out) if self.store else Path(out).expanduser()
        self.file, others = folder / MANIFEST, list[str]()
        if self.store:
            others = [name for name in names_below(self.store) if not (SHARD.fullmatch(name) or name.startswith("."))]
            self.take_manifest(self.store)
        self.manifest: dict[str, Any] = {"format": FORMAT, "finished": False, "made_from": made_from, "shards": []}
        if not self.file.exists():
            if not self.store and folder.exists():
                own = (".partial", ".npy", ".tmp", ".lock")
                others = [path.name for path in folder.iterdir() if not path.name.endswith(own)]
            if others:
                raise UserError(f"out={out} holds other things than cached latents; give a new folder")
            folder.mkdir(parents=True, exist_ok=True)
            return
        self.manifest = read_manifest(folder)
        before = self.manifest["made_from"]
        changed = [key for key in made_from if before.get(key) != json.loads(json.dumps(made_from[key]))]
        if changed == ["files"]:
            raise UserError(
                f"the pictures are not those that out={out} was made from ({before['files']['count']:,} then, "
                f"{made_from['files']['count']:,} now; names, sizes or labels differ); give another folder, or delete it"
            )
        if changed:
            raise UserError(f"out={out} holds latents made with another {', '.join(changed)}; give another folder")

    def holds(self, name: str) -> bool:
        """Whether a shard is listed and its files have their sizes."""
        shards = [shard for shard in self.manifest["shards"] if shard["file"] == name]
        return bool(shards) and all(
            size(file_of(self.store or self.folder, file)) == length for file, length, _ in listed(shards)
        )

    def take_manifest(self, store: str) -> None:
        """Have the manifest here be that of the store."""
        with locked(self.file):
            text = read_stored(below(store, MANIFEST), MOST_BYTES)
            if text is None:
                self.file.unlink(missing_ok=True)
            else:
                write_atomically(self.file, text.decode(errors="replace"))

    def add(self, part: str, name: str, moments: Any, labels: Any, unreadable: list[str]) -> None:
        """Write a shard, then list it."""
        shard: dict[str, Any] = {"part": part, "rows": len(moments), "unreadable": unreadable}
        for key, file, array in (("file", name, moments), ("labels", name.replace(".npy", "-labels.npy"), labels)):
            path = self.folder / file
            with replacing(path) as stream:
                np.save(stream, array, allow_pickle=False)
            shard |= {key: file, f"{key}_bytes": path.stat().st_size, f"{key}_blake2b": checksum(path)}
            if self.store:
                put(path, below(self.store, file))
        with locked(self.file):  # other ranks list theirs
            self.reread()
            others = [other for other in self.manifest["shards"] if other["file"] != name]
            self.manifest["shards"] = sorted([*others, shard], key=lambda entry: str(entry["file"]))
            self.write()

    def reread(self) -> None:
        if self.file.exists():
            self.manifest = read_manifest(self.folder)

    def write(self) -> None:
        text = json.dumps(self.manifest, indent=1) + "\n"
        write_atomically(self.file, text)
        if self.store:
            put(text.encode(), below(self.store, MANIFEST))

    def finish(self, shape: list[int], num_classes: int) -> None:
        """Say that every shard is there, and remove what processes leave: locks, and of killed ones what is half-written."""
        self.reread()
        shards = self.manifest["shards"]
        parts = {part: sum(s["rows"] for s in shards if s["part"] == part) for part in ("train", "held_out")}
        self.manifest |= {"finished": True, "shape": shape, "num_classes": num_classes, "parts": parts}
        self.write()
        remove_temporaries(self.folder)
        for left in (*self.folder.glob("*.partial"), *self.folder.glob(".*lock")):  # .partial: of older versions
            left.unlink()


def read_manifest(place: str | Path) -> dict[str, Any]:
    """Return the manifest of cached latents in a folder or a store, finished or not. UserError when none can be read."""
    file = file_of(place, MANIFEST)
    text = read_stored(file, MOST_BYTES) if isinstance(file, str) else file.read_bytes() if file.is_file() else None
    if text is None:
        raise UserError(f"there is no {file}; only cached latents can be verified")
    try:
        manifest = json.loads(text)
        readable = wrong_in_manifest(manifest) is None and manifest.get("format") == FORMAT
    except ValueError:
        readable = False
    if not readable:
        raise UserError(f"{file} cannot be read as a manifest of cached latents of format {FORMAT}; give another folder")
    return dict(manifest)


def verify(place: str | Path) -> str:
    """Return that every checksum is right, in a folder or a store. UserError naming every damaged file."""
    manifest = read_manifest(place)
    files = listed(manifest["shards"])
    sums = ((name, digest, file_of(place, name)) for name, _, digest in each(files, "checksums"))
    bad = [name for name, digest, file in sums if size(file) is None or checksum(file) != digest]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(files)} files in {place} are missing or damaged: {', '.join(bad)}; "
            "delete those that are there, then repeat the command that made the cache, which makes them again"
        )
    return f"{contents(place, manifest)}, every checksum right{'' if manifest['finished'] else ', unfinished'}"


def file_of(place: str | Path, name: str) -> str | Path:
    """Return where a file of a folder or a store is."""
    return below(place, name) if isinstance(place, str) else place / name


def contents(place: str | Path, manifest: dict[str, Any]) -> str:
    shards = manifest["shards"]
    return f"{place}: {len(shards)} shards, {sum(s['rows'] for s in shards):,} pictures"


def build_pictures(overrides: list[str]) -> tuple[ImageStream, str, dict[str, Any]]:
    """Return the set of pictures, the autoencoder's path, and what both are. UserError when they cannot be encoded."""
    chosen = any(word.startswith("vae=") for word in overrides)
    cfg = compose_config(["run_name=cache", *([] if chosen else ["vae=stable_diffusion"]), *overrides])
    node = OmegaConf.create({"dataloaders": cfg["dataloaders"]})
    assert isinstance(node, DictConfig)
    config = resolved(node)["dataloaders"]
    if "held_out_most" in config:
        config["held_out_most"] = 10**9  # the cache has them all
    dataset = build(config)
    if not isinstance(dataset, ImageStream) or dataset.train.channels != 3 or dataset.train.crop == "random":
        raise UserError(
            f"dataloaders={cfg['choices']['dataloaders']} has no coloured pictures, each cut in one way, to encode; choose "
            "imagenet_pixels, celeba, or image_folder with dataloaders.crop=resized"
        )
    matters = {key: value for key, value in config.items() if key not in IGNORED}
    return dataset, str(cfg["vae"]["path"]), matters


def files_of(dataset: ImageStream) -> dict[str, Any]:
    """Return how many pictures there are, and a hash of their names, sizes in bytes, labels and parts."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for reader in (dataset.train, dataset.unseen):
        for row in each(range(len(reader)), "names and sizes of the pictures"):
            file = reader.root / reader.name(row)
            digest.update(os.fsencode(f"{reader.name(row)}/{file.stat().st_size if file.is_file() else 'missing'}\n"))
        digest.update(b"" if reader.labels is None else reader.labels.numpy().tobytes())
        count += len(reader)
    return {"count": count, "blake2b": digest.hexdigest()}


def encode(settings: Settings, overrides: list[str]) -> str:
    """Encode every shard that is not there yet, of both parts, and return what the folder holds then."""
    folder = local_copy(settings.out) if is_address(settings.out) else Path(settings.out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={settings.out} is not a folder; give a new one")
    lock = RunLock(folder.resolve(), "the latents of {} are being made", "out")
    if rank() == 0 and lock.is_held():
        lock.acquire()  # says by whom, before anything that takes long
    dataset, path, pictures = build_pictures(overrides)
    vae = StableDiffusionVAE(path).to(pick_device(settings.device))
    weights = Path(path).expanduser() / WEIGHTS_FILE
    made_from = {
        "files": files_of(dataset), "pictures": pictures,
        "vae": checksum(weights) if weights.is_file() else path, "vae_scale": [vae.scale, vae.shift],
        "shard_rows": settings.shard_rows, "batch_size": settings.batch_size,
    }  # fmt: skip
    cache = Cache(settings.out, made_from)
    if rank() == 0:
        lock.acquire()
    cache.reread()
    parts = {"train": dataset.train, "held_out": dataset.unseen}
    plans = {part: missing(cache, part, len(reader), settings) for part, reader in parts.items()}
    left = sum(len(numbers) for plan in plans.values() for batches in plan.values() for numbers in batches)
    with watched(vae.autoencoder.encoder, f"encoding {left:,} pictures", 2 * left):  # each as it is and mirrored
        for part, reader in parts.items():
            encode_part(cache, part, reader, plans[part], vae, settings.num_workers)
    height, width = dataset.state_shape[1:]
    shape = [vae.latent_channels, height // vae.factor, width // vae.factor]
    barrier()
    if rank():
        return ""
    cache.finish(shape, dataset.num_classes)
    lock.release()
    lost = [name for shard in cache.manifest["shards"] for name in shard["unreadable"]]
    named = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
    note = f"\nnote: {len(lost):,} pictures cannot be read and were left out: {named}" if lost else ""
    return f"{contents(cache.store or cache.folder, cache.manifest)}, latents of shape {shape}{note}"


def missing(cache: Cache, part: str, pictures: int, settings: Settings) -> dict[str, list[list[int]]]:
    """Return the shards of one part that are not there and this rank makes, by name: the numbers of their pictures, in
    batches."""
    rows, step, plan = settings.shard_rows, settings.batch_size, dict[str, list[list[int]]]()
    for first in range(rank() * rows, pictures, world() * rows):
        name, numbers = f"{part}-{first // rows:05d}.npy", list(range(first, min(first + rows, pictures)))
        if not cache.holds(name):
            plan[name] = [numbers[begin : begin + step] for begin in range(0, len(numbers), step)]
    return plan


def encode_part(
    cache: Cache,
    part: str,
    reader: PictureReader,
    plan: dict[str, list[list[int]]],
    vae: StableDiffusionVAE,
    num_workers: int,
) -> None:
    """Encode the planned shards of one part. UserError for a shard whose pictures can all not be read."""
    device = next(vae.parameters()).device
    reads = ReadAhead(reader, num_workers).batches([Rows(numbers, 0) for batches in plan.values() for numbers in batches])
    for name, batches in plan.items():
        moments, labels, unreadable = [], [], list[int]()
        for numbers, read in zip(batches, reads, strict=False):  # the reads of the shards follow one another
            kept = [k for k, number in enumerate(numbers) if number not in read.unreadable]
            unreadable += [number for number in numbers if number in read.unreadable]
            if kept:
                moments.append(moments_of(read.stored[kept], vae, device))
                labels.append(torch.zeros(len(kept), dtype=torch.int64) if read.labels is None else read.labels[kept])
        if not moments:
            raise UserError(f"none of the pictures of {name} can be read; are they damaged?")
        cache.add(part, name, np.concatenate(moments), torch.cat(labels).numpy(), [reader.name(k) for k in unreadable])


def moments_of(pictures: Any, vae: StableDiffusionVAE, device: device) -> Any:
    """Return pictures (B, 3, H, W) uint8 -> (B, 2, 2, C, h, w) fp16: mean and standard deviation, of each and of its mirror
    image.

    UserError for latents that fp16 cannot hold.
    """
    x = as_states(pictures.to(device))
    both = torch.stack([torch.stack(vae.moments(view), dim=1) for view in (x, x.flip(3))], dim=1).half()
    if not both.isfinite().all():
        raise UserError("the autoencoder gives latents that are not finite in fp16; is it the one meant for these pictures?")
    return both.cpu().numpy()


def cache_latents(words: list[str]) -> str:
    """Carry out the command; returns what the folder holds."""
    settings, overrides = read_words(words)
    place = settings.out if is_address(settings.out) else Path(settings.out).expanduser()
    return verify(place) if settings.verify else encode(settings, overrides)


def main(words: list[str]) -> int:
    return front_of_ranks(words or ["--help"], __doc__, cache_latents)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
