"""A user's own files: what is read from them, and one clear sentence for each way they can be wrong."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders.array_dataset import ArrayDataset
from dataloaders.array_header import array_classes, array_shape
from training.errors import UserError

POINTS = np.random.RandomState(0).randn(40, 3)
LABELS = np.arange(40) % 4


def saved(folder: Path, name: str = "data.npz", **arrays: object) -> str:
    path = folder / name
    if path.suffix == ".npy":
        np.save(path, arrays["x"])  # type: ignore[arg-type]
    else:
        np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "uint8", "int64", "uint32"])
@pytest.mark.parametrize("shape", [(40, 3), (12, 2, 4, 5)])
@pytest.mark.parametrize("name", ["data.npy", "data.npz"])
def test_numeric_files_are_served_as_stored(tmp_path: Path, dtype: str, shape: tuple[int, ...], name: str) -> None:
    stored = (np.arange(np.prod(shape)).reshape(shape) % 200).astype(dtype)
    path = saved(tmp_path, name, x=stored)
    assert array_shape(path) == list(shape[1:]) and array_classes(path) == 0
    dataset = ArrayDataset(path)
    assert dataset.state_shape == shape[1:] and dataset.train_labels is None and dataset.num_classes == 0
    assert dataset.states.dtype == torch.float32
    expected = sorted(stored.astype(np.float32).reshape(len(stored), -1).tolist())
    assert sorted(dataset.states.flatten(1).tolist()) == expected
    assert dataset.held_out(5, torch.Generator())[1] is None


def test_compressed_column_ordered_and_old_format_files(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.asfortranarray(POINTS), y=LABELS.astype("uint8"))
    assert (array_shape(str(path)), array_classes(str(path))) == ([3], 4)
    assert len(ArrayDataset(str(path)).states) == 40
    with (tmp_path / "data.npy").open("wb") as stream:
        np.lib.format.write_array(stream, POINTS, version=(2, 0))
    assert array_shape(str(tmp_path / "data.npy")) == [3]


def test_held_out_rows_are_a_fixed_share_of_each_label(tmp_path: Path) -> None:
    path = saved(tmp_path, x=POINTS, y=LABELS)
    dataset, again = (ArrayDataset(path, held_out_fraction=0.2) for _ in range(2))
    assert dataset.held_out_labels is not None
    assert dataset.held_out_labels.bincount().tolist() == [2, 2, 2, 2] and dataset.epoch_size == 32
    assert torch.equal(dataset.held_out_states, again.held_out_states)


def test_headers_are_read_without_importing_torch() -> None:
    code = "import dataloaders.array_header, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


FILE_FAULTS: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda folder: str(folder / "none.npy"), "there is no file .*none.npy"),
    "folder": (lambda folder: str(folder), "no array file"),
    "suffix": (lambda folder: saved(folder, "data.pt.npz", x=POINTS).replace(".npz", ""), "no array file"),
    "key": (lambda folder: saved(folder, states=POINTS), "no array named x"),
    "objects": (lambda folder: saved(folder, x=np.array([["a", None]] * 20)), "of type object"),
    "text": (lambda folder: saved(folder, "data.npy", x=np.array([["a", "b"]] * 20)), "of type <U1"),
    "complex": (lambda folder: saved(folder, x=POINTS * 1j), "of type complex128"),
    "flat": (lambda folder: saved(folder, x=POINTS[:, 0]), r"shape \(40,\)"),
    "grey images": (lambda folder: saved(folder, x=np.zeros((40, 8, 8))), r"shape \(40, 8, 8\)"),
    "no columns": (lambda folder: saved(folder, x=np.zeros((40, 0))), r"shape \(40, 0\)"),
    "few": (lambda folder: saved(folder, "data.npy", x=POINTS[:9]), "holds 9 rows"),
}
LABEL_FAULTS = {
    "short": (LABELS[:-1], r"shape \(39,\)"),
    "one-hot": (np.eye(4, dtype=int)[LABELS], r"shape \(40, 4\)"),
    "fractions": (LABELS.astype(float), "type float64"),
    "objects": (np.array([None] * 40), "type object"),
    "negative": (LABELS - 1, "go down to -1"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_unfit_files_are_refused_before_and_at_loading(tmp_path: Path, fault: str) -> None:
    build, message = FILE_FAULTS[fault]
    path = build(tmp_path)
    for read in (array_shape, array_classes, ArrayDataset):
        with pytest.raises(UserError, match=message):
            read(path)


@pytest.mark.parametrize("fault", LABEL_FAULTS)
def test_unfit_labels_are_refused(tmp_path: Path, fault: str) -> None:
    labels, message = LABEL_FAULTS[fault]
    path = saved(tmp_path, x=POINTS, y=labels)
    for read in (array_classes, ArrayDataset):
        with pytest.raises(UserError, match=message):
            read(path)


@pytest.mark.parametrize("name", ["data.npy", "data.npz"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match="not in NumPy's"):
        array_shape(str(tmp_path / name))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_counted(tmp_path: Path, value: float) -> None:
    states = POINTS.copy()
    states[[3, 7], 1] = value
    with pytest.raises(UserError, match="2 of the 40 rows"):
        ArrayDataset(saved(tmp_path, x=states))


def test_knobs_are_checked_against_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, x=POINTS.clip(-1, 1), y=LABELS)
    assert ArrayDataset(path, [3], 36, 4, [-1, 1]).value_range == (-1, 1)
    with pytest.raises(UserError, match=r"go from -1 to 1, outside dataloaders.value_range=\[0, 1\]"):
        ArrayDataset(path, value_range=[0, 1])
    for fraction in (0, 1, -0.5):
        with pytest.raises(UserError, match="held_out_fraction must lie between"):
            ArrayDataset(path, held_out_fraction=fraction)
