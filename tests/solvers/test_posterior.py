"""Samples given a linear observation, held against the posterior of Gaussian data; and data taken to noise and back."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from common.errors import UserError
from configuration.build import build
from configuration.compose import compose_config, resolved
from evaluation import generate
from evaluation.parts import build_source
from evaluation.sample import TrainedModel, load
from losses.paths import CosinePath, LinearPath, ProbabilityPath, VariancePreservingPath
from models.inputs import split_unified_flow_matching_input
from models.velocity_model import VelocityModel
from scripts import sample
from solvers.dopri5 import Dopri5
from solvers.posterior import Observation, conjugate_gradients, posterior_field
from solvers.runge_kutta import Midpoint
from tests.conftest import DIGITS

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.4, 0.9, 0.3]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
SEEN = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]], dtype=torch.float64)


def gaussian_field(path: ProbabilityPath, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact velocity that carries N(0, std^2 I) to N(MEAN, COVARIANCE)."""

    def field(z: Tensor, t: Tensor) -> Tensor:
        p, eye = path.at(torch.as_tensor(t).double()), torch.eye(3, dtype=torch.float64)
        law = p.alpha**2 * COVARIANCE + (p.sigma * std) ** 2 * eye
        slope = (p.alpha * p.alpha_dot * COVARIANCE + p.sigma * p.sigma_dot * std**2 * eye) @ torch.linalg.inv(law)
        return p.alpha_dot * MEAN + (z - p.alpha * MEAN) @ slope.T

    return field


@pytest.mark.parametrize(("path", "std"), [(LinearPath(), 1.0), (CosinePath(), 1.5), (LinearPath(), 0.7)])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_gaussian_data_have_their_posterior(path: ProbabilityPath, std: float, noise: float) -> None:
    """Mean and covariance within 2 %, of an observation of two combinations of three correlated numbers."""
    y = torch.tensor([1.5, -2.0], dtype=torch.float64)
    gain = COVARIANCE @ SEEN.T @ torch.linalg.inv(SEEN @ COVARIANCE @ SEEN.T + noise**2 * torch.eye(2))
    mean, covariance = MEAN + gain @ (y - SEEN @ MEAN), COVARIANCE - gain @ SEEN @ COVARIANCE
    x0 = std * torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = (x0 - x0.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x0.T))).T * std  # its own moments are exact
    field = posterior_field(gaussian_field(path, std), path, Observation(y, lambda x: x @ SEEN.T, noise), std)
    with torch.no_grad():
        x1 = Midpoint(100).solve(field, x0, torch.linspace(0, 1, 101, dtype=torch.float64))
    assert float((x1.mean(0) - mean).norm() / mean.norm()) < 0.02
    assert float((torch.cov(x1.T) - covariance).norm() / covariance.norm()) < 0.02


def test_without_anything_to_learn_from_the_field_stays_as_it_is() -> None:
    z, path = torch.randn(8, 3, dtype=torch.float64), VariancePreservingPath()
    field = gaussian_field(path, 1.0)
    seen = posterior_field(field, path, Observation(torch.zeros(2), lambda x: x @ SEEN.T, 1e6), 1.0)
    for t in (0.1, 0.5, 0.9):
        torch.testing.assert_close(seen(z, torch.tensor(t)), field(z, torch.tensor(t)), rtol=1e-6, atol=1e-6)


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_numbers() -> None:
    draw = torch.Generator().manual_seed(0)
    root, target = torch.randn(5, 4, 4, generator=draw).double(), torch.randn(5, 4, generator=draw).double()
    matrix = root @ root.mT + 0.1 * torch.eye(4)
    product = lambda x: (matrix @ x[..., None])[..., 0]  # noqa: E731
    torch.testing.assert_close(conjugate_gradients(product, target, 4), torch.linalg.solve(matrix, target))
    assert torch.equal(conjugate_gradients(lambda x: -x, target, 4), torch.zeros_like(target))
    assert torch.equal(conjugate_gradients(lambda x: 0.5 * x, target, 4, least=1.0), torch.zeros_like(target))


def test_what_is_observed_is_a_part_or_a_smaller_image() -> None:
    x = torch.randn(2, 1, 4, 4)
    part = x[0].clone()
    part[0, :2] = float("nan")
    known = Observation.of(part, (1, 4, 4), 0.1)
    assert torch.equal(known.value, part[0, 2:].flatten()) and torch.equal(known.operator(x), x[:, 0, 2:].flatten(1))
    small = Observation.of(avg_pool2d(x[0], 2), (1, 4, 4), 0.1)
    assert torch.equal(small.operator(x)[0], small.value)
    for wrong in (torch.randn(3), torch.randn(1, 4, 2), torch.randn(2, 2, 2), torch.full((1, 2, 2), float("nan"))):
        with pytest.raises(UserError, match="what is observed has shape"):
            Observation.of(wrong, (1, 4, 4), 0.1)
    with pytest.raises(UserError, match="NaN throughout"):
        Observation.of(torch.full((1, 4, 4), float("nan")), (1, 4, 4), 0.1)


