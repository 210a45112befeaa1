"""Latents of pictures, encoded once by scripts/cache_latents.py and read from memory-mapped shards."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import locked, write_atomically
from common.progress import each
from common.ranges import Count
from common.stores import below, checksum, fetch, is_address, local_copy
from dataloaders.base_dataloaders import Described, Moments
from dataloaders.picture_files import MANIFEST, latent_manifest, listed
from dataloaders.stream import Read, Reader, Rows, StreamDataset, some_rows


def shards_here(address: str, manifest: dict[str, Any]) -> Path:
    """Return the folder on this machine that holds the latents of a store; what is missing is fetched.

    UserError for a file that is damaged there.
    """
    folder = local_copy(address)
    with locked(folder / MANIFEST):
        known = json.loads((folder / MANIFEST).read_text())["shards"] if (folder / MANIFEST).is_file() else []
        fresh = set(listed(known))
        for name, size, digest in each(listed(manifest["shards"]), f"latents from {address}"):
            file = folder / name
            whole = file.is_file() and file.stat().st_size == size
            if whole and ((name, size, digest) in fresh or checksum(file) == digest):
                continue
            fetch(below(address, name), file)
            if checksum(file) != digest:
                file.unlink()
                raise UserError(
                    f"{below(address, name)} is damaged; repeat the command that made the cache once it is deleted"
                )
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return folder


class LatentReader(Reader):
    """Moments of one part of a cache: number 2 k is picture k, 2 k + 1 the same mirrored, (2, C, h, w) fp16 each."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]], shape: Sequence[int], rows: np.ndarray | None = None):
        """shards: as in the manifest. rows: the pictures that are read, None for all. UserError for missing files."""
        self.files = [folder / shard["file"] for shard in shards]
        for key, shard in ((key, shard) for shard in shards for key in ("file", "labels")):
            file = folder / shard[key]
            if not file.is_file() or file.stat().st_size != shard[f"{key}_bytes"]:
                raise UserError(f"{file} is missing or cut short; the command that made the cache makes it again")
        self.shape, self.rows = tuple(shape), rows
        self.begins = np.cumsum([0, *(shard["rows"] for shard in shards)])
        labels = [np.load(folder / shard["labels"], allow_pickle=False) for shard in shards]
        self.labels: Tensor | None = torch.from_numpy(np.concatenate(labels))
        self.maps: list[np.ndarray] | None = None  # opened by the process that reads

    @property
    def own_labels(self) -> Tensor | None:
        """Return the labels of the pictures that are read, in their order."""
        return self.labels if self.labels is None or self.rows is None else self.labels[torch.from_numpy(self.rows)]

    def __len__(self) -> int:
        return int(self.begins[-1]) if self.rows is None else len(self.rows)

    def __getitem__(self, rows: Rows) -> Read:
        if self.maps is None:
            self.maps = [np.load(file, mmap_mode="r", allow_pickle=False) for file in self.files]
            self.maps = [shard.reshape(2 * len(shard), -1) for shard in self.maps]
        row, mirrored = np.divmod(np.asarray(rows.numbers, dtype=np.int64), 2)
        row = row if self.rows is None else self.rows[row]
        shard = np.searchsorted(self.begins, row, side="right") - 1
        place = 2 * (row - self.begins[shard]) + mirrored
        moments = np.empty((len(row), 2, *self.shape), dtype=np.float16)
        flat = moments.reshape(len(row), -1)
        for k, (s, p) in enumerate(zip(shard.tolist(), place.tolist(), strict=True)):
            flat[k] = self.maps[s][p]
        labels = None if self.labels is None else self.labels[torch.from_numpy(row)]
        return Read(torch.from_numpy(moments), labels, [])


class LatentCache(StreamDataset):
    """Latents (C, h, w), drawn afresh from their moments each time, half of them of mirrored pictures."""

    def __init__(
        self,
        path: str,
        flip: bool = True,
        sample: bool = True,
        held_out_most: Count = 10_000,
        **described: Unpack[Described],
    ):
        """path: a folder, or an address, that scripts/cache_latents.py has filled. flip: mirror half. sample: false serves
        the means.

        held_out_most: latents kept in memory to evaluate on. UserError for a folder that is not whole or not as described.
        """
        manifest = latent_manifest(path)
        folder = shards_here(path, manifest) if is_address(path) else Path(path).expanduser()
        parts = {part: [s for s in manifest["shards"] if s["part"] == part] for part in ("train", "held_out")}
        chosen = some_rows(sum(shard["rows"] for shard in parts["held_out"]), held_out_most)
        train = LatentReader(folder, parts["train"], manifest["shape"])
        held_out = LatentReader(folder, parts["held_out"], manifest["shape"], chosen)
        super().__init__(train, held_out, manifest["shape"], manifest["num_classes"], None, described)
        self.flip, self.sample = flip, sample
        self.altered = "sample=true" if sample else "flip=true, of stored latents" if flip else None
        self.views = 1 + flip if self.altered else 0
        self.parts, self.known = (train, held_out), dict[tuple[int, bool], tuple[Moments, Moments]]()
        if not self.num_classes:
            train.labels = held_out.labels = None

    def chosen(self, rows: Tensor, order: torch.Generator) -> Tensor:
        return 2 * rows + (torch.randint(2, rows.shape, generator=order) if self.flip else 0)

    def numbers(self, rows: Sequence[int]) -> list[int]:
        return [2 * row for row in rows]

    def moments(self, count: int, by_class: bool) -> tuple[Moments, Moments]:
        """Read once and kept."""
        if (count, by_class) not in self.known:
            labels = self.parts[0].own_labels if by_class else None
            classes = None if labels is None else whole_classes(labels, count)
            train, unseen = (self.moments_of(part, count, classes) for part in self.parts)
            self.known[count, by_class] = train, unseen
        return self.known[count, by_class]

    def moments_of(self, part: LatentReader, count: int, classes: Tensor | None) -> Moments:
        """Return moments of at most `count` pictures of a part, of these classes or of all."""
        rows, labels = torch.arange(len(part)), part.own_labels
        if classes is not None and labels is not None:
            rows = rows[torch.isin(labels, classes)]
        chosen = rows[torch.from_numpy(np.random.RandomState(1).permutation(len(rows))[:count])]
        views = [part[Rows((2 * chosen + view).tolist(), 0)] for view in range(self.views)]
        mean, std = torch.cat([view.stored for view in views]).to(self.device).float().unbind(1)
        own = [view.labels for view in views if view.labels is not None]
        label = torch.cat(own).to(self.device) if own else None
        return Moments(mean, std if self.sample else None, label, len(chosen) == len(rows))

    def states(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        mean, std = stored.unbind(1)
        if not self.sample:
            return mean.float()
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        return torch.addcmul(mean.float(), noise, std.float())


def whole_classes(labels: Tensor, count: int) -> Tensor:
    """Return as many classes, the same ones each time, as have at most `count` rows together; one at least."""
    sizes = labels.bincount()
    order = torch.from_numpy(np.random.RandomState(1).permutation(len(sizes)))
    order = order[sizes[order] > 0]
    return order[: max(1, int((sizes[order].cumsum(0) <= count).sum()))]
