"""The autoencoder between images and the latents that large models are trained on."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.ranges import Count

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
HUB_ID = "stabilityai/sd-vae-ft-ema"
PIXELS = 2**19  # image pixels encoded or decoded at once: 8 images of 256x256, about 3 GB of activations in fp32


class StableDiffusionVAE(nn.Module):
    """The autoencoder of Stable Diffusion (Rombach et al. 2021, arXiv 2112.10752), frozen: images of 8x8 pixels a latent.

    latents = scaling_factor (z - shift_factor), of about unit variance, both factors the autoencoder's own; z is diffusers'.
    path: a folder with config.json and diffusion_pytorch_model.safetensors, or, where there is a network, a hub id.
    state_shape: of the data that are to be its latents. UserError when they are not, when a file is missing or unfit, or
    when diffusers is not installed. Neither direction clips: what draws or scores a picture does.
    """

    def __init__(self, path: str, state_shape: list[Count] | None = None):
        super().__init__()
        self.autoencoder = load_autoencoder(path).eval().requires_grad_(False)
        settings = self.autoencoder.config
        self.latent_channels: int = settings.latent_channels
        self.factor: int = 2 ** (len(settings.block_out_channels) - 1)  # image pixels along the side of a latent one
        self.scale: float = settings.scaling_factor
        self.shift: float = settings.shift_factor or 0.0
        if state_shape is not None and (len(state_shape) != 3 or state_shape[0] != self.latent_channels):
            raise UserError(
                f"the VAE in {path} decodes latents of shape [{self.latent_channels}, height, width], but the data has "
                f"states of shape {list(state_shape)}; leave vae out, or encode the images to latents first"
            )

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8), means or, with a generator on any device,
        samples.

        UserError for sides that are no multiples of 8.
        """
        mean, std = self.moments(images)
        if generator is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (B, 4, H/8, W/8) each, of the latents of images (B, 3, H, W) in [-1, 1].

        UserError for sides that are no multiples of 8.
        """
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise UserError(
                f"the VAE encodes blocks of {self.factor}x{self.factor} pixels, which do not tile images of "
                f"{height}x{width}; crop or resize them to multiples of {self.factor}"
            )
        parts = images.split(self.rows(height * width))
        posteriors = [self.autoencoder.encode(part).latent_dist for part in parts]
        mean = torch.cat([posterior.mean for posterior in posteriors])
        return self.scale * (mean - self.shift), self.scale * torch.cat([posterior.std for posterior in posteriors])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return latents (B, 4, h, w) -> images (B, 3, 8h, 8w), about [-1, 1], on the same device."""
        pixels = latents.shape[2] * latents.shape[3] * self.factor**2
        parts = (latents / self.scale + self.shift).split(self.rows(pixels))
        return torch.cat([self.autoencoder.decode(part).sample for part in parts])

    def rows(self, pixels: int) -> int:
        """Return images of so many pixels that go through at once: a bound on memory whatever the batch."""
        return max(1, PIXELS // pixels)


def load_autoencoder(path: str) -> Any:
    """Return diffusers' AutoencoderKL, in fp32. UserError when it cannot be had whole."""
    if find_spec("diffusers") is None:
        raise UserError("vae needs the diffusers package, which is not installed: pip install 'diffusers>=0.42,<0.43'")
    on_hub = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    place = path if on_hub else str(checked_folder(Path(path).expanduser()))
    from diffusers import AutoencoderKL  # takes seconds to import

    try:
        autoencoder, found = AutoencoderKL.from_pretrained(
            place, local_files_only=not on_hub, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:  # no network, not JSON, a half download, weights of another shape
        where = "from the hub (nor is it a folder here)" if on_hub else "although the files are there"
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"vae.path={path} cannot be loaded {where}; {remedy(path, on_hub)} ({first})") from error
    if found["missing_keys"]:  # diffusers would only warn, and decode with random weights
        raise UserError(f"{place}/{WEIGHTS_FILE} lacks {len(found['missing_keys'])} of the weights; {remedy(path, on_hub)}")
    return autoencoder


def checked_folder(folder: Path) -> Path:
    """Return the folder itself. UserError when it, or a file in it, is missing."""
    if not folder.is_dir():
        raise UserError(f"vae.path={folder} is not a folder; {remedy(str(folder))}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"vae.path={folder} has no {name}; {remedy(str(folder))}")
    return folder


def remedy(path: str, on_hub: bool = False) -> str:
    """Return what to do about a folder that is not an autoencoder's."""
    folder = "a folder, give it as vae.path," if on_hub else path
    source = path if on_hub else HUB_ID
    return f"put {CONFIG_FILE} and {WEIGHTS_FILE} of {source} on the Hugging Face hub into {folder} and try again"
