"""The Stable Diffusion autoencoder, on a tiny random one saved as diffusers saves it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from configuration.compose import compose_config, resolved
from evaluation.parts import build_decoder
from models.vae import stable_diffusion_vae
from models.vae.stable_diffusion_vae import CONFIG_FILE, WEIGHTS_FILE, StableDiffusionVAE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(vae_folder: Path, tmp_path: Path) -> Path:
    """The same folder, to be changed."""
    return shutil.copytree(vae_folder, tmp_path / "vae")


def change_config(place: Path, **settings: Any) -> None:
    file = place / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def images(count: int = 3, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_are_diffusers_shifted_and_scaled_and_decode_undoes_both(shift: float | None, copy: Path) -> None:
    change_config(copy, scaling_factor=0.25, shift_factor=shift)
    vae = StableDiffusionVAE(str(copy))
    posterior = vae.autoencoder.encode(images()).latent_dist
    latents = vae.encode(images())
    assert latents.shape == (3, 4, 2, 3)
    assert torch.allclose(latents, 0.25 * (posterior.mean - (shift or 0)), atol=1e-6)
    decoded = vae.decode(latents)
    assert decoded.shape == (3, 3, 16, 24)
    assert torch.allclose(decoded, vae.autoencoder.decode(posterior.mean).sample, atol=1e-5)


def test_a_generator_samples_the_posterior(vae_folder: Path) -> None:
    vae = StableDiffusionVAE(str(vae_folder))
    one = images(1).expand(2000, -1, -1, -1)
    first, again, other = (vae.encode(one, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    posterior = vae.autoencoder.encode(images(1)).latent_dist
    assert torch.allclose(first.mean(0), vae.scale * posterior.mean[0], atol=5 * vae.scale * posterior.std.max().item() / 44)
    assert torch.allclose(first.std(0), vae.scale * posterior.std[0], rtol=0.1)


def test_memory_is_bounded_by_passing_a_few_images_at_once(vae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, seen = StableDiffusionVAE(str(vae_folder)), []
    for part in (vae.autoencoder.encoder, vae.autoencoder.decoder):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        latents = vae.encode(images(5), torch.Generator().manual_seed(0))
        return latents, vae.decode(latents)

    whole = both()
    monkeypatch.setattr(stable_diffusion_vae, "PIXELS", 2 * 16 * 24)
    for one, other in zip(whole, both(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert seen == [5, 5, 2, 2, 1, 2, 2, 1]
    assert vae.rows(10**9) == 1


def test_decode_does_not_clip(vae_folder: Path) -> None:
    vae = StableDiffusionVAE(str(vae_folder))
    bias = vae.autoencoder.decoder.conv_out.bias
    bias.copy_(torch.tensor([0.0, 3.0, -3.0]))
    decoded = vae.decode(torch.zeros(1, 4, 2, 2))
    assert decoded[:, 1].min() > 1 and decoded[:, 2].max() < -1


def test_it_is_frozen_and_leaves_no_graph(vae_folder: Path) -> None:
    vae = StableDiffusionVAE(str(vae_folder))
    assert not vae.autoencoder.training and not any(p.requires_grad for p in vae.parameters())
    assert not vae.decode(torch.zeros(1, 4, 2, 2, requires_grad=True)).requires_grad
    assert not vae.encode(images().requires_grad_()).requires_grad


def no_weights(place: Path) -> None:
    (place / WEIGHTS_FILE).unlink()


def half_download(place: Path) -> None:
    (place / WEIGHTS_FILE).write_bytes((place / WEIGHTS_FILE).read_bytes()[:5000])


def pointer(place: Path) -> None:
    (place / WEIGHTS_FILE).write_text("version https://git-lfs.github.com/spec/v1\n")


def lacking_weights(place: Path) -> None:
    weights = load_file(place / WEIGHTS_FILE)
    save_file({name: w for name, w in weights.items() if "conv_out" not in name}, place / WEIGHTS_FILE, {"format": "pt"})


@pytest.mark.parametrize("damage, words", [
    (shutil.rmtree, "is not a folder; put config.json and diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-ema"),
    (lambda place: (place / CONFIG_FILE).unlink(), "has no config.json; put"),
    (no_weights, "has no diffusion_pytorch_model.safetensors; put"),
    (lambda place: (place / CONFIG_FILE).write_text("{"), "cannot be loaded although the files are there; put .*JSON"),
    (half_download, "cannot be loaded although the files are there; put"),
    (pointer, "cannot be loaded although the files are there; put .*git-lfs"),
    (lambda place: change_config(place, latent_channels=8), "cannot be loaded although the files are there; put"),
    (lacking_weights, "lacks 4 of the weights; put"),
])  # fmt: skip
def test_a_folder_that_is_no_autoencoder_is_one_sentence(damage: Callable[[Path], None], words: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(UserError, match=words) as caught:
        StableDiffusionVAE(str(copy))
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_weights_with_the_older_names_of_attention_load(copy: Path) -> None:
    """As sd-vae-ft-ema's file has them."""
    expected = StableDiffusionVAE(str(copy)).decode(torch.ones(1, 4, 2, 2))
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(copy / WEIGHTS_FILE)
    for new, old in names.items():
        weights = {name.replace(new, old): w for name, w in weights.items()}
    assert any("query" in name for name in weights)
    save_file(weights, copy / WEIGHTS_FILE, {"format": "pt"})
    assert torch.equal(StableDiffusionVAE(str(copy)).decode(torch.ones(1, 4, 2, 2)), expected)


