"""The data preset of dev/benchmark.py: small files in the official formats, and how fast they are served."""

import os
import pickle
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from configuration.compose import compose_config, resolved
from dataloaders.base_dataloaders import EpochPlan, FlowDataset
from dataloaders.stream import Rows
from evaluation.parts import build_dataset
from evaluation.threads import one_thread
from scripts.cache_latents import Cache

PICTURES, LATENTS = 512, 2048
DEVICE_SET = "pictures on the device: CIFAR-10, mirrored and augmented, unet_small"
STREAM = "pictures from files: 512 JPEGs of 256x256 as 64x64, unet_small"
CACHE = "cached latents: 2,048 of 4x32x32, dit_s"


def data_preset(place: Path) -> dict[str, list[str]]:
    """Writes the files below `place`; the rows to run, by what they are: a step and what it costs to feed it."""
    write_cifar(place / "cifar")
    write_pictures(place / "pictures")
    write_latents(place / "latents")
    cifar, folder, latents = (f"{words} solver=euler solver.steps=1" for words in sets_below(place))
    return {
        DEVICE_SET: [cifar, f"{cifar} dataloaders.augment=0.12"],
        STREAM: [f"{folder} num_workers={workers}" for workers in (0, 1, 2)],
        CACHE: [f"{latents} num_workers={workers}" for workers in (0, 1)],
    }


def sets_below(place: Path) -> list[str]:
    """Return the words that choose one set of each kind, with a model and a batch size for it."""
    return [
        f"dataloaders=cifar10 dataloaders.root={place / 'cifar'} model=unet_small batch_size=64",
        f"dataloaders=image_folder dataloaders.root={place / 'pictures'} model=unet_small batch_size=16",
        f"dataloaders=imagenet dataloaders.path={place / 'latents'} model=dit_s batch_size=8",
    ]


def write_cifar(place: Path) -> None:
    """Ten thousand pictures of noise in CIFAR-10's batches."""
    folder = place / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random_state = np.random.RandomState(0)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        pixels = random_state.randint(0, 256, (2000, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [k % 10 for k in range(2000)]}, protocol=2))


def write_pictures(place: Path) -> None:
    """JPEGs of smooth noise, in two folders."""
    random_state = np.random.RandomState(0)
    for k in range(PICTURES):
        (place / f"class{k % 2}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random_state.randint(0, 256, (32, 32, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(place / f"class{k % 2}" / f"{k}.jpg", quality=90)


def write_latents(place: Path) -> None:
    """A cache as scripts/cache_latents.py leaves it, of noise, in four shards and one held out."""
    cache, random_state = Cache(str(place), {}), np.random.RandomState(0)
    for part, count in (("train", 4), ("held_out", 1)):
        for shard in range(count):
            moments = random_state.standard_normal((LATENTS // 4, 2, 2, 4, 32, 32)).astype(np.float16)
            cache.add(part, f"{part}-{shard:05d}.npy", moments, np.arange(LATENTS // 4) % 1000, [])
    cache.finish([4, 32, 32], 1000)


def forget(files: list[Path]) -> None:
    """Ask the operating system to drop what it keeps of these files in memory."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def rate(count: int, work: Callable[[], Any], repeats: int) -> float:
    """Return the best rate, in units a second, over so many repeats of `work` of `count` units each."""
    return count / min(timeit.repeat(work, number=1, repeat=repeats))


@one_thread()
def loader_rates(place: Path) -> dict[str, float]:
    """Return rows a second that the loaders alone serve on one core, without any worker process."""

    def dataset(words: str) -> Any:
        return build_dataset(resolved(compose_config(["run_name=x", *words.split(), "num_workers=0"])), torch.device("cpu"))

    def pass_through(served: FlowDataset, batch_size: int) -> None:
        for _ in served.epoch(EpochPlan(batch_size, torch.Generator().manual_seed(0), torch.Generator())):
            pass

    cifar, folder, latents = map(dataset, words := sets_below(place))
    augmented = dataset(f"{words[0]} dataloaders.augment=0.12")
    numbers = torch.randperm(2 * LATENTS, generator=torch.Generator().manual_seed(0)).split(256)
    plan = [Rows(part.tolist(), 0) for part in numbers]

    def gather() -> None:
        for part in plan:
            latents.train[part]

    def sample() -> None:
        for part in plan:
            latents.states(latents.train[part].stored, generator)

    generator = torch.Generator().manual_seed(0)
    forget(sorted((place / "latents").glob("train-*.npy")))
    found = {"latents gathered, cold": rate(2 * LATENTS, gather, 1)}
    found["latents gathered, warm"] = rate(2 * LATENTS, gather, 5)
    found["latents sampled from their moments, warm"] = rate(2 * LATENTS, sample, 5)
    found["pictures on the device, mirrored"] = rate(10_000, lambda: pass_through(cifar, 64), 3)
    found["pictures on the device, mirrored and augmented"] = rate(10_000, lambda: pass_through(augmented, 64), 1)
    found["pictures from files"] = rate(len(folder.train), lambda: pass_through(folder, 64), 2)
    return found
