"""Torch data sets of a user's own: what is read of them, that they resume bit for bit, and every mistake in a sentence."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.seeds import generator_for
from configuration.build import build
from configuration.compose import compose_config, resolved
from dataloaders.base_dataloaders import EpochPlan
from dataloaders.torch_dataset import KEYS, TorchDataset, described
from tests.dataloaders.user_sets import Given, Itemless, Lengthless, Missing, Noise, Points, Stream
from tests.training.helpers import weights

MINE = "dataloaders.dataset._target_=tests.dataloaders.user_sets.Points"
X = torch.zeros(2)


def ten(*last: object) -> Given:
    """Ten items, the last ones as given."""
    return Given([X] * (10 - len(last)) + list(last))


@pytest.mark.parametrize(("made", "known"), [
    (lambda: Given([torch.zeros(3)] * 12), ((3,), 0, None)),
    (lambda: Given([(torch.zeros(3).double(), k % 4) for k in range(12)]), ((3,), 4, None)),
    (lambda: Given([(X, torch.tensor(k % 4)) for k in range(12)]), ((2,), 4, None)),
    (lambda: Given([{"x": X, "label": k % 4, "name": "a"} for k in range(12)]), ((2,), 4, None)),
    (lambda: Given([torch.zeros(1, 4, 4, dtype=torch.uint8)] * 12), ((1, 4, 4), 0, (-1.0, 1.0))),
    (lambda: Given([torch.full((1, 4, 4), k / 11) for k in range(12)]), ((1, 4, 4), 0, (0.0, 1.0))),
    (lambda: Given([torch.full((1, 4, 4), k / 6 - 1) for k in range(12)]), ((1, 4, 4), 0, (-1.0, 1.0))),
    (lambda: Given([torch.full((1, 4, 4), float(k)) for k in range(12)]), ((1, 4, 4), 0, None)),
])  # fmt: skip
def test_shape_classes_and_range_are_read_from_the_items(made: Callable[[], Given], known: tuple[Any, ...]) -> None:
    found = described(made(), KEYS)
    assert (found["state_shape"], found["num_classes"], found["value_range"]) == known
    served = TorchDataset(made())
    assert served.state_shape == known[0] and served.num_classes == known[1] and served.value_range == known[2]


def test_pixels_are_served_as_minus_one_to_one_and_entries_by_their_names() -> None:
    pixels = [torch.full((1, 2, 2), 51 * k, dtype=torch.uint8) for k in range(6)]
    items: list[object] = [{"image": pixels[k % 6], "digit": k % 6, "of": 255 - pixels[k % 6]} for k in range(30)]
    keys = {"x": "image", "label": "digit"}
    x, label = TorchDataset(Given(items), keys=keys).held_out(30, torch.Generator())
    assert label is not None and torch.allclose(x[:, 0, 0, 0], label * 0.4 - 1, atol=1e-6) and x.dtype == torch.float32
    dataset = TorchDataset(Given(items), held_out_fraction=0.5, held_out_most=9, keys=keys | {"condition": "of"})
    x, label = dataset.held_out(30, torch.Generator())
    assert dataset.condition_shape == (1, 2, 2) and len(x) == 9 and label is not None
    assert torch.allclose(label[:, 2:], -x.flatten(1), atol=1e-6) and (label[:, 1] == 1).all()
    assert torch.allclose(x[:, 0, 0, 0], label[:, 0] * 0.4 - 1, atol=1e-6)


def test_another_data_set_can_be_held_out() -> None:
    dataset = TorchDataset(Points(20), held_out=Points(12, first=1000))
    seen, unseen = dataset.trial_rows(20, torch.Generator())[0], dataset.held_out(20, torch.Generator())[0]
    assert (len(seen), len(unseen)) == (20, 12) and not set(seen[:, 0].tolist()) & set(unseen[:, 0].tolist())


def test_what_items_draw_depends_on_seed_and_batch_alone_and_leaves_the_default_generators(seeds: int = 3) -> None:
    dataset, before = TorchDataset(Points(moved=1.0)), torch.get_rng_state()
    epochs = []
    for epoch, start in ((0, 0), (0, 0), (1, 0), (0, 2)):
        plan = EpochPlan(50, generator_for(seeds, "order", epoch), torch.Generator(), start)
        epochs.append(torch.cat([x for x, _ in dataset.epoch(plan)]))
    first, again, other, rest = epochs
    plans = [replace(plan, start=0, order=generator_for(0, "order", epoch)) for epoch in (0, 1)]
    drawn = [x for own in plans for x, _ in TorchDataset(Noise()).epoch(own)]
    assert len(torch.cat(drawn).unique(dim=0)) == 2 * 360
    assert torch.equal(first, again) and not torch.equal(first.sort(0)[0], other.sort(0)[0])
    assert torch.equal(rest, first[100:]) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dataset", "said"), [
    (Lengthless, "Lengthless has no __len__"),
    (Itemless, "Itemless has no __getitem__"),
    (Stream, "iterable-style torch data set"),
    (lambda: [X] * 10, "is no torch data set"),
    (lambda: Given([]), "has no items; give 10 or more"),
    (lambda: Given([X] * 9), "has 9 items; give 10 or more"),
    (lambda: ten(torch.zeros(3)), "item 9 of Given has as its x a tensor of shape [3] of torch.float32, and the first one"),
    (lambda: ten(X.double(), X.to(torch.uint8)), "item 9 of Given has as its x a tensor of shape [2] of torch.uint8"),
    (lambda: ten(torch.tensor([0.0, float("nan")])), "item 9 of Given has values that are NaN"),
    (lambda: ten((X, 0)), "item 9 of Given has as its label a number, and the first one none"),
    (lambda: Given([(X, 0)] * 9 + [X]), "item 9 of Given has as its label none, and the first one a number"),
    (lambda: Given([(X, -1)] * 10), "item 0 of Given has the label -1"),
    (lambda: Given([(X, 0.5)] * 10), "item 0 of Given has 0.5 as its label"),
    (lambda: Given([(X, torch.zeros(2))] * 10), "item 0 of Given has a tensor of shape [2] as its label"),
    (lambda: Given([(X, 0, 1, 2)] * 10), "item 0 of Given is 4 values"),
    (lambda: Given([(X, None, "y")] * 10), "the condition of item 0 of Given is 'y'; give a tensor"),
    (lambda: Given([(X, None, X)] * 9 + [(X, None, torch.zeros(3))]), "item 9 of Given has as its condition a tensor"),
    (lambda: Given([{"image": X}] * 10), "a dictionary with image, not with x"),
    (lambda: Given([X.long()] * 10), "item 0 of Given is of torch.int64; give floating point"),
    (lambda: Given([torch.zeros(4, 4)] * 10), "add a channel, x[None]"),
    (lambda: Given(["text"] * 10), "item 0 of Given is 'text'; give a tensor"),
    (Missing, "item 7 of Missing cannot be read: no such file: 7.bin"),
    (lambda: ten(), None),
])  # fmt: skip
def test_every_mistake_is_one_sentence(dataset: Callable[[], Any], said: str | None) -> None:
    if said is None:
        described(dataset(), KEYS)
        return
    with pytest.raises(UserError) as caught:
        described(dataset(), KEYS)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_of_the_users_own_names_its_line() -> None:
    broken = Given([X] * 10)
    del broken.items[5:]
    broken.__class__ = type("Broken", (Given,), {"__len__": lambda self: 10})
    with pytest.raises(UserError, match=r"the data set \(Broken\) fails: IndexError: list index .*user_sets.py, line \d+"):
        described(broken, KEYS)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_beyond_those_that_were_read_first_is_named_by_whoever_reads_it(workers: int) -> None:
    items: list[object] = [(X, k % 3) for k in range(40)]
    settings: Any = {"state_shape": (2,), "num_classes": 2, "value_range": None, "condition_shape": None}
    dataset = TorchDataset(Given(items), **settings)
    dataset.num_workers = workers
    with pytest.raises(
        UserError, match=r"has the label 2, and the classes are 0 to 1; .*dataloaders.num_classes=3"
    ) as caught:
        list(dataset.epoch(EpochPlan(8, torch.Generator(), torch.Generator())))
    assert "\n" not in str(caught.value)


def test_a_value_beyond_the_range_of_those_that_were_read_first_is_named() -> None:
    pictures: list[object] = [torch.zeros(1, 2, 2)] * 39 + [torch.full((1, 2, 2), 1.5)]
    described = {"state_shape": (1, 2, 2), "num_classes": 0, "value_range": (0.0, 1.0), "condition_shape": None}
    dataset = TorchDataset(Given(pictures), **described)
    with pytest.raises(UserError, match=r"item 39 of Given has values from 1.5 to 1.5, outside .*value_range=\[0.0,1.0\]"):
        list(dataset.epoch(EpochPlan(40, torch.Generator(), torch.Generator())))


@pytest.mark.parametrize(("words", "said"), [
    ((), "dataloaders.dataset._target_ is missing"),
    (("dataloaders.dataset._target_=no_such_module.Data",), "cannot be imported"),
    (("dataloaders.dataset._target_=tests.dataloaders.user_sets.torch",), "is not a class"),
    ((MINE, "+dataloaders.dataset.color=red"), "Points takes no color"),
    ((MINE.replace("Points", "Missing"), "+dataloaders.dataset.at_once=true"), "no such file: points.bin"),
    ((MINE, "dataloaders.dataset.count=20"), "+dataloaders.dataset.count"),
    ((MINE, "dataloaders.state_shape=[3]"), "state_shape=[2], not [3]"),
    ((MINE, "balanced=true"), "balanced=true needs a finite set"),
])  # fmt: skip
def test_a_command_that_names_no_data_set_is_refused(
    words: tuple[str, ...], said: str, small_run: Callable[..., Path]
) -> None:
    with pytest.raises(UserError) as caught:
        small_run("x", "dataloaders=torch", "dataloaders.epoch_size=null", "max_steps=1", *words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_with_two_workers_goes_on_bit_for_bit(tmp_path: Path, small_run: Callable[..., Path], capsys: Any) -> None:
    words = ["dataloaders=torch", MINE, "+dataloaders.dataset.moved=0.3", "dataloaders.epoch_size=null", "conditional=true"]
    words += ["num_workers=2", "batch_size=60", "schedule=constant"]
    small_run("x", *words, "max_steps=9", output="whole")
    with contextlib.suppress(SystemExit):
        small_run("x", *words, "max_steps=4", output="parts")
    said = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith(("go on", "sample "))]
    assert said and all(line.endswith(" trust=tests.dataloaders.user_sets") for line in said[-2:])
    with pytest.raises(UserError, match=r"trust=tests\.dataloaders\.user_sets"):
        small_run("x", "resume=true", "max_steps=9", output="parts")
    small_run("x", "resume=true", "max_steps=9", "trust=tests.dataloaders.user_sets", output="parts")
    one, two = (weights(tmp_path / part, "x") for part in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_what_a_run_has_read_is_in_its_configuration_so_that_a_save_needs_no_data(tmp_path: Path) -> None:
    words = ["run_name=x", "dataloaders=torch", MINE, "conditional=true", "dataloaders.standardize=true"]
    config = resolved(compose_config(words))
    data = config["dataloaders"]
    assert (data["state_shape"], data["num_classes"], data["value_range"]) == ([2], 3, None)
    assert config["model"]["state_shape"] == [2] and config["model"]["num_classes"] == 3
    assert json.loads(json.dumps(data)) == data and build(data).num_classes == 3 and build(data).standardize
