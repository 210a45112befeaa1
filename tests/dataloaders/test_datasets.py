"""The dataset contract, checked on every file in configs/dataloaders."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from common.errors import UserError
from common.seeds import generator_for
from configuration.resolvers import register_resolvers
from dataloaders.base_dataloaders import Batch, EpochPlan, FlowDataset
from dataloaders.digits import Digits
from dataloaders.encoded import EncodedImages
from dataloaders.stream import StreamDataset
from dataloaders.synthetic import SyntheticDataset
from dataloaders.tensor_dataset import TensorDataset, stratified_rows
from models.inputs import classes_in

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "dataloaders").glob("*.yaml"))
BATCH = 100


@pytest.fixture(scope="session")
def array_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled file of 253 rows in three classes."""
    path = tmp_path_factory.mktemp("array") / "states.npz"
    np.savez(path, x=np.random.RandomState(0).randn(253, 3), y=np.arange(253) % 3)
    return path


def load(file: Path, array_file: Path, settings: dict[str, Any] | None = None) -> DictConfig:
    """The group's config as a run sees it, without the node that only the run reads and without augmentation."""
    register_resolvers()
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    needed = {"epochs", "batch_size", "evaluation_samples", "final_evaluation_samples"}
    assert needed <= set(config.pop("training")) <= needed | {"eval_every", "lr", "num_workers", "feature_network"}
    if OmegaConf.is_missing(config, "path"):
        config.path = str(array_file)
    for key, value in ((settings or {}) | {"flip": False, "images.flip": False, "sample": False}).items():
        if key == "vae":
            config.vae = {"_target_": "models.vae.stable_diffusion_vae.StableDiffusionVAE", **value}
        elif OmegaConf.select(config, key) is not None or OmegaConf.is_missing(config, key) or key in (settings or {}):
            OmegaConf.update(config, key, value)
    return config


@pytest.fixture(params=CONFIGS, ids=lambda file: file.stem, scope="module")
def config(request: pytest.FixtureRequest, array_file: Path, official: Callable[[str], dict[str, Any]]) -> DictConfig:
    return load(request.param, array_file, official(request.param.stem))


@pytest.fixture(scope="module")
def dataset(config: DictConfig) -> FlowDataset:
    """The configured set; endless ones with a short epoch that does not divide into whole batches."""
    built: FlowDataset = instantiate(config)
    if isinstance(built, SyntheticDataset):
        built.epoch_size = 10 * BATCH + 7
    return built


