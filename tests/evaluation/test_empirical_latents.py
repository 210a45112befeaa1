"""The exact flow of cached latents, drawn afresh from their moments in two views each, and of a part of large data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributions

from dataloaders.encoded import EncodedImages
from dataloaders.latent_cache import LatentCache
from dataloaders.sources import GaussianSource
from dataloaders.tensor_dataset import TensorDataset
from dev.subsample_check import carry_out, compared
from evaluation.closed_forms import ExactFlow
from evaluation.empirical_flow import DrawnFlow, EmpiricalFlow
from evaluation.metrics.empirical import Memorisation, memorisation, training_flow
from losses.paths import LinearPath, ProbabilityPath
from tests.dataloaders.streamed import build
from tests.evaluation.test_empirical import PATHS, SHAPE, STD, FieldNetwork, GaussianMixture, objective_of

MEAN, SPREAD, WIDTH = 0.2, 0.5, 0.25  # of the means of latents, and each latent's own standard deviation
LAW = GaussianMixture(torch.ones(1), torch.full((1, 24), MEAN), torch.tensor([(SPREAD**2 + WIDTH**2) ** 0.5]))


def write_latents(folder: Path, train: int = 80, held_out: int = 60) -> Path:
    """A cache of random latents, half of each class: their means are draws of N(MEAN, SPREAD^2 I), two for each picture."""
    g, shards = np.random.RandomState(0), list[dict[str, Any]]()
    for part, rows in (("train", train // 2), ("train", train - train // 2), ("held_out", held_out)):
        means = MEAN + SPREAD * g.randn(rows, 2, 1, *SHAPE)
        stored = np.concatenate([means, np.full_like(means, WIDTH)], axis=2).astype(np.float16)
        name = f"{part}-{len(shards):05d}"
        shard: dict[str, Any] = {"part": part, "rows": rows, "file": f"{name}.npy", "labels": f"{name}-labels.npy"}
        for key, array in (("file", stored), ("labels", np.arange(rows) % 2)):
            np.save(folder / shard[key], array)
            shard |= {f"{key}_bytes": (folder / shard[key]).stat().st_size, f"{key}_blake2b": ""}
        shards.append(shard)
    about = {"format": 2, "finished": True, "made_from": {}, "num_classes": 2, "shape": list(SHAPE), "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def latents(folder: Path, **settings: Any) -> LatentCache:
    dataset = build("imagenet", {"path": folder, **settings})
    assert isinstance(dataset, LatentCache)
    return dataset


def by_score(path: ProbabilityPath, rows: Tensor, stds: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """v = alpha' E[x1 | z] + sigma' E[x0 | z] of one state, from the gradient of torch's own log density, in float64."""
    p, at = path.at(t.double()), z.double().flatten().requires_grad_()
    widths = ((p.alpha * stds.double()) ** 2 + (p.sigma * STD) ** 2).sqrt().flatten(1)
    each = distributions.Independent(distributions.Normal(p.alpha * rows.double().flatten(1), widths), 1)
    law = distributions.MixtureSameFamily(distributions.Categorical(torch.ones(len(rows)).double()), each)
    x0 = -p.sigma * STD**2 * torch.autograd.grad(law.log_prob(at), at)[0]
    return (p.alpha_dot * (at.detach() - p.sigma * x0) / p.alpha + p.sigma_dot * x0).reshape(z.shape)


