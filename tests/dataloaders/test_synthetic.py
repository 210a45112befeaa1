"""Synthetic data against closed forms: moments and densities of the mixtures, the curves of the shapes."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from common.errors import UserError
from configuration.build import build
from configuration.compose import compose_config, resolved
from dataloaders.gaussian_mixture import GaussianMixture
from dataloaders.planar_shapes import Checkerboard, Circles, Moons, Pinwheel, PlanarShape, SCurve, Spirals
from dataloaders.synthetic import EightGaussians, Gaussian, KMeans, Mixture, MixtureDataset, SyntheticDataset

COUNT = 20_000
MIXTURES = [
    KMeans(),
    KMeans(weights=[1, 2, 3, 4, 10], std=0.5),
    KMeans(std=[0.1, 0.2, 0.3, 0.4, 0.5]),
    EightGaussians(std=[0.1, 0.2] * 4, weights=[1, 3] * 4),
    Gaussian(),
    Gaussian([1.0, -2.0, 0.5], 1.5, state_shape=[3]),
    EightGaussians(),
    Mixture([[0.0, 1.0], [2.0, 0.0], [-1.0, -1.0]], [0.1, 0.3, 0.5], [1, 2, 5]),
]


def draw(dataset: SyntheticDataset, count: int = COUNT) -> tuple[Tensor, Tensor]:
    x, label = dataset.draw(count, torch.Generator().manual_seed(3))
    return x.double(), label


def uneven_mixture() -> GaussianMixture:
    weights, stds = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.3, 0.6, 1.0])
    return GaussianMixture(weights, torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.0, -2.0]]), stds).to(dtype=torch.float64)


@pytest.mark.parametrize("dataset", MIXTURES, ids=lambda dataset: type(dataset).__name__)
def test_mixture_moments(dataset: MixtureDataset) -> None:
    """Overall mean and covariance, and those of every component, within five standard errors."""
    mixture, (x, label) = dataset.mixture.to(dtype=torch.float64), draw(dataset)
    mean = mixture.weights @ mixture.means
    spread = mixture.means - mean
    covariance = (mixture.weights * spread.T) @ spread + mixture.weights @ mixture.stds**2 * torch.eye(len(mean))
    bound = 5 / math.sqrt(COUNT)
    assert ((x.mean(0) - mean).abs() < bound * covariance.diagonal().sqrt()).all()
    assert ((x.T.cov() - covariance).abs() < 2 * bound * covariance.diagonal().max()).all()
    assert ((label.bincount() / COUNT - mixture.weights).abs() < bound * mixture.weights.sqrt()).all()
    residual = (x - mixture.means[label]) / mixture.stds[label, None]
    for component in range(len(mixture.weights)):
        own = residual[label == component]
        assert ((own.T.cov() - torch.eye(len(mean))).abs() < 8 / math.sqrt(len(own))).all()
    assert stats.kstest(residual.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("dataset", [d for d in MIXTURES if d.state_shape == (2,)], ids=lambda d: type(d).__name__)
def test_density_integrates_to_one(dataset: MixtureDataset) -> None:
    axis = torch.arange(-6, 6, 0.04, dtype=torch.float64)  # the trapezoid rule is exact to rounding for std >= 0.04
    grid = torch.cartesian_prod(axis, axis)
    total = dataset.mixture.to(dtype=torch.float64).log_prob(grid).exp().sum() * 0.04**2
    assert total.item() == pytest.approx(1, abs=1e-6)


def test_mixture_density_is_scipys() -> None:
    mixture, x = uneven_mixture(), torch.randn(50, 2, dtype=torch.float64) * 2
    expected = sum(
        float(w) * stats.norm(m.numpy(), float(s)).pdf(x.numpy()).prod(1)
        for w, m, s in zip(mixture.weights, mixture.means, mixture.stds, strict=True)
    )
    torch.testing.assert_close(mixture.log_prob(x).exp(), torch.as_tensor(expected))


def test_gaussian_takes_a_mean_for_all_dimensions_or_each() -> None:
    assert Gaussian(0.7, state_shape=[5]).mixture.means.tolist() == [[pytest.approx(0.7)] * 5]
    assert Gaussian([1, 2], state_shape=[2]).mixture.means.tolist() == [[1, 2]]


def test_a_mixtures_means_are_points_or_numbers_for_all_dimensions() -> None:
    assert Mixture([1.0, -2.0], state_shape=[64]).mixture.means.tolist() == [[1.0] * 64, [-2.0] * 64]
    words = ["run_name=x", "dataloaders=mixture", "dataloaders.means=[[1,2,3],[4,5,6]]", "dataloaders.classes=[0,0]"]
    found = build(resolved(compose_config(words))["dataloaders"])
    assert found.state_shape == (3,) and found.num_classes == 1 and found.mixture.means.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_mixtures_label_is_the_class_of_its_component() -> None:
    dataset = Mixture([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]], 0.1, [1, 2, 3, 4], classes=[1, 0, 2, 1])
    x, label = draw(dataset)
    component = torch.cdist(x, dataset.mixture.means.double()).argmin(1)
    assert dataset.num_classes == 3 and torch.equal(label, torch.tensor([1, 0, 2, 1])[component])
    assert (label.bincount() / COUNT - torch.tensor([0.2, 0.5, 0.3])).abs().max() < 0.015


def test_eight_gaussians_sit_an_eighth_of_a_turn_apart() -> None:
    means = EightGaussians(radius=3).mixture.means
    eighth_turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    assert torch.allclose(means @ eighth_turn.T, means.roll(-1, 0), atol=1e-5)
    assert means[0].tolist() == [3, 0]


def radius_and_angle(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])


def wrapped(angle: Tensor) -> Tensor:
    """Distance of an angle from the nearest whole turn."""
    return (torch.remainder(angle + math.pi, 2 * math.pi) - math.pi).abs()


def test_moons_are_two_half_circles() -> None:
    x, label = draw(Moons(noise=0))
    upper, lower = x[label == 0] + torch.tensor([0.5, 0.25]), x[label == 1] - torch.tensor([0.5, 0.25])
    for half, side in ((upper, 1), (lower, -1)):
        radius, angle = radius_and_angle(half)
        assert torch.allclose(radius, torch.ones_like(radius), atol=1e-6)
        assert (side * half[:, 1] > -1e-6).all()
        assert stats.kstest(side * angle.numpy(), stats.uniform(0, math.pi).cdf).pvalue > 1e-3


def test_circles_have_their_radii() -> None:
    x, label = draw(Circles(factor=0.3, noise=0))
    radius, angle = radius_and_angle(x)
    assert torch.allclose(radius, torch.tensor([1.5, 0.45]).double()[label], atol=1e-6)
    assert stats.kstest(angle.numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3


def test_spirals_turn_with_the_radius() -> None:
    x, label = draw(Spirals(rotations=1.5, noise=0, num_classes=3))
    radius, angle = radius_and_angle(x)
    outer = radius > 0.05
    expected = 2 * math.pi * (1.5 * radius / 2 + label / 3)
    assert wrapped(angle - expected)[outer].max() < 1e-4
    assert stats.kstest((radius / 2).square().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("cells", "classes"), [(2, 2), (4, 8), (6, 18)])
def test_checkerboard_fills_the_dark_squares_alike(cells: int, classes: int) -> None:
    x, label = draw(Checkerboard(cells=cells, num_classes=classes))
    square = ((x + 2) * cells / 4).floor().long()
    assert square.min() == 0 and square.max() == cells - 1
    assert (square.sum(1) % 2 == 0).all()
    assert len(torch.cat([label[:, None], square], dim=1).unique(dim=0)) == classes == len(square.unique(dim=0))
    assert stats.chisquare(label.bincount().numpy()).pvalue > 1e-3
    assert stats.kstest(torch.remainder((x + 2) * cells / 4, 1).flatten().numpy(), "uniform").pvalue > 1e-3


def test_pinwheel_blades_are_twisted() -> None:
    x, label = draw(Pinwheel(tangential_std=0, num_classes=4))
    length, angle = radius_and_angle(x / 1.5)
    expected = 2 * math.pi * label / 4 + 0.25 * length.exp()
    right_way_out = (length > 0.01) & (wrapped(angle - expected) < 1)  # 1 in 2000 lies behind the hub
    assert right_way_out.double().mean() > 0.998
    assert wrapped(angle - expected)[right_way_out].max() < 1e-4
    assert length.std().item() == pytest.approx(0.3, rel=0.03)


def test_pinwheel_blades_have_their_width() -> None:
    """Straight blades of no length, turned back onto the first: x = 1.5 (1, q)."""
    x, label = draw(Pinwheel(radial_std=0, tangential_std=0.2, rate=0, num_classes=5))
    angle = -2 * math.pi * label / 5
    along, across = (angle.cos() * x[:, 0] - angle.sin() * x[:, 1], angle.sin() * x[:, 0] + angle.cos() * x[:, 1])
    assert torch.allclose(along, torch.full_like(along, 1.5), atol=1e-5)
    assert stats.kstest((across / 0.3).numpy(), "norm").pvalue > 1e-3


def test_s_curve_is_two_three_quarter_circles() -> None:
    """Each half, turned into the other by half a turn about the origin, starts there and goes on clockwise."""
    x, label = draw(SCurve(noise=0))
    half = (1 - 2 * label)[:, None] * x + torch.tensor([0.0, 1.0])
    radius, angle = radius_and_angle(half)
    assert torch.allclose(radius, torch.ones_like(radius), atol=1e-6)
    travelled = torch.remainder(math.pi / 2 - angle, 2 * math.pi)
    assert stats.kstest(travelled.numpy(), stats.uniform(0, 1.5 * math.pi).cdf).pvalue > 1e-3


@pytest.mark.parametrize("shape", [Moons, Circles, Spirals, SCurve], ids=lambda shape: shape.__name__)
def test_noise_is_added_in_both_coordinates(shape: type[PlanarShape]) -> None:
    """The same seed draws the same points, so the difference from the bare shape is the noise alone."""
    difference = (draw(shape(noise=0.2, num_classes=2))[0] - draw(shape(noise=0, num_classes=2))[0]) / 0.2
    assert stats.kstest(difference.flatten().numpy(), "norm").pvalue > 1e-3
    assert torch.allclose(difference.T.cov(), torch.eye(2).double(), atol=0.03)


@pytest.mark.parametrize("shape", [Moons, Circles, Spirals, Checkerboard, Pinwheel, SCurve], ids=lambda s: s.__name__)
def test_shapes_fit_one_network(shape: type[PlanarShape]) -> None:
    x, _ = draw(shape())  # type: ignore[call-arg]
    assert x.std(0).min() > 0.4 and x.std(0).max() < 1.6 and x.abs().max() < 4
    assert x.mean(0).abs().max() < 0.05


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("kmeans", "std=0"),
        ("kmeans", "weights=[1,2]"),
        ("kmeans", "weights=[1,1,1,1,0]"),
        ("kmeans", "centroids=[[0,1],[2]]"),
        ("kmeans", "centroids=[]"),
        ("mixture", "means=[]"),
        ("mixture", "means=[[]]"),
        ("mixture", "means=[[1,2],[3]]"),
        ("mixture", "means=[[1,nan]]"),
        ("mixture", "means=[a]"),
        ("mixture", "std=[1,2]"),
        ("mixture", "weights=[1,0,1]"),
        ("mixture", "classes=[0,1]"),
        ("mixture", "classes=[0,2,2]"),
        ("mixture", "classes=[0,-1,1]"),
        ("mixture", "state_shape=[3]"),
        ("gaussian", "mean=[1,2,3]"),
        ("eight_gaussians", "radius=-1"),
        ("moons", "noise=-0.1"),
        ("moons", "noise=nan"),
        ("circles", "factor=1"),
        ("checkerboard", "cells=3"),
        ("pinwheel", "radial_std=-1"),
        ("spirals", "num_classes=0"),
    ],
)
def test_impossible_settings_are_named(name: str, setting: str) -> None:
    named = "state_shape" if name == "gaussian" else setting.partition("=")[0]
    with pytest.raises(UserError, match=f"dataloaders.{named}"):
        build(resolved(compose_config(["run_name=x", f"dataloaders={name}", f"dataloaders.{setting}"]))["dataloaders"])
