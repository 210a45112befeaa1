"""Networks whose features sets of images are compared by: our own classifiers, and the Inception of the FID."""

import hashlib
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.distributed import concatenated, world
from common.errors import UserError, require_package
from common.progress import progress
from configuration.build import build
from configuration.stored import stored_config
from dataloaders.array_header import reading
from models.classifier.classifier import Classifier
from run_files.checkpoint import load_checkpoint

SHIPPED = Path(__file__).resolve().parents[1] / "models" / "classifier"  # <name>.safetensors, beside the code
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SOURCE = "stylegan2-ada-pytorch/pretrained/metrics of NVIDIA's research downloads"


class FeatureNetwork(ABC):
    """Maps images to features. Sees bytes, as a file holds them, so that samples and their files score alike.

    name: in metric names. weights: hash of its weights. resize: what is done to an image before it is seen.
    num_classes: of its answers, 0 where it gives none. chunk: images seen at once. together: every rank asks for the same
    features, and computes a share of them.
    """

    name: str
    weights: str
    resize: str
    num_classes: int = 0
    chunk: int
    together: bool = False

    @abstractmethod
    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Return why it cannot see images of this shape (C, H, W); None if it can."""

    @abstractmethod
    def chunk_features(self, images: Tensor, device: torch.device) -> Tensor:
        """Return features (B, F) fp32 of at most `chunk` images, bytes (B, C, H, W)."""

    @torch.no_grad()
    def features(self, images: Tensor, device: torch.device) -> Tensor:
        """Return features (N, F) fp32 on `device` of bytes (N, C, H, W)."""
        parts, sharing = images.split(self.chunk), world() if self.together else 1
        with progress(f"features by {self.name}", len(parts)) as shown:

            def of(part: Tensor) -> Tensor:
                found = self.chunk_features(part, device)
                shown.advance(sharing)
                return found

            return concatenated(parts, of, self.together).to(device)

    def metric(self, score: str) -> str:
        """Return the metric's full name for a score: "frechet_distance", "kernel_distance", "precision", ..."""
        return f"eval/{score}_{self.name}"

    def describe(self) -> str:
        return f"{self.name} (weights {self.weights}), {self.resize}"


class ClassifierFeatures(FeatureNetwork):
    """What the last layer of one of our classifiers reads. Frechet distances between them are no FID. Gray images are shown
    as RGB to a classifier of RGB images."""

    resize = "no resize"
    chunk = 500

    def __init__(self, classifier: Classifier, name: str, shape: list[int], value_range: tuple[float, float]):
        self.classifier, self.name, self.shape, self.value_range = classifier, name, tuple(shape), value_range
        self.num_classes = classifier.num_classes
        self.weights = weights_hash(classifier)

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        if shape == self.shape or (shape == (1, *self.shape[1:]) and self.shape[0] == 3):
            return None
        return f"{self.name} sees images of shape {list(self.shape)}, not {list(shape)}"

    def chunk_features(self, images: Tensor, device: torch.device) -> Tensor:
        low, high = self.value_range
        shown = images.expand(-1, self.shape[0], -1, -1).to(device)
        return self.classifier.to(device).features(low + (high - low) * shown.float() / 255)

    def answers(self, features: Tensor) -> Tensor:
        """Return the classes (N,) that features (N, F) are taken for."""
        return self.classifier.head(features).argmax(1)


class InceptionFeatures(FeatureNetwork):
    """Inception v3 as FID has it, by clean-fid's resize and wrapper (Parmar et al. 2022, arXiv 2104.11222).

    path: the folder that holds inception-2015-12-05.pt, or that file. Gray images are shown as RGB.
    Raises UserError when the file is not there, or clean-fid is not installed.
    """

    name = "inception"
    resize = "clean-fid's resize to 299x299"
    chunk = 50
    names = {"frechet_distance": "eval/fid", "kernel_distance": "eval/kid"}

    def __init__(self, path: str):
        folder = Path(path).parent if Path(path).suffix == ".pt" else Path(path)
        self.file = folder / INCEPTION_FILE
        if not self.file.is_file():
            raise UserError(
                f"FID needs the weights of its Inception network in {self.file}; download {INCEPTION_FILE} (91 MB, "
                f"{INCEPTION_SOURCE}) there, or give their folder by evaluation.metrics.fid.network.path"
            )
        require_package("cleanfid", "FID", "fid")
        self.weights = hashlib.sha256(self.file.read_bytes()).hexdigest()[:16]

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        return None if shape[0] in (1, 3) else f"Inception sees gray or RGB images, not {shape[0]} channels"

    def chunk_features(self, images: Tensor, device: torch.device) -> Tensor:
        from cleanfid.resize import build_resizer

        resizer, network = build_resizer("clean"), load_inception(str(self.file.parent)).to(device)
        colored = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu()
        resized = np.stack([resizer(image).transpose(2, 0, 1) for image in colored.numpy()])
        return network(torch.from_numpy(resized).to(device))

    def metric(self, score: str) -> str:
        return self.names.get(score, f"eval/{score}")


@cache
def load_inception(folder: str) -> Any:
    """Return clean-fid's wrapper around the TorchScript file. UserError when that is damaged."""
    from cleanfid.inception_torchscript import InceptionV3W

    with reading(Path(folder) / INCEPTION_FILE):
        return InceptionV3W(folder, download=False).eval()


def weights_hash(network: torch.nn.Module) -> str:
    """Return a hash of the names and values of all weights: the same for a checkpoint and its export."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@cache
def classifier_features(path: str) -> ClassifierFeatures:
    """Return the features of a classifier: the name of a shipped one, or a checkpoint, or a run's model.safetensors.

    UserError when there is none, or it holds something else.
    """
    from evaluation.parts import load_network

    file = SHIPPED / f"{path}.safetensors" if "/" not in path and (SHIPPED / f"{path}.safetensors").is_file() else Path(path)
    payload = load_checkpoint(file)
    config = stored_config(file, payload)
    network = build(config["model"])
    if not isinstance(network, Classifier):
        raise UserError(f"{file} holds no classifier; train one with loss=cross_entropy")
    load_network(network, payload["ema"], file)
    data = config["dataloaders"]
    low, high = data["value_range"] or (-1.0, 1.0)
    return ClassifierFeatures(network.eval().requires_grad_(False), config["run_name"], data["state_shape"], (low, high))