@pytest.mark.parametrize("case", ["plain", "conditional", "without", "with"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_flow_of_rows_drawn_afresh_is_the_definition(
    path: ProbabilityPath, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four pictures in two views each; half of the states in float64, at times of which several are the same."""
    monkeypatch.setattr("evaluation.empirical_flow.WEIGHTS", 24)  # several chunks of states and of rows
    monkeypatch.setattr("evaluation.empirical_flow.ROWS", 72)
    g = torch.Generator().manual_seed(0)
    rows, stds = 0.6 * torch.randn(8, *SHAPE, generator=g), 0.05 + 0.4 * torch.rand(8, *SHAPE, generator=g)
    labels, index = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0]), torch.arange(24) % 8
    t = path.last_time * torch.tensor([0.05, 0.3, 0.6, 0.96]).repeat_interleave(6)
    x1 = rows[index] + stds[index] * torch.randn(24, *SHAPE, generator=g)
    z = path.state(STD * torch.randn(24, *SHAPE, generator=g), x1, t.reshape(-1, 1, 1, 1))
    flow = DrawnFlow(rows, STD, path, labels if case == "conditional" else None, views=2, stds=stds)
    more, more_std = 0.6 * torch.randn(24, *SHAPE, generator=g), torch.full((24, *SHAPE), 0.2)
    for states, bound in ((z, 1e-4), (z.double(), 1e-9)):
        if case == "with":
            found = flow.velocity_with(states, t, more, None, more_std)
        else:
            own = labels[index] if case == "conditional" else None
            found = flow.velocity(states, t, own, index if case == "without" else None)
        for k, state in enumerate(z):
            kept = [i for i in range(8) if case != "conditional" or labels[i] == labels[index[k]]]
            kept = [i for i in kept if case != "without" or i % 4 != index[k] % 4]
            known, widths = rows[kept], stds[kept]
            if case == "with":
                known, widths = torch.cat([known, more[k : k + 1]]), torch.cat([widths, more_std[k : k + 1]])
            truth = by_score(path, known, widths, state, t[k])
            assert found.dtype == states.dtype and (found[k].double() - truth).norm() <= bound * truth.norm()


def test_rows_without_a_width_are_the_plain_flow() -> None:
    g = torch.Generator().manual_seed(0)
    rows, z, t = torch.randn(9, 5, generator=g), torch.randn(20, 5, generator=g), torch.linspace(0.1, 0.9, 20)
    plain, drawn = EmpiricalFlow(rows, STD, LinearPath()), DrawnFlow(rows, STD, LinearPath(), stds=torch.zeros(9, 5))
    torch.testing.assert_close(drawn(z.double(), t), plain(z.double(), t), rtol=1e-12, atol=1e-12)
    with_row = [
        flow.velocity_with(z.double(), t, z, None, std) for flow, std in ((plain, None), (drawn, torch.zeros(20, 5)))
    ]
    torch.testing.assert_close(*with_row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("sample", ["true", "false"])
def test_a_memoriser_of_latents_copies_and_their_law_does_not(folder: Path, sample: str, conditional: bool) -> None:
    dataset, source = latents(folder, sample=sample), GaussianSource(list(SHAPE), STD)
    objective = objective_of(FieldNetwork(lambda x, t, *label: x, 2 if conditional else 0))
    flow = training_flow(objective, dataset, source)
    assert isinstance(flow, DrawnFlow if sample == "true" else EmpiricalFlow) and flow.views == 2
    stored = np.concatenate([np.load(folder / f"train-{k:05d}.npy") for k in (0, 1)])[:, :, 0]  # (80, views, ...)
    pairs = sorted(tuple(pair.flatten().tolist()) for pair in torch.stack([flow.rows[:80], flow.rows[80:]], 1))
    assert pairs == sorted(tuple(pair.flatten().tolist()) for pair in stored.astype(np.float32))
    objective.network.field = flow  # type: ignore[assignment]
    found = memorisation(objective, dataset, source, 400)
    assert isinstance(found, Memorisation) and found.excess.max() < 1e-6 * found.loss.mean()
    assert found.quotient.min() < 0.01 and "the network copies its training data at t >=" in found.verdict
    assert "80 training rows, in 2 views each" in found.of and found.subsample is None
    width = WIDTH if sample == "true" else 0.0
    law = GaussianMixture(LAW.weights, LAW.means, torch.tensor([(SPREAD**2 + width**2) ** 0.5]))
    exact = ExactFlow(law, STD, objective.path)
    objective.network.field = lambda x, t, *label: exact(x, t)  # type: ignore[assignment]
    found = memorisation(objective, dataset, source, 1600)
    assert isinstance(found, Memorisation) and found.quotient.min() > 0.8
    more = found.loss - found.least - found.excess  # no field has less loss on the latents as training draws them
    error = (more.var(1) / more.shape[1]).sum().sqrt() / 8
    assert abs(more.mean()) < 4 * error < 0.3 * found.excess.mean()


def test_of_a_conditional_network_whole_classes_are_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.metrics.empirical.POINTS", 45)
    source = GaussianSource(list(SHAPE), STD)
    for classes, words in (
        (2, "40 of 80 training rows, in 2 views each, all of 1 of 2 classes"),
        (0, "45 of 80 training rows"),
    ):
        objective = objective_of(FieldNetwork(lambda x, t, *label: x, classes))
        found = memorisation(objective, latents(folder), source, 128)
        assert isinstance(found, Memorisation) and words in found.of
        assert (found.subsample is None) == (classes == 2)
        assert classes == 2 or found.by_time["empirical_excess_loss_subsample"].shape == (8,)
        train, unseen = latents(folder).moments(45, by_class=classes == 2)
        assert train.label is not None and unseen.label is not None
        assert len(train.label.unique()) == len(unseen.label.unique()) == (1 if classes else 2)
        assert train.whole == (classes == 2) and len(train.mean) == (80 if classes else 90)


class Halves:
    """An autoencoder that gives the first of two pixels, and the standard deviation 0.1."""

    latent_channels, factor = 3, 2

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x[:, :, ::2, ::2]
        return mean, torch.full_like(mean, 0.1)


@pytest.mark.parametrize("mirrored", [False, True])
def test_latents_encoded_as_they_are_needed_have_moments_of_each_view(mirrored: bool) -> None:
    x = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = TensorDataset(x, torch.arange(50) % 2, torch.arange(30, 50), num_classes=2)
    images.mirrored = mirrored
    dataset = EncodedImages(images, Halves())  # type: ignore[arg-type]
    (train, *_), unseen = dataset.moments(2000, by_class=False)
    assert dataset.views == 1 + mirrored and len(unseen.mean) == 20 * dataset.views and unseen.whole
    seen = images.training_part(30)[0]
    torch.testing.assert_close(train, torch.cat([seen, *[seen.flip(3)] * mirrored])[:, :, ::2, ::2], rtol=0, atol=0)
    images.altered = "crop_padding=2"
    assert EncodedImages(images, Halves()).views == 0  # type: ignore[arg-type]


def test_the_error_of_a_part_of_the_rows_is_stated_by_half_of_them() -> None:
    """Of 180 digits, beside the sum over all 1,438."""
    stated, true = compared(180, 5, 64)
    assert (stated / true).min() > 0.75 and (stated / true).max() < 1.3 and true[0] < 0.06 < 0.9 < true[-1]
    assert "| 12, true |" in carry_out(["rows=12", "parts=1"])
