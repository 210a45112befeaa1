"""Sources: every file in configs/source, their samples and their densities."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from scipy import stats

from common.errors import UserError
from configuration.resolvers import register_resolvers
from dataloaders.digits import Digits
from dataloaders.planar_shapes import Moons
from dataloaders.sources import DatasetSource, GaussianSource, Source
from dataloaders.synthetic import Gaussian

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(file.stem for file in (CONFIGS / "source").glob("*.yaml"))
COUNT = 20_000


def compose_source(name: str, folder: Path, overrides: list[str]) -> DictConfig:
    """The source group as a run composes it, with the nodes that only the run reads taken out."""
    register_resolvers()
    search = f"hydra:\n  searchpath: ['file://{CONFIGS}']\n"
    (folder / "run.yaml").write_text(f"defaults:\n  - dataloaders: moons\n  - source: {name}\n  - _self_\n{search}")
    with initialize_config_dir(str(folder), version_base=None):
        config = compose("run", overrides)
    OmegaConf.set_struct(config, False)
    config.source.get("dataset", {}).pop("training", None)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_every_configured_source_draws_states_of_the_data(name: str, tmp_path: Path) -> None:
    source: Source = instantiate(compose_source(name, tmp_path, []).source).to("cpu")
    generator = torch.Generator()
    first, second, again = (source.sample(500, generator.manual_seed(seed)) for seed in (1, 2, 1))
    assert first.shape == (500, 2) and first.dtype == torch.float32
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not torch.equal(source.sample(500, generator), again), "a generator that moved on must not repeat itself"
    assert 0.1 < first.std() < 3


@pytest.mark.parametrize("name", NAMES)
def test_a_source_fits_the_shape_of_the_data_or_says_so(name: str, tmp_path: Path) -> None:
    config = compose_source(name, tmp_path, ["dataloaders=gaussian", "dataloaders.state_shape=[16]"]).source
    if name.endswith("gaussian"):
        assert instantiate(config).sample(3, torch.Generator()).shape == (3, 16)
        return
    with pytest.raises(InstantiationException) as caught:
        instantiate(config)
    assert isinstance(caught.value.__cause__, UserError) and "use source=gaussian" in str(caught.value.__cause__)


def test_a_sources_knobs_are_its_own(tmp_path: Path) -> None:
    config = compose_source("moons", tmp_path, ["source.dataset.noise=0.3", "dataloaders.noise=0.01"])
    assert instantiate(config.source).dataset.noise == 0.3
    assert OmegaConf.select(config, "dataloaders.noise") == 0.01


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [[3], [2, 4, 5]])
def test_gaussian_source_has_its_std_and_density(shape: list[int], std: float) -> None:
    source = GaussianSource(shape, std)
    x = source.sample(COUNT, torch.Generator().manual_seed(0))
    assert source.gaussian_std == std and x.shape == (COUNT, *shape)
    assert stats.kstest(x[:2000].flatten().numpy(), stats.norm(0, std).cdf).pvalue > 1e-3
    log_density = stats.norm(0, std).logpdf(x[:50].flatten(1).double().numpy()).sum(1)
    torch.testing.assert_close(source.log_prob(x[:50].double()), torch.from_numpy(log_density))


def test_mixture_source_has_the_mixtures_density() -> None:
    source = DatasetSource(Gaussian(mean=[0.7, -1.0], std=0.4))
    x = source.sample(COUNT, torch.Generator().manual_seed(0))
    assert torch.allclose(x.mean(0), torch.tensor([0.7, -1.0]), atol=0.02)
    expected = stats.multivariate_normal([0.7, -1.0], 0.16).logpdf(x[:50].double().numpy())
    torch.testing.assert_close(source.log_prob(x[:50].double()), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)
    assert source.gaussian_std is None, "a shifted Gaussian must not pass for the noise that oracles assume"


def test_sources_without_a_density_say_so() -> None:
    source = DatasetSource(Moons())
    with pytest.raises(UserError, match="use source=gaussian"):
        source.log_prob(source.sample(3, torch.Generator()))


def test_finite_data_is_no_source() -> None:
    with pytest.raises(UserError, match="finite"):
        DatasetSource(Digits())  # type: ignore[arg-type]
