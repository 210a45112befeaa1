"""Any map-style torch Dataset, a user's own or a library's."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from common.contracts import calling, in_words
from common.errors import UserError
from common.ranges import Count, Inside
from common.seeds import seeded
from dataloaders.array_header import MAX_CLASSES, MIN_ROWS
from dataloaders.base_dataloaders import Described, typed
from dataloaders.stream import Read, Reader, Rows, StreamDataset, some_rows
from dataloaders.tensor_dataset import as_states, stratified_rows
from models.inputs import join_condition

SCANNED = 10_000  # rows that are read to learn what all of them are, evenly spaced
KEYS = {"x": "x", "label": "label", "condition": "condition"}


class Item(NamedTuple):
    """One row: x (D,) or (C, H, W), fp32 or pixels in uint8, its class and its condition, of such a shape, or None."""

    x: Tensor
    label: int | None
    condition: Tensor | None

    def kind(self) -> dict[str, str]:
        """Return in words what each part is: what all rows have in common."""
        label = "none" if self.label is None else "a number"
        return {"x": of_kind(self.x), "label": label, "condition": of_kind(self.condition)}


class TorchReader(Reader):
    """Reads rows of a data set whose items are x, (x, label), (x, label, condition), label possibly None, or dictionaries
    with entries of the names in `keys`.

    What an item draws from the default generators of Python, NumPy and torch is a function of the epoch's seed and of the
    batch it is read in, in any process.
    """

    def __init__(self, dataset: Dataset[Any], keys: Mapping[str, str], rows: np.ndarray | None = None):
        """rows: those that are read, None for all. UserError for a data set without items by number, or with few."""
        self.dataset, self.keys, self.name_of = dataset, KEYS | dict(keys), type(dataset).__name__
        count = counted(dataset)
        self.rows = np.arange(count) if rows is None else rows
        self.classes: int | None = None
        self.value_range: Sequence[float] | None = None
        self.like: Item | None = None  # what every other item has the kind of

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        return f"item {self.rows[row]} of {self.name_of}"

    def __getitem__(self, rows: Rows) -> Read:
        with seeded(rows.seed + sum(rows.numbers[:1])):
            try:
                items = [self.item(number) for number in rows.numbers]
            except UserError as error:
                return Read(torch.empty(0), None, [], str(error))
        known = [item.label for item in items if item.label is not None]
        labels = torch.tensor(known) if known else None
        conditions = [as_states(item.condition) for item in items if item.condition is not None]
        if conditions:
            labels = join_condition(labels, torch.stack(conditions))
        return Read(torch.stack([item.x for item in items]), labels, [])

    def item(self, number: int) -> Item:
        """Return a row. UserError, naming it, where it cannot be read or served, or is of another kind than the first."""
        where = self.name(number)
        try:
            with calling("the data set", self.dataset):
                given = self.dataset[int(self.rows[number])]
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        x, label, condition = self.parts(given, where)
        item = Item(
            state(x, where), None if label is None else self.label(label, where),
            None if condition is None else state(condition, f"the condition of {where}"),
        )  # fmt: skip
        self.like = self.like or item
        for part, kind in item.kind().items():
            if kind != (first := self.like.kind()[part]):
                raise UserError(f"{where} has as its {part} {kind}, and the first one {first}; all of them must be alike")
        self.check_range(item.x, where)
        return item

    def parts(self, given: Any, where: str) -> tuple[Any, Any, Any]:
        """Return state, label and condition, None without, of what the data set gave. UserError for something else."""
        if isinstance(given, Mapping):
            if self.keys["x"] not in given:
                raise UserError(
                    f"{where} is a dictionary with {', '.join(map(str, given))}, not with {self.keys['x']}; name its "
                    "entries by dataloaders.keys.x, .label and .condition"
                )
            return given[self.keys["x"]], given.get(self.keys["label"]), given.get(self.keys["condition"])
        whole = tuple(given) if isinstance(given, tuple | list) else (given,)
        if not 1 <= len(whole) <= 3:
            raise UserError(f"{where} is {in_words(given)}; give x, (x, label), (x, label, condition) or a dictionary")
        x, label, condition = (*whole, None, None)[:3]
        return x, label, condition

    def label(self, given: Any, where: str) -> int:
        """Return a class as a number. UserError for what is none of the classes that there are."""
        try:
            label = operator.index(given)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where} has {in_words(given)} as its label; give a whole number of at least 0, and a condition as the "
                "third part, as in (x, None, condition)"
            ) from error
        classes = MAX_CLASSES if self.classes is None else self.classes
        if not 0 <= label < classes:
            known = f"the classes are 0 to {classes - 1}" if classes else "no classes are expected"
            more = f", or set dataloaders.num_classes={label + 1}" * (label >= 0)
            raise UserError(f"{where} has the label {label}, and {known}; number them 0, 1, 2, ...{more}")
        return label

    def check_range(self, x: Tensor, where: str) -> None:
        """Raise UserError for a value outside the range of all."""
        if self.value_range is None or x.dtype == torch.uint8:
            return
        low, high = x.min().item(), x.max().item()
        if not self.value_range[0] <= low <= high <= self.value_range[1]:
            raise UserError(
                f"{where} has values from {low:g} to {high:g}, outside dataloaders.value_range={typed(self.value_range)}; "
                "set the range that all have, or null"
            )


class TorchDataset(StreamDataset):
    """A torch data set as a run takes it: some rows held out, always the same, or another data set of the same kind.

    Pixels of uint8 are served as -1 to 1, other numbers as they are.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        held_out: Dataset[Any] | None = None,
        held_out_fraction: Inside = 0.1,
        held_out_most: Count = 10_000,
        keys: Mapping[str, str] | None = None,
        standardize: bool = False,
        **settings: Unpack[Described],
    ):
        """keys: what the entries of items that are dictionaries are called. held_out_most: rows kept in memory to evaluate
        on. settings: what is not given is read from the data set, see `described`.

        UserError for a data set that cannot be served, or is another one than the settings say.
        """
        names = KEYS | dict(keys or {})
        if not {"state_shape", "num_classes", "value_range", "condition_shape"} <= settings.keys():
            settings = described(dataset, names) | settings  # type: ignore[assignment]
        train = TorchReader(dataset, names)
        unseen = train if held_out is None else TorchReader(held_out, names)
        rows = np.arange(len(unseen))
        if held_out is None:
            rows = stratified_rows(None, len(train), held_out_fraction, seed=0).numpy()
            train = TorchReader(dataset, names, np.setdiff1d(np.arange(len(train)), rows))
        unseen.rows = rows[some_rows(len(rows), held_out_most)]
        classes = settings["num_classes"]
        with seeded(0):
            first = train.item(0)
            for reader in (train, unseen):
                reader.classes, reader.value_range, reader.like = classes, settings["value_range"], first
            train.item(0)
        shape, classes = first.x.shape, 0 if first.label is None else classes
        condition = None if first.condition is None else first.condition.shape
        super().__init__(train, unseen, shape, classes, settings["value_range"], settings, condition)
        self.standardize = standardize

    def states(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        return as_states(stored)


def counted(dataset: Any) -> int:
    """Return how many items there are. UserError where they have no numbers, or are too few."""
    name, sized = type(dataset).__name__, dataset
    iterable = isinstance(dataset, IterableDataset)
    if iterable or not isinstance(dataset, Dataset):
        raise UserError(
            f"dataloaders.dataset._target_={name} is {'an iterable-style' if iterable else 'no'} torch data set, and runs "
            "that can resume need a map-style one; derive it from torch.utils.data.Dataset, with __len__ and __getitem__"
        )
    lacking = [method for method in ("__len__", "__getitem__") if getattr(type(dataset), method, None) in LACKING]
    if lacking:
        raise UserError(f"the data set {name} has no {lacking[0]}; define it, as of any map-style torch data set")
    with calling("the data set", dataset):
        count = len(sized)
    if count < MIN_ROWS:
        raise UserError(f"the data set {name} has {count or 'no'} items; give {MIN_ROWS} or more, to train on and hold out")
    return count


LACKING = (None, Dataset.__getitem__)  # which raises NotImplementedError


def state(given: Any, where: str) -> Tensor:
    """Return a state as it is stored. UserError for what is none."""
    if not isinstance(given, Tensor):
        raise UserError(f"{where} is {in_words(given)}; give a tensor, as torch.as_tensor makes of an array")
    if given.ndim not in (1, 3) or not given.numel():
        add = "; add a channel, x[None]" if given.ndim == 2 else ""
        raise UserError(f"{where} is {in_words(given)}, and states have shape (D,) or (C, H, W){add}")
    if given.dtype != torch.uint8 and not given.is_floating_point():
        raise UserError(f"{where} is of {given.dtype}; give floating point, x.float(), or pixels in uint8")
    x = given.detach().cpu()
    x = x if x.dtype == torch.uint8 else x.float()
    if not x.isfinite().all():
        raise UserError(f"{where} has values that are NaN or infinite in fp32; leave it out, or correct them")
    return x


def of_kind(x: Tensor | None) -> str:
    return "none" if x is None else f"{in_words(x)} of {x.dtype}"


def described(dataset: Dataset[Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Return what a data set is, by the names of the settings: state_shape; num_classes, the largest label + 1, 0 without;
    value_range, of pictures in [-1, 1] or [0, 1], else None; condition_shape, None without.

    Of SCANNED rows at most, evenly spaced. UserError for one of them that cannot be served.
    """
    reader = TorchReader(dataset, keys)
    rows = np.unique(np.linspace(0, len(reader) - 1, min(SCANNED, len(reader))).round().astype(int))
    low, high, label = np.inf, -np.inf, -1
    with seeded(0):
        for row in rows.tolist():
            item = reader.item(row)
            low, high = min(low, item.x.min().item()), max(high, item.x.max().item())
            label = max(label, -1 if item.label is None else item.label)
    assert reader.like is not None
    x, condition = reader.like.x, reader.like.condition
    bounds = (-1.0, 1.0) if x.dtype == torch.uint8 or low < 0 else (0.0, 1.0)
    inside = x.dtype == torch.uint8 or (bounds[0] <= low and high <= bounds[1])
    ranged = bounds if x.ndim == 3 and inside else None
    of_condition = None if condition is None else tuple(condition.shape)
    shapes = {"state_shape": tuple(x.shape), "condition_shape": of_condition}
    return shapes | {"num_classes": label + 1, "value_range": ranged}
