"""Scores by features: the formulas against closed forms and other code, floors, provenance, and what they catch."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import UserError
from evaluation.feature_networks import InceptionFeatures
from evaluation.fid import fit_gaussian, frechet_distance, from_moments, kernel_distance, neighbour_shares
from evaluation.metrics import distances
from evaluation.metrics.base_metric import Generation, to_bytes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim: int, seed: int) -> Tensor:
    root = normal(dim, dim, seed=seed)
    return root @ root.T / dim


def by_square_root(m1: Tensor, s1: Tensor, m2: Tensor, s2: Tensor) -> float:
    """The textbook formula, by scipy's matrix square root."""
    root = scipy.linalg.sqrtm((s1 @ s2).numpy())
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * np.trace(root).real)


@settings(max_examples=20, deadline=None)
@given(dim=st.integers(1, 12), seed=st.integers(0, 1000))
def test_frechet_distance_of_gaussians_is_the_closed_form(dim: int, seed: int) -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (sqrt l1 - sqrt l2)^2 over their eigenvalues."""
    rotation = torch.linalg.qr(normal(dim, dim, seed=seed)).Q
    l1, l2 = normal(2, dim, seed=seed + 1).square()
    m1, m2 = normal(2, dim, seed=seed + 2)
    first, second = (rotation @ values.diag() @ rotation.T for values in (l1, l2))
    exact = ((m1 - m2).square().sum() + (l1.sqrt() - l2.sqrt()).square().sum()).item()
    assert frechet_distance(from_moments(m1, first), from_moments(m2, second)) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("rows", [40, 7], ids=["more images than features", "fewer"])
def test_frechet_distance_of_features_is_that_of_their_moments(rows: int) -> None:
    x, y = normal(rows, 10), 0.7 * normal(50, 10, seed=1) + 0.3
    moments = [(side.mean(0), torch.cov(side.T)) for side in (x, y)]
    value = frechet_distance(fit_gaussian(x.float()), fit_gaussian(y.float()))
    tolerance = 1e-5 if rows == 40 else 1e-3  # of a singular product scipy's root knows eight digits fewer
    assert value == pytest.approx(by_square_root(*moments[0], *moments[1]), rel=tolerance, abs=tolerance)
    assert frechet_distance(from_moments(*moments[0]), from_moments(*moments[1])) == pytest.approx(value, abs=1e-5)
    for fit, (mean, cov) in zip((fit_gaussian(x), fit_gaussian(y)), moments, strict=True):
        assert torch.allclose(fit.mean, mean) and torch.allclose(fit.covariance, cov)


def test_frechet_distance_is_symmetric_and_zero_between_equals() -> None:
    a, b = (from_moments(normal(6, seed=seed), covariance(6, seed + 2)) for seed in (0, 1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9) != pytest.approx(0, abs=0.1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="two images"):
        fit_gaussian(normal(1, 3))


@pytest.mark.parametrize("rows", [300, 20], ids=["more images than features", "fewer"])
def test_distances_against_clean_fid_and_torchmetrics(rows: int) -> None:
    fid = pytest.importorskip("cleanfid.fid")
    frechet, kernel = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))
    x, y = normal(rows, 32), 1.2 * normal(250, 32, seed=1) + 0.1
    value, few = frechet_distance(fit_gaussian(x), fit_gaussian(y)), min(rows, 250)
    assert value == pytest.approx(fid.fid_from_feats(x.numpy(), y.numpy()), rel=1e-4, abs=1e-4)
    moments = [part for side in (x, y) for part in (side.mean(0), torch.cov(side.T))]
    assert value == pytest.approx(frechet._compute_fid(*moments).item(), rel=1e-4)
    ours = kernel_distance(x[:few], y[:few])
    assert ours == pytest.approx(kernel.poly_mmd(x[:few], y[:few]).item(), rel=1e-6)
    theirs = fid.kernel_distance(x[:few].numpy(), y[:few].numpy(), num_subsets=1, max_subset_size=few)
    assert ours == pytest.approx(theirs, rel=1e-6)


def naive_kernel_distance(x: Tensor, y: Tensor) -> float:
    k = lambda a, b: (float(a @ b) / len(a) + 1) ** 3  # noqa: E731
    within = [np.mean([k(p, q) for i, p in enumerate(s) for j, q in enumerate(s) if i != j]) for s in (x, y)]
    return float(within[0] + within[1] - 2 * np.mean([k(p, q) for p in x for q in y]))


@pytest.mark.parametrize("elements", [2**20, 30], ids=["one chunk", "many chunks"])
def test_kernel_distance_is_the_full_unbiased_estimator(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "CPU_ELEMENTS", elements)
    x, y = normal(11, 5), normal(8, 5, seed=1) + 0.4
    assert kernel_distance(x, y) == pytest.approx(naive_kernel_distance(x, y), rel=1e-9)


def naive_shares(x: Tensor, y: Tensor, k: int) -> dict[str, float]:
    inner = {name: [sorted(math.dist(p, q) for q in s)[k] for p in s] for name, s in (("x", x.tolist()), ("y", y.tolist()))}
    gaps = [[math.dist(p, q) for q in y.tolist()] for p in x.tolist()]
    in_y = [[gap <= inner["y"][j] for j, gap in enumerate(row)] for row in gaps]
    in_x = [[row[j] <= inner["x"][i] for i, row in enumerate(gaps)] for j in range(len(y))]
    return {
        "precision": float(np.mean([any(row) for row in in_y])),
        "recall": float(np.mean([any(row) for row in in_x])),
        "density": float(np.mean([sum(row) / k for row in in_y])),
        "coverage": float(np.mean([any(row[j] for row in in_y) for j in range(len(y))])),
    }


@pytest.mark.parametrize("elements", [2**20, 60], ids=["one chunk", "many chunks"])
def test_neighbour_shares_are_their_definition(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "CPU_ELEMENTS", elements)
    x, y = normal(23, 3) + 0.5, normal(31, 3, seed=1)
    assert neighbour_shares(x, y, 3) == pytest.approx(naive_shares(x, y, 3))


def test_neighbour_shares_tell_a_collapse_from_outliers() -> None:
    real = normal(400, 4)
    collapsed, scattered = 0.05 * normal(400, 4, seed=1), 4 * normal(400, 4, seed=2)
    few, wide, good = (neighbour_shares(x, real) for x in (collapsed, scattered, normal(400, 4, seed=3)))
    assert few["precision"] > 0.95 and few["recall"] < 0.1 and few["coverage"] < 0.3
    assert wide["precision"] < 0.4 and wide["density"] < 0.3
    assert min(good["precision"], good["recall"], good["coverage"]) > 0.85 and good["density"] == pytest.approx(1, abs=0.15)


def test_bytes_are_what_a_png_would_hold() -> None:
    values = torch.tensor([-1.2, -1.0, -0.998, 0.0, 0.5, 1.0, 7.0]).view(1, 1, 1, 7)
    assert to_bytes(values, None).flatten().tolist() == [0, 0, 0, 128, 191, 255, 255]
    assert to_bytes(torch.tensor([[[[0.0, 0.5, 1.0]]]]), (0.0, 1.0)).flatten().tolist() == [0, 128, 255]


def test_fid_says_which_file_goes_where(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt") as caught:
        InceptionFeatures(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


class Layers(torch.nn.Module):
    """2,048 features that are the mean of each colour, over and over."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).repeat(1, 683)[:, :2048]