def epoch(dataset: FlowDataset, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> list[Batch]:
    """One epoch as the loop runs it: `order` seeded by epoch, `generator` reseeded by step and rank for each batch."""
    order, generator = generator_for(0, "order", epoch), torch.Generator()
    batches = dataset.epoch(EpochPlan(BATCH, order, generator, start, rank, world))
    steps = range(epoch * dataset.batches_per_epoch(BATCH) + start, (epoch + 1) * dataset.batches_per_epoch(BATCH))
    result = []
    for step in steps:
        generator.manual_seed(generator_for(0, "data", step * world + rank).initial_seed())
        result.append(next(batches))
    assert next(batches, None) is None
    return result


def states(batches: list[Batch]) -> Tensor:
    return torch.cat([x for x, _ in batches])


def rows(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.flatten(1).tolist()}


def test_states_and_labels_are_what_the_config_says(dataset: FlowDataset, config: DictConfig) -> None:
    seen = set()
    for x, label in epoch(dataset):
        assert label is not None
        assert x.shape[1:] == tuple(config.state_shape) and len(x) == len(label)
        condition = dataset.condition_shape
        assert x.dtype == torch.float32 and label.dtype == (torch.int64 if condition is None else torch.float32)
        assert label.shape[1:] == (() if condition is None else (2 + math.prod(condition),))
        seen |= set((classes_in(label, dataset.num_classes) if config.num_classes else label[:0, 0]).tolist())
        if config.value_range is not None:
            assert config.value_range[0] <= x.min() and x.max() <= config.value_range[1]
    assert seen == set(range(config.num_classes))


@pytest.mark.parametrize("world", [1, 3])
def test_epoch_has_exactly_epoch_size_rows(dataset: FlowDataset, world: int) -> None:
    ranks = [epoch(dataset, rank=rank, world=world) for rank in range(world)]
    totals = [sum(len(x) for x, _ in batches) for batches in zip(*ranks, strict=True)]
    assert sum(totals) == dataset.epoch_size and len(totals) == dataset.batches_per_epoch(BATCH)
    assert all(total == BATCH for total in totals[:-1])


def test_same_seeds_give_the_same_epoch(dataset: FlowDataset) -> None:
    for (x, label), (x_again, label_again) in zip(epoch(dataset, 1), epoch(dataset, 1), strict=True):
        assert torch.equal(x, x_again) and torch.equal(label, label_again)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_start_skips_whole_batches_and_changes_no_later_one(dataset: FlowDataset, start: int) -> None:
    assert torch.equal(states(epoch(dataset, start=start)), states(epoch(dataset)[start:]))


def test_no_epoch_equals_another(dataset: FlowDataset) -> None:
    first, second = states(epoch(dataset, 0)), states(epoch(dataset, 1))
    assert not torch.equal(first, second)
    if not isinstance(dataset, EncodedImages):  # draws from its posteriors
        assert (rows(first) == rows(second)) == isinstance(dataset, TensorDataset | StreamDataset)


def test_no_batch_repeats_another(dataset: FlowDataset) -> None:
    if isinstance(dataset, SyntheticDataset):
        assert len(rows(states(epoch(dataset)))) == dataset.epoch_size
    assert all(not rows(x) & rows(y) for (x, _), (y, _) in pairwise(epoch(dataset)))


def test_no_rank_repeats_another(dataset: FlowDataset) -> None:
    first, second = (states(epoch(dataset, rank=rank, world=2)) for rank in (0, 1))
    assert not rows(first) & rows(second)


def test_batches_are_drawn_when_asked_for(dataset: FlowDataset) -> None:
    """A reseeded generator governs the very next batch of endless data."""
    if isinstance(dataset, SyntheticDataset):
        generator = torch.Generator().manual_seed(1)
        batches = dataset.epoch(EpochPlan(BATCH, torch.Generator(), generator))
        first = next(batches)[0]
        generator.manual_seed(1)
        assert torch.equal(next(batches)[0], first)


def test_ranks_of_a_finite_set_partition_the_batch(dataset: FlowDataset) -> None:
    if isinstance(dataset, TensorDataset):
        parts = [epoch(dataset, rank=rank, world=3) for rank in range(3)]
        for (whole, label), *ranks in zip(epoch(dataset), *parts, strict=True):
            for rank, (part, part_label) in enumerate(ranks):
                assert torch.equal(part, whole[rank::3]) and torch.equal(part_label, label[rank::3])


def test_a_finite_epoch_visits_each_training_row_once(dataset: FlowDataset) -> None:
    if isinstance(dataset, TensorDataset):
        visited = states(epoch(dataset)).flatten(1)
        expected = dataset.train_states.flatten(1)
        assert sorted(visited.tolist()) == sorted(expected.tolist())


def test_held_out_data_is_never_trained_on(dataset: FlowDataset) -> None:
    whole = dataset.held_out(10**6, generator_for(0, "held_out"))[0] if isinstance(dataset, StreamDataset) else None
    assert whole is None or not rows(whole) & rows(states(epoch(dataset)))
    x, label = dataset.held_out(20, generator_for(0, "held_out"))
    assert len(x) == len(label) == 20 and x.shape[1:] == dataset.state_shape
    assert not rows(x) & rows(states(epoch(dataset)))
    again, other = (dataset.held_out(20, generator_for(0, "held_out", index))[0] for index in (0, 1))
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_real_pair_is_disjoint(dataset: FlowDataset) -> None:
    first, second = dataset.real_pair(150, 90, generator_for(0, "floor"))
    assert (len(first), len(second)) == (150, 90) and len(rows(first) | rows(second)) == 240


def test_a_finite_set_serves_what_it_has(dataset: FlowDataset) -> None:
    """Asked for too much: all of the held-out part, and a split of everything, the smaller side being kept."""
    if isinstance(dataset, TensorDataset):
        x, label = dataset.held_out(10**6, generator_for(0, "held_out"))
        assert rows(x) == rows(dataset.held_out_states) and len(x) == len(dataset.held_out_states) == len(label)
        first, second = dataset.real_pair(30_000, 20, generator_for(0, "floor"))
        assert (len(first), len(second)) == (len(dataset.states) - 20, 20) and not rows(first) & rows(second)
        assert len(dataset.states) - 1 <= len(first) + len(second) <= len(dataset.states)
        assert rows(first) & rows(dataset.held_out_states) and rows(first) & rows(dataset.train_states)


def test_labels_stay_with_their_states(array_file: Path) -> None:
    stored = np.load(array_file)
    lookup = {tuple(x): y for x, y in zip(stored["x"].astype(np.float32).tolist(), stored["y"], strict=True)}
    dataset = instantiate(load(CONFIGS[0].with_name("array.yaml"), array_file))
    for x, label in [*epoch(dataset), dataset.held_out(25, torch.Generator())]:
        assert [lookup[tuple(row)] for row in x.tolist()] == label.tolist()


def test_digits_hold_out_a_fifth_of_each_digit() -> None:
    digits = Digits()
    everything = torch.cat([digits.train_labels, digits.held_out_labels]).bincount()
    assert len(digits.held_out_states) == 359 and digits.states.unique().tolist() == [k / 8 - 1 for k in range(17)]
    assert ((digits.held_out_labels.bincount() - everything / 5).abs() <= 1).all()


def test_digits_split_is_pinned() -> None:
    """Numbers of every run so far stand on these rows: a change of split must be a decision."""
    assert Digits().held_out_labels[:12].tolist() == [1, 4, 8, 0, 5, 5, 0, 4, 7, 0, 2, 2]


def test_split_is_a_shuffle_not_a_stride() -> None:
    one, other = (stratified_rows(None, 1000, 0.1, seed) for seed in (0, 1))
    assert len(one) == 100 and len(set(one.tolist()) & set(other.tolist())) < 30
    assert len(stratified_rows(None, 10, 0.001, 0)) == 2 and len(stratified_rows(None, 10, 0.999, 0)) == 9


def refusal(config: DictConfig, **changes: object) -> str:
    with pytest.raises(InstantiationException) as caught:
        instantiate(config, **changes)
    assert isinstance(caught.value.__cause__, UserError)
    return str(caught.value.__cause__)


@pytest.mark.parametrize("key, wrong", [("state_shape", [7, 1]), ("num_classes", 0), ("epoch_size", 3)])
def test_a_config_that_contradicts_the_data_is_refused(
    config: DictConfig, dataset: FlowDataset, key: str, wrong: object
) -> None:
    if config[key] == wrong:
        pytest.skip("so it is")
    if key == "epoch_size" and isinstance(dataset, SyntheticDataset):
        pytest.skip("endless data have an epoch of any size")
    assert f"dataloaders.{key}" in refusal(config, **{key: wrong})
