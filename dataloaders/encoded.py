"""Latents of pictures, encoded as they are needed."""

from collections.abc import Iterator
from typing import Self, Unpack

import torch
from torch import Tensor

from common.errors import UserError
from dataloaders.base_dataloaders import Batch, Described, EpochPlan, FlowDataset, Moments
from models.vae.stable_diffusion_vae import StableDiffusionVAE


class EncodedImages(FlowDataset):
    """Latents of a set of pictures, drawn from the autoencoder's posterior, the autoencoder being on the training device.

    It costs a forward pass of the encoder for each picture; scripts/cache_latents.py pays once.
    """

    def __init__(self, images: FlowDataset, vae: StableDiffusionVAE | None, **described: Unpack[Described]):
        """images: pictures (3, H, W). UserError without an autoencoder, or when the configuration does not fit."""
        channels, height, width = images.state_shape
        if vae is None or channels != 3:
            raise UserError(
                f"pictures of 3 channels, not {channels}, are encoded, and by an autoencoder; add vae=stable_diffusion "
                "vae.path=<folder>, and keep dataloaders.images.channels=3"
            )
        shape = (vae.latent_channels, height // vae.factor, width // vae.factor)
        super().__init__(shape, images.epoch_size, images.num_classes, None, described)
        self.images, self.vae, self.class_names = images, vae, images.class_names
        self.altered = images.altered or "latents are drawn afresh"
        self.views = 0 if images.altered else 1 + images.mirrored
        self.sizes, self.known = (images.epoch_size, images.held_out_size), dict[int, tuple[Moments, Moments]]()
        self.seen: Tensor | None = None  # some training rows

    def to(self, device: torch.device | str) -> Self:
        self.images, self.vae = self.images.to(device), self.vae.to(device)
        return self

    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        """Yield the pictures' own epoch, encoded with randomness from plan.generator."""
        self.images.epoch_size, self.images.num_workers = self.epoch_size, self.num_workers
        for x, label in self.images.epoch(plan):
            yield self.vae.encode(x, plan.generator), label

    def trial_rows(self, count: int, generator: torch.Generator) -> Batch:
        x, label = self.images.trial_rows(count, generator)
        return self.vae.encode(x, generator), label

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

    def moments(self, count: int, by_class: bool) -> tuple[Moments, Moments]:
        """Encoded once; of random pictures, by_class or not."""
        if count not in self.known:
            part = self.images.training_part(count)
            assert part is not None
            unseen = self.images.held_out(count, torch.Generator(part[0].device).manual_seed(0))
            first, second = (self.moments_of(*given, count) for given in zip((part, unseen), self.sizes, strict=True))
            self.known[count] = first, second
        return self.known[count]

    def moments_of(self, part: Batch, there: float, count: int) -> Moments:
        """Return the moments of at most `count` pictures of so many, as they are and, if training mirrors them, mirrored."""
        x, label = part[0][:count], None if part[1] is None else part[1][:count]
        views = [self.vae.moments(x if view == 0 else x.flip(-1)) for view in range(self.views)]
        mean, std = (torch.cat([view[k] for view in views]).float() for k in (0, 1))
        label = None if label is None else label.repeat(self.views, *(1,) * (label.ndim - 1))
        return Moments(mean, std, label, len(x) >= there)

    def real_pair(self, first: int, second: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = self.images.real_pair(first, second, generator)
        return self.vae.encode(x, generator), self.vae.encode(y, generator)
