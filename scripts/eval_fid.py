#!/usr/bin/env python
"""FID and its family, of a checkpoint's samples or of images in files.

    python scripts/eval_fid.py ckpt=outputs/ckpts/unet/x_last.pt n=50000 network=weights/inception reference=train
    python scripts/eval_fid.py ckpt=outputs/ckpts/unet_small/x_last.pt nfe=1 label=all      # by its data's own network
    python scripts/eval_fid.py samples=my_pictures reference=other_pictures network=weights/inception
    python scripts/eval_fid.py samples=samples.npz reference=cifar10_statistics.npz network=weights/inception
    torchrun --nproc-per-node 2 scripts/eval_fid.py ckpt=outputs/ckpts/unet/x_last.pt n=50000 network=weights/inception

Processes that torchrun has started, on one node or several, share the samples and the features; the scores are the same.

Keys: ckpt or samples (a folder of pictures, or a .npz with arr_0); network (the folder of inception-2015-12-05.pt for FID;
the name of a shipped classifier such as digits_classifier, or the checkpoint of one, for Frechet distances in its features);
reference (of a checkpoint: held_out or train, its own data; else, or for files: a folder, a .npz with arr_0, or a .npz of
statistics mu and sigma); n (10000), seed (0), label, nfe, replicates (real pairs of the noise floor; 3 for Inception, which
is slow, else 20), device (auto), cache (outputs/cache), out (a .json to write), trust (modules, as
a,b.c, that checkpoints may build parts from), and any solver or guidance setting. Each
score stands beside its noise floor, real against real, and with all it depends on.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

from common.device import pick_device
from common.distributed import rank
from common.errors import UserError
from common.files import end_of, write_atomically
from common.ranges import CountFrom2, Replicates, Seed, Steps
from configuration.settings import read_settings
from configuration.stored import allow
from evaluation.feature_networks import FeatureNetwork, InceptionFeatures, classifier_features
from evaluation.image_sets import open_npz, read_images
from evaluation.metrics.base_metric import Absent, Score
from evaluation.metrics.features import FeatureMetric, scores_against_statistics, scores_between
from evaluation.report import print_table
from evaluation.sample import generation_of, load
from run_files.checks import check_writable
from scripts.ranks import front_of_ranks


@dataclass(frozen=True)
class Settings:
    """The command line."""

    ckpt: Path | None = None
    samples: Path | None = None
    network: str | None = None
    reference: str | None = None
    n: CountFrom2 = 10_000
    seed: Seed = 0
    label: Seed | Literal["all"] | None = None
    nfe: Steps | None = None
    replicates: Replicates | None = None
    device: str = "auto"
    cache: Path = Path("outputs/cache")
    out: Path | None = None
    trust: str | None = None


def read_words(words: list[str]) -> tuple[Settings, list[str]]:
    """Own settings, and solver and guidance overrides, of a command line. UserError for anything else."""
    settings, overrides = read_settings(words, Settings, ("solver", "guidance"))
    if (settings.ckpt is None) == (settings.samples is None):
        raise UserError("give either ckpt=<a checkpoint> or samples=<a folder of pictures, or a .npz>")
    if settings.samples and settings.reference is None:
        raise UserError("samples= need something to be compared with; give reference=<a folder, or a .npz>")
    if settings.out:
        check_writable("out", end_of(settings.out).parent)
    return settings, overrides


def evaluate(words: list[str]) -> list[Score | Absent]:
    """Carry out the command; prints the scores and returns them."""
    settings, overrides = read_words(words)
    allow(settings.trust)
    results = of_files(settings) if settings.samples else of_checkpoint(settings, overrides)
    print_table([r for r in results if isinstance(r, Score)], [r for r in results if isinstance(r, Absent)])
    if settings.out and rank() == 0:
        write_atomically(settings.out, json.dumps([vars(result) for result in results], indent=1) + "\n")
    return results


def network_of(spec: str) -> FeatureNetwork:
    """Inception where its weights lie in that folder, else a classifier; the ranks share its work."""
    path = Path(spec)
    network = InceptionFeatures(spec) if path.is_dir() or path.name.startswith("inception") else classifier_features(spec)
    network.together = True
    return network


def replicates_of(settings: Settings, network: FeatureNetwork) -> int:
    """Real pairs of the noise floor; as configs/evaluation has them unless given."""
    return settings.replicates or (3 if isinstance(network, InceptionFeatures) else 20)


def of_checkpoint(settings: Settings, overrides: list[str]) -> list[Score | Absent]:
    """Return samples of a checkpoint against its own data, or against files."""
    model = load(str(settings.ckpt), settings.device, overrides)
    spec = settings.network or model.config["dataloaders"].get("training", {}).get("feature_network")
    if spec is None:
        raise UserError("this data names no feature network; give network=<folder of Inception's weights, or a classifier>")
    network, reference = network_of(spec), settings.reference or "held_out"
    if reference not in ("held_out", "train") and not Path(reference).exists():
        raise UserError(f"there is nothing at reference={reference}; give a folder of pictures, a .npz, held_out or train")
    made = generation_of(model, settings.n, settings.seed, settings.label, settings.nfe, settings.cache)
    if reference in ("held_out", "train"):
        return FeatureMetric(network, reference, replicates_of(settings, network)).compute(made)  # type: ignore[arg-type]
    return between(network, made.bytes_of(made.samples).cpu(), settings, model.device, made.made)


def of_files(settings: Settings) -> list[Score | Absent]:
    """Return images in files against images or statistics in files."""
    if settings.network is None:
        raise UserError("network is missing; give network=<the folder of Inception's weights, or a classifier>")
    images = read_images(Path(str(settings.samples)))
    return between(network_of(settings.network), images, settings, pick_device(settings.device), "")


def between(network: FeatureNetwork, images: Tensor, settings: Settings, device: Any, made: str) -> list[Score | Absent]:
    """Image bytes (N, C, H, W), made so, against a folder, a .npz of images, or one of statistics."""
    reference = Path(str(settings.reference))
    if reference.suffix == ".npz" and reference.is_file():
        arrays = open_npz(reference)
        if {"mu", "sigma"} <= set(arrays):
            return scores_against_statistics(network, images, arrays["mu"], arrays["sigma"], reference.name, device, made)
    replicates = replicates_of(settings, network)
    return scores_between(network, images, read_images(reference), settings.cache, device, made, replicates)


def main(words: list[str]) -> int:
    return front_of_ranks(words or ["--help"], __doc__, evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