class FakeInception(torch.nn.Module):
    """What clean-fid asks of the TorchScript file: .layers, called on resized images between -1 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_fid_goes_through_clean_fids_resize_and_wrapper(tmp_path: Path, generation: Callable[..., Generation]) -> None:
    """On a stand-in for the weights: the mean of an image's colours is known, and survives the resize."""
    pytest.importorskip("cleanfid")
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    network = InceptionFeatures(str(tmp_path))
    flat = torch.tensor([[0, 128, 255], [64, 64, 64]], dtype=torch.uint8)[:, :, None, None].expand(2, 3, 8, 8)
    features = network.features(flat, torch.device("cpu"))
    assert features.shape == (2, 2048)
    assert torch.allclose(features[:, :3], (flat[:, :, 0, 0].float() - 128) / 128, atol=1e-5)
    assert network.metric("frechet_distance") == "eval/fid" and network.metric("kernel_distance") == "eval/kid"
    assert network.metric("recall") == "eval/recall" and network.refusal((4, 32, 32)) is not None
    assert "clean-fid" in network.describe() and len(network.weights) == 16
    gray = network.features(flat[1:, :1], torch.device("cpu"))
    assert torch.equal(gray, features[1:])


def test_weights_that_are_no_inception_are_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("cleanfid")
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"not TorchScript")
    with pytest.raises(UserError, match="is damaged"):
        InceptionFeatures(str(tmp_path)).features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.device("cpu"))
