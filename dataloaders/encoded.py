"""Latents of pictures, encoded as they are needed."""

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from common.errors import UserError
from common.ranges import Count, EpochSize, SizeOr0
from dataloaders.base_dataloaders import Batch, EpochPlan, FlowDataset
from models.vae.stable_diffusion_vae import StableDiffusionVAE


class EncodedImages(FlowDataset):
    """Latents of a set of pictures, drawn from the autoencoder's posterior, the autoencoder being on the training device.

    It costs a forward pass of the encoder for each picture; scripts/cache_latents.py pays once.
    """

    def __init__(
        self,
        images: FlowDataset,
        vae: StableDiffusionVAE | None,
        state_shape: Sequence[Count],
        num_classes: SizeOr0,
        epoch_size: EpochSize | None = None,
        value_range: Sequence[float] | None = None,
    ):
        """images: pictures (3, H, W). UserError without an autoencoder, or when the configuration does not fit."""
        if vae is None:
            raise UserError("these pictures are encoded by an autoencoder; add vae=stable_diffusion vae.path=<folder>")
        channels, height, width = images.state_shape
        shape = (vae.latent_channels, height // vae.factor, width // vae.factor)
        if tuple(state_shape) != shape or channels != 3 or num_classes != images.num_classes or value_range is not None:
            raise UserError(
                f"pictures of {channels}x{height}x{width} in {images.num_classes} classes have latents of {list(shape)}; "
                "correct dataloaders.state_shape, num_classes or the size of dataloaders.images"
            )
        if epoch_size is not None:
            raise UserError("an epoch is all training pictures; leave dataloaders.epoch_size out, limit_data shortens it")
        super().__init__(list(shape), images.epoch_size, num_classes)
        self.images, self.vae, self.class_names = images, vae, images.class_names
        self.seen: Tensor | None = None  # some training rows

    def to(self, device: torch.device | str) -> Self:
        self.images, self.vae = self.images.to(device), self.vae.to(device)
        return self

    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield the pictures' own epoch, encoded with randomness from plan.generator."""
        self.images.epoch_size, self.images.num_workers = self.epoch_size, self.num_workers
        for x, label in self.images.epoch(plan):
            yield self.vae.encode(x, plan.generator), label

    @property
    def held_out_size(self) -> float:
        return self.images.held_out_size

    def held_out(self, count: int, generator: torch.Generator) -> Batch:
        x, label = self.images.held_out(count, generator)
        return self.vae.encode(x, generator), label

    def training_part(self, count: int) -> Batch | None:
        """Return at most `count`, encoded once."""
        part = self.images.training_part(count)
        if part is None:
            return None
        if self.seen is None:
            self.seen = self.vae.encode(part[0][:count], torch.Generator(part[0].device).manual_seed(0))
        return self.seen, None if part[1] is None else part[1][:count]

    def real_pair(self, first: int, second: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = self.images.real_pair(first, second, generator)
        return self.vae.encode(x, generator), self.vae.encode(y, generator)