@pytest.mark.slow
def test_digits_are_completed_from_the_command_line(shared_run: Callable[..., Path], tmp_path: Path) -> None:
    """Pixels that are known are kept, up to their noise, by a network that has learned nothing."""
    checkpoint = shared_run("x", *DIGITS) / "ckpts/cnn/x_last.pt"
    model = load(checkpoint)
    digit = model.real(1)[0][0]
    digit[:, 4:] = float("nan")
    np.save(tmp_path / "part.npy", digit.numpy())
    words = [f"ckpt={checkpoint}", "n=3", f"observed={tmp_path / 'part.npy'}", "solver.steps=8", "device=cpu"]
    assert sample.main([*words, f"out={tmp_path / 'out.npy'}", "label=1"]) == 0
    x = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert float((x[:, :, :4] - digit[:, :4]).abs().max()) < 0.3
    assert float(x[:, :, 4:].std(0).mean()) > 0.05  # the others vary
    plain = model.sample(3, label=1)
    assert torch.equal(model.log_prob(plain, label=1), model.log_prob(plain, label=torch.ones(3, dtype=torch.int64)))
    assert float((plain[:, :, :4] - digit[:, :4]).abs().mean()) > 0.3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["observed=nowhere.npy"], "no .npy file that is there"),
        (["observed={part}", "nfe=1"], "leave nfe out"),
        (["observed={part}", "solver=flow_map"], "use solver=midpoint"),
        (["observed={part}", "observed_noise=0"], "a number above 0"),
        (["observed={wide}"], "what is observed has shape [3]"),
        (["observed={endless}"], "are not finite"),
        (["observed={text}"], "it takes real numbers, one or more"),
        (["observed={complex}"], "it takes real numbers, one or more"),
        (["observed={none}"], "holds float64 of shape [0]"),
    ],
)
def test_what_cannot_be_observed_is_one_sentence(shared_run, tmp_path: Path, capsys, words, sentence) -> None:
    checkpoint = shared_run("plain") / "ckpts/mlp/plain_last.pt"
    contents = {"part": [0.1, np.nan], "wide": [1.0, 2.0, 3.0], "endless": [np.inf, 0.0]}
    contents |= {"text": ["a", "b"], "complex": [1j, 2.0], "none": []}
    for name, numbers in contents.items():
        np.save(tmp_path / f"{name}.npy", np.array(numbers))
    places = {name: tmp_path / f"{name}.npy" for name in contents}
    assert sample.main([f"ckpt={checkpoint}", f"out={tmp_path / 'x.npy'}", *(word.format(**places) for word in words)]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (tmp_path / "x.npy").exists()


def test_data_come_back_from_the_noise_they_are_carried_to(shared_run: Callable[..., Path]) -> None:
    model = load(shared_run("plain") / "ckpts/mlp/plain_last.pt", "cpu")
    x = model.real(200)[0]
    noise = model.invert(x, solver=Dopri5(1e-7, 1e-7))
    torch.testing.assert_close(model.carry(noise, solver=Dopri5(1e-7, 1e-7)), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noise, model.log_likelihood(x, solver=Dopri5(1e-7, 1e-7)).x0, rtol=1e-3, atol=1e-3)


CPU, WIDE = torch.device("cpu"), 1.5  # standard deviation of the noise
PLACE, SCALE = torch.tensor([2.0, -1.0]), torch.tensor([3.0, 0.5])  # of the data, in their units


class Classes(VelocityModel):
    """The exact velocity to N(c + 1, I) of class c, and to N(0, I) of the hidden one, from N(0, WIDE^2 I)."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.tensor(1.0))  # mean of class 0

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        assert label is not None
        z, times = split_unified_flow_matching_input(unified_input)
        t, mean = times[:, :1], torch.where(label < self.num_classes, label + self.first, 0)[:, None]
        slope = (t - (1 - t) * WIDE**2) / (t.square() + ((1 - t) * WIDE).square())
        return mean + slope * (z - t * mean)


@pytest.fixture
def guided_classes() -> TrainedModel:
    """The exact model of five Gaussians in the units of the data, guided from N(PLACE, SCALE^2) past them."""
    words = ["dataloaders=kmeans", "conditional=true", "guidance=cfg", "guidance.scale=2", "source=scaled_gaussian"]
    config = resolved(compose_config(["run_name=x", *words, f"source.std={WIDE}"]))
    objective = build(config["loss"], network=Classes()).requires_grad_(False)
    objective.standardise_by(mean=PLACE.tolist(), std=SCALE.tolist(), state_shape=[2])
    return TrainedModel(objective, config, CPU, 0)


def guided_means(label: Tensor) -> Tensor:
    """Of the samples at a scale of 2, in the units of the data (B, 2)."""
    return PLACE + SCALE * 2 * (label + 1)[:, None]


def test_classes_guidance_and_units_are_those_of_the_run(guided_classes: TrainedModel) -> None:
    """Flows between Gaussians keep quantiles: each sample is known from its noise, with what is observed and without."""
    label = torch.arange(130) * 3 % 5  # more than are computed at once
    noise = generate.fixed_noise(build_source(guided_classes.config, CPU), 130, 0)
    expected = guided_means(label) + SCALE * noise / WIDE
    exact = Dopri5(1e-6, 1e-6)
    torch.testing.assert_close(guided_classes.carry(noise, label, exact), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guided_classes.invert(expected, label, exact), noise, rtol=1e-3, atol=1e-3)
    observed, error = torch.tensor([4.0, float("nan")]), 2.0
    share = SCALE[0] ** 2 / (SCALE[0] ** 2 + error**2)
    expected[:, 0] = guided_means(label)[:, 0] * (1 - share) + share * observed[0] + share**0.5 * error * noise[:, 0] / WIDE
    found = guided_classes.posterior(130, observed, error, label=label, solver=Midpoint(50))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.02)