def test_a_hub_id_without_a_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    asked: list[tuple[str, bool]] = []

    def offline(place: str, local_files_only: bool, **_: Any) -> None:
        asked.append((place, local_files_only))
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", offline)
    with pytest.raises(UserError, match=r"from the hub .* of some/vae on the Hugging Face hub into a folder") as caught:
        StableDiffusionVAE("some/vae")
    assert asked == [("some/vae", False)] and "\n" not in str(caught.value)


def test_without_diffusers_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stable_diffusion_vae, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'diffusers"):
        StableDiffusionVAE("anything")


def test_sides_that_are_no_multiples_of_eight_are_one_sentence(vae_folder: Path) -> None:
    with pytest.raises(UserError, match="blocks of 8x8 pixels, which do not tile images of 12x16"):
        StableDiffusionVAE(str(vae_folder)).encode(images(1, 12, 16))


def latent_words(tmp_path: Path, channels: int) -> list[str]:
    """A run on latents of so many channels."""
    np.save(tmp_path / "latents.npy", np.zeros((20, channels, 4, 4), dtype="float32"))
    return ["run_name=x", "dataloaders=array", f"dataloaders.path={tmp_path / 'latents.npy'}", "model=unet_small"]


def test_a_run_on_latents_gets_the_decoder_and_others_none(vae_folder: Path, tmp_path: Path) -> None:
    words = latent_words(tmp_path, 4)
    config = resolved(compose_config([*words, "vae=stable_diffusion", f"vae.path={vae_folder}"]))
    decode = build_decoder(config, torch.device("cpu"))
    assert decode is not None and decode(torch.zeros(2, 4, 4, 4)).shape == (2, 3, 32, 32)
    plain = resolved(compose_config(words))
    assert "vae" not in plain and build_decoder(plain, torch.device("cpu")) is None
    assert build_decoder(plain | {"vae": None}, torch.device("cpu")) is None


def test_data_that_are_not_the_vaes_latents_are_one_sentence(vae_folder: Path, tmp_path: Path) -> None:
    for words in (latent_words(tmp_path, 3), ["run_name=x"]):
        config = resolved(compose_config([*words, "vae=stable_diffusion", f"vae.path={vae_folder}"]))
        with pytest.raises(UserError, match=r"latents of shape \[4, height, width\], but the data has states of") as caught:
            build_decoder(config, torch.device("cpu"))
        assert "\n" not in str(caught.value)
