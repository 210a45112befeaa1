"""A user's own files: what is read from them, and one clear sentence for each way they can be wrong."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from backends.submission import prepare
from common.errors import UserError
from dataloaders.array_dataset import ArrayDataset
from dataloaders.array_header import array_classes, array_shape
from evaluation.generate import fixed_noise
from evaluation.parts import build_source
from evaluation.sample import load
from run_files.run_folder import RunFolder

POINTS = np.random.RandomState(0).randn(40, 3)
LABELS = np.arange(40) % 4
DAMAGED = "is damaged, cut or no .np[yz] file of NumPy"


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
    "few": (lambda folder: saved(folder, "data.npy", x=POINTS[:9]), r"shape \(9, 3\); .*with 10 rows or more"),
}


def headed(header: str, version: bytes = b"\1\0", rows: int = 20) -> bytes:
    """A .npy file of so many rows of two numbers under that header."""
    text = header.encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + bytes(16 * rows)


def told(shape: str) -> str:
    return "{'descr': '<f8', 'fortran_order': False, 'shape': %s, }   \n" % shape  # noqa: UP031


GARBLED = {
    "more rows than there are": (headed(told("(999999999, 2)")), DAMAGED + ".*its header promises x of shape"),
    "sizes without end": (headed(told(f"({2**62}, {2**62})")), DAMAGED + ".*its header promises x of shape"),
    "negative rows": (headed(told("(-20, 2)")), r"shape \(-20, 2\)"),
    "negative columns": (headed(told("(20, -2)")), r"shape \(20, -2\)"),
    "a header cut": (headed(told("(20, 2)"))[:40], DAMAGED),
    "a header that is no dict": (headed("{'descr': '<f8', 'shape': (20, \n"), DAMAGED),
    "a header of other words": (headed("((((" * 40 + "\n"), DAMAGED),
    "no header": (b"\x93NUMPY", DAMAGED),
    "a version of no NumPy": (headed(told("(20, 2)"), b"\x09\0"), DAMAGED + r".*\(9, 0\)"),
    "text": (b"x,y\n1,2\n", DAMAGED),
}


@pytest.mark.parametrize("suffix", [".npy", ".npz", "y.npz"])
@pytest.mark.parametrize("fault", GARBLED)
def test_a_garbled_file_is_one_sentence_before_and_at_loading(tmp_path: Path, fault: str, suffix: str) -> None:
    content, message = GARBLED[fault]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    if suffix != ".npy":
        with zipfile.ZipFile(tmp_path / f"data{suffix}", "w") as archive:
            archive.writestr("x.npy", content)
            if suffix == "y.npz":
                archive.writestr("y.npy", content)
    for read in (array_shape, array_classes, ArrayDataset):
        with pytest.raises(UserError, match=message) as refused:
            read(str(path))
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("of", ["x", "y"])
def test_a_changed_byte_is_one_sentence(tmp_path: Path, of: str) -> None:
    """Its checksum tells, whichever array it lies in, and however far from the header."""
    states = np.random.RandomState(0).randn(20_000, 2)
    path = Path(saved(tmp_path, x=states, y=np.arange(20_000)))
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(f"{of}.npy").header_offset
    content = bytearray(path.read_bytes())
    content[start + 150_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=DAMAGED) as refused:
        ArrayDataset(str(path))
    assert str(path) in str(refused.value)


def test_labels_that_are_no_numbers_of_classes_are_refused(tmp_path: Path) -> None:
    for most in (10**6, 2**62, 2**64 - 1):
        path = saved(tmp_path, x=POINTS, y=np.full(40, most, dtype=np.uint64))
        for read in (array_classes, ArrayDataset):
            with pytest.raises(UserError, match=f"to {most}; number the classes"):
                read(path)


LABEL_FAULTS = {
    "short": (LABELS[:-1], r"shape \(39,\)"),
    "one-hot": (np.eye(4, dtype=int)[LABELS], r"shape \(40, 4\)"),
    "fractions": (LABELS.astype(float), "type float64"),
    "objects": (np.array([None] * 40), "type object"),
    "negative": (LABELS - 1, "go from -1 to 2; number the classes"),
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


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_counted(tmp_path: Path, value: float) -> None:
    states = POINTS.copy()
    states[[3, 7], 1] = value
    with pytest.raises(UserError, match="2 of the 40 rows"):
        ArrayDataset(saved(tmp_path, x=states))


def test_knobs_are_checked_against_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, x=POINTS.clip(-1, 1), y=LABELS)
    assert ArrayDataset(path, state_shape=[3], epoch_size=36, num_classes=4, value_range=[-1, 1]).value_range == (-1, 1)
    with pytest.raises(UserError, match=r"go from -1 to 1, outside dataloaders.value_range=\[0, 1\]"):
        ArrayDataset(path, value_range=[0, 1])
    words = ["run_name=x", "dataloaders=array", f"dataloaders.path={path}"]
    for fraction in (0, 1, -0.5):
        with pytest.raises(UserError, match="held_out_fraction takes a number above 0 and below 1"):
            prepare([*words, f"dataloaders.held_out_fraction={fraction}"])


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "model"), [((400, 2), "mlp"), ((60, 1, 4, 4), "cnn")])
def test_standardised_data_come_back_in_their_own_units(
    tmp_path: Path, small_run: Callable[..., Path], shape: tuple[int, ...], model: str
) -> None:
    path = saved(tmp_path, "data.npy", x=100 + 10 * np.random.RandomState(0).randn(*shape))
    words = ["dataloaders=array", f"dataloaders.path={path}", "dataloaders.epoch_size=null", "schedule=constant"]
    words += ["evaluation=generator", f"model={model}", "dataloaders.standardize=true"]
    if model == "cnn":
        words += ["model.width=8", "model.inner_width=8", "model.inner_blocks=1", "model.embedding=8"]
    whole = small_run("x", *words, "max_steps=4")
    resumed = small_run("y", *words, "max_steps=2", output="other")
    small_run("y", "resume=true", "max_steps=4", output="other")
    one, other = (load(folder / f"ckpts/{model}/{name}_last.pt", "cpu") for folder, name in ((whole, "x"), (resumed, "y")))
    columns = ArrayDataset(path).train_states.double().transpose(0, 1).flatten(1)
    mean, std = columns.mean(1), columns.std(1, correction=0)
    assert one.config["standardized"] == other.config["standardized"] == {"mean": mean.tolist(), "std": std.tolist()}
    assert torch.equal(one.sample(50), other.sample(50))
    scores = RunFolder(whole / "runs/x").status.read()["scores"]
    assert scores["eval/loss"] < 20 * np.prod(shape[1:])  # of standardised states
    assert scores["eval/energy_distance"] < 30 * np.prod(shape[1:]) ** 0.5  # 250 times that between other units

    for weights in one.objective.network.parameters():  # a velocity of 0: noise is carried to its own place
        weights.requires_grad_(False).zero_()
    noise = fixed_noise(build_source(one.config, torch.device("cpu")), 5, 0)
    place, width = (x.float().reshape(-1, *[1] * (len(shape) - 2)).expand(shape[1:]) for x in (mean, std))
    torch.testing.assert_close(one.sample(5), place + width * noise)
    x = one.real(5)[0]
    assert abs(x.mean() - 100) < 20
    expected = torch.distributions.Normal(place, width).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(one.log_prob(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("factor", "said"), [(1.0, False), (30.0, True), (0.03, True)])
def test_data_of_another_scale_are_advised_to_be_standardised(
    tmp_path: Path, small_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], factor: float, said: bool
) -> None:
    path = saved(tmp_path, "data.npy", x=factor * POINTS)
    small_run("x", "dataloaders=array", f"dataloaders.path={path}", "dataloaders.epoch_size=null", "max_steps=1")
    assert ("add dataloaders.standardize=true" in capsys.readouterr().out) == said


@pytest.mark.parametrize("first", ["true", "false"])
def test_a_start_from_data_of_another_standardisation_is_announced(
    tmp_path: Path, small_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], first: str
) -> None:
    path = saved(tmp_path, "data.npy", x=POINTS)
    words = ["dataloaders=array", f"dataloaders.path={path}", "dataloaders.epoch_size=null", "max_steps=1"]
    start = small_run("x", *words, f"dataloaders.standardize={first}") / "ckpts/mlp/x_last.pt"
    for second in ("true", "false"):
        small_run(f"y{second}", *words, f"dataloaders.standardize={second}", f"init_from={start}")
        assert (f"dataloaders.standardize={first} is the better start" in capsys.readouterr().out) == (first != second)


REFLOW = ["loss/coupling=reflow", "loss.coupling.teacher=x"]


@pytest.mark.parametrize("other", [["model=small_cnn_classifier", "loss=cross_entropy"], ["model=unet_small", *REFLOW]])
def test_what_cannot_learn_standardised_data_is_refused(tmp_path: Path, other: list[str]) -> None:
    path = saved(tmp_path, x=np.ones((20, 1, 8, 8)), y=np.arange(20) % 2)
    words = ["run_name=x", "dataloaders=array", f"dataloaders.path={path}", "dataloaders.standardize=true", *other]
    with pytest.raises(UserError, match="standardize is undone in samples"):
        prepare(words)
