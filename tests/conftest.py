"""Before any test imports trackio: its files go to a temporary folder, never to the user's dashboard."""
# ruff: noqa: E402

import gzip
import io
import os
import pickle
import random
import signal
import struct
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

BYTECODE = tempfile.TemporaryDirectory(prefix="bytecode-tests-", ignore_cleanup_errors=True)
TORCH = str(getattr(find_spec("torch"), "cached", ""))
if sys.dont_write_bytecode and not Path(TORCH).exists():  # every process would compile torch's sources again, seconds each
    sys.dont_write_bytecode, sys.pycache_prefix = False, BYTECODE.name
    os.environ["PYTHONPYCACHEPREFIX"] = BYTECODE.name
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import numpy as np
import pytest
import torch  # compiled once, here
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from omegaconf import OmegaConf
from PIL import Image

TRACKIO_FOLDER = tempfile.TemporaryDirectory(prefix="trackio-tests-", ignore_cleanup_errors=True)
os.environ["TRACKIO_DIR"] = TRACKIO_FOLDER.name
os.environ["OMP_NUM_THREADS"] = "1"  # tests are small: one thread is faster, and numbers do not hang on the machine
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # no test cuts the power, and a run waits for the disk some fifty times
for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background job, or nohup, has them ignored, and so its children
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
for remote in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_STORAGE_MODE", "TRACKIO_WEBHOOK_URL"):
    os.environ.pop(remote, None)

# Composing a command line takes Hydra 0.15 s of processor time, half of it for what is the same every time.
CONFIGS, READ = str(Path(__file__).parents[1] / "configs"), dict[str, Any]()
hydras_reading, hydras_choices = ConfigRepository.load_config, defaults_list._create_interpolation_map
NO_CHOICES = OmegaConf.create({})


def read_once(repository: ConfigRepository, config_path: str) -> Any:
    """Return Hydra's reading of a file; one of configs/ is read once, and given as a copy, since Hydra merges into it."""
    if not any(source.path == CONFIGS for source in repository.get_sources()):
        return hydras_reading(repository, config_path)
    if config_path not in READ:
        READ[config_path] = hydras_reading(repository, config_path)
    return deepcopy(READ[config_path])


def choices_where_read(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
    """Return what ${} in a list of defaults is worked out from; Hydra makes it for every file, few hold one."""
    return hydras_choices(overrides, defaults, self_added) if "${" in repr(defaults) else NO_CHOICES


ConfigRepository.load_config = read_once  # type: ignore[method-assign]
defaults_list._create_interpolation_map = choices_where_read
MANY = 8  # cases of one test


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave a third of a test's cases, where they are many, to the quick selection: the others count as slow.

    The checksum of a case's name decides, so that what one test leaves out another holds.
    """
    items.sort(key=lambda item: item.get_closest_marker("notebook") is None)  # long, and by name among the last to begin
    of = [item.nodeid.partition("[")[0] for item in items]
    counts = Counter(of)
    for item, name in zip(items, of, strict=True):
        if counts[name] > MANY and crc32(item.nodeid.encode()) % 3:
            item.add_marker(pytest.mark.slow)


SMALL = [
    "trackio.enabled=false", "device=cpu", "evaluation=loss_only", "evaluation.samples=64", "evaluation.final_samples=64",
    "model.width=16", "model.depth=2", "dataloaders.epoch_size=1000", "batch_size=128", "epochs=3", "log_every=2",
    "solver.steps=4", "num_workers=0", "~callbacks.pictures",
]  # fmt: skip


def train_small(place: Path, name: str, *overrides: str, output: str = "outputs") -> Path:
    """Train a tiny kmeans run under place/outputs, in this process; return that folder."""
    import launcher

    folder = place / output
    arguments = [f"run_name={name}", f"output_dir={folder}", f"log.file={place / 'EXPERIMENT_LOG.md'}"]
    resumed = any(word.startswith(("resume=", "eval_checkpoint=")) for word in overrides)
    image = any(word.startswith("model=") for word in overrides)
    small = [] if resumed else [word for word in SMALL if not (image and word.startswith("model."))]
    launcher.run(*arguments, *small, *overrides)
    return folder


DIGITS = (
    "dataloaders=digits", "model=cnn", "model.width=8", "dataloaders.epoch_size=1438", "conditional=true", "max_steps=1"
)  # fmt: skip


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., Path]:
    """small_run(name, *overrides, output="outputs"): the folder of such a run below tmp_path."""
    return partial(train_small, tmp_path)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """shared_run(name, *overrides): the folder of such a run, trained once for all tests; not to be changed."""

    @cache
    def trained(name: str, *overrides: str) -> Path:
        return train_small(tmp_path_factory.mktemp("shared"), name, *overrides)

    return trained


@pytest.fixture(scope="session", autouse=True)
def leave_nothing_in_the_checkout() -> Iterator[None]:
    """The default output_dir and the log are for users: a test that forgets its own fails the session."""
    place, log = (Path(__file__).parents[1] / name for name in ("outputs", "EXPERIMENT_LOG.md"))
    before, written = place.exists(), log.read_bytes()
    yield
    assert before or not place.exists(), f"a test wrote into {place}; give it an output_dir below tmp_path"
    assert log.read_bytes() == written, f"a test wrote into {log}; give it a log.file below tmp_path"


@pytest.fixture(autouse=True)
def restore_global_state() -> Iterator[None]:
    """Runs seed torch's global generator and set numerics; tests must not see each other's."""
    python, torch_state = random.getstate(), torch.get_rng_state()
    yield
    random.setstate(python)
    torch.set_rng_state(torch_state)
    torch.use_deterministic_algorithms(False)


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Pickles as Python 2 did in 2009: protocol 2, bytes as its strings, NumPy under its old name (see old_pickle)."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, text: bytes) -> None:
        short = len(text) < 256
        self.write((b"U" + bytes([len(text)]) if short else b"T" + struct.pack("<i", len(text))) + text)
        self.memoize(text)

    dispatch[bytes] = save_string


def old_pickle(value: Any) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_batches(classes: int) -> dict[str, bytes]:
    """The members of an official archive, each of a few pictures: 250 to train on and 60 to test."""
    fine = classes == 100
    folder = "cifar-100-python" if fine else "cifar-10-batches-py"
    names = {"train": 250, "test": 60} if fine else {f"data_batch_{k}": 50 for k in range(1, 6)} | {"test_batch": 60}
    members, random_state = {}, np.random.RandomState(0)
    for name, rows in names.items():
        labels = [(k * 7 + k // classes) % classes for k in range(rows)]
        batch = {b"data": random_state.randint(0, 256, (rows, 3072), dtype=np.uint8), b"batch_label": name.encode()}
        batch |= {b"fine_labels": labels, b"coarse_labels": [k // 5 for k in labels]} if fine else {b"labels": labels}
        members[f"{folder}/{name}"] = old_pickle(batch)
    kinds = {b"fine_label_names": 100, b"coarse_label_names": 20} if fine else {b"label_names": 10}
    meta = {kind: [b"%s of kind %d" % (kind[:4], k) for k in range(count)] for kind, count in kinds.items()}
    return members | {f"{folder}/{'meta' if fine else 'batches.meta'}": old_pickle(meta)}


def write_archive(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w:gz") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def write_cifar(place: Path, classes: int) -> dict[str, Any]:
    write_archive(place / f"cifar-{classes}-python.tar.gz", cifar_batches(classes))
    return {"root": str(place), "md5": None}


def write_pictures(root: Path, names: list[str], sides: tuple[int, int] = (12, 10)) -> None:
    """Small pictures, no two alike, in the format that their suffix says."""
    random_state = np.random.RandomState(len(names))
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random_state.randint(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize(sides, Image.Resampling.BICUBIC).save(file)


def write_tree(place: Path) -> dict[str, Any]:
    """Two class folders, the pictures of one in a folder further down, in several formats."""
    folders = [("b/deeper", ".png", 140), ("a", ".jpg", 140), ("a", ".bmp", 70)]
    write_pictures(place, [f"{folder}/{k}{suffix}" for folder, suffix, count in folders for k in range(count)])
    (place / "a" / "notes.txt").write_text("no picture")
    (place / ".thumbnails").mkdir()
    return {"root": str(place), "size": 8, "held_out_fraction": 0.3}


def write_imagenet(place: Path) -> dict[str, Any]:
    """Three class folders of 84 training pictures each, 81 of them held out in all."""
    for part, count in (("train", 84), ("val", 27)):
        names = [f"n0{k}/n0{k}_{i}.JPEG" for k in (1443537, 1484850, 2) for i in range(count)]
        write_pictures(place / part, names, (20, 17))
    return {"root": str(place), "size": 16}


def write_celeba(place: Path, parts: tuple[int, ...] = (210, 5, 85)) -> dict[str, Any]:
    """The three files of CelebA, pictures of 178 x 218 in JPEG."""
    names = [f"{k:06d}.jpg" for k in range(1, sum(parts) + 1)]
    write_pictures(place / "img_align_celeba", names, (178, 218))
    of = [part for part, count in enumerate(parts) for _ in range(count)]
    (place / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in zip(names, of, strict=True)))
    attributes = ["Bald", "Male", "Smiling"]
    rows = [f"{n}  {' '.join('-1' if (k >> j) % 2 else ' 1' for j in range(3))}\n" for k, n in enumerate(names)]
    (place / "list_attr_celeba.txt").write_text("".join([f"{len(names)}\n", " ".join(attributes) + " \n", *rows]))
    return {"root": str(place), "size": 8}


def write_vae(place: Path) -> Path:
    """A random autoencoder of factor 8 and 4 latent channels, as diffusers saves it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    AutoencoderKL(**settings).save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such an autoencoder; not to be changed."""
    return write_vae(tmp_path_factory.mktemp("vae"))


def write_latents(place: Path) -> dict[str, Any]:
    """A cache of the latents of such an ImageNet, in several shards, by the script that makes them."""
    from scripts import cache_latents

    (place / "pictures").mkdir()
    settings = write_imagenet(place / "pictures")
    words = [f"out={place / 'latents'}", "shard_rows=100", "batch_size=50", "num_workers=0", "device=cpu"]
    words += ["dataloaders=imagenet_pixels", *(f"dataloaders.{key}={value}" for key, value in settings.items())]
    assert cache_latents.main([*words, f"vae.path={write_vae(place / 'vae')}"]) == 0
    return {"path": str(place / "latents")}


def write_encoded(place: Path) -> dict[str, Any]:
    (place / "pictures").mkdir()
    settings = {f"images.{key}": value for key, value in write_imagenet(place / "pictures").items()}
    return settings | {"state_shape": [4, 2, 2], "vae": {"path": str(write_vae(place / "vae"))}}


def idx(array: np.ndarray) -> bytes:
    """An array as MNIST's files hold it."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_mnist(place: Path) -> dict[str, Any]:
    """The four files, compressed, of 250 pictures to train on and 60 to test."""
    random_state = np.random.RandomState(0)
    for name, rows in (("train", 250), ("t10k", 60)):
        pictures, labels = random_state.randint(0, 256, (rows, 28, 28)), np.arange(rows) % 10
        (place / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures), 1))
        (place / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), 1))
    return {"root": str(place)}


def write_pairs(place: Path) -> dict[str, Any]:
    """Two class folders, and grey pictures of the same names in another format."""
    for root, suffix in (("pictures", ".png"), ("grey", ".jpg")):
        write_pictures(place / root, [f"{folder}/{k}{suffix}" for folder in "ab" for k in range(175)])
    return {"root": str(place / "pictures"), "condition_root": str(place / "grey"), "size": 8, "held_out_fraction": 0.3}


WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "photos": lambda place: {"crops": 250, "held_out_crops": 60},
    "cifar10": lambda place: write_cifar(place, 10),
    "cifar100": lambda place: write_cifar(place, 100),
    "image_folder": write_tree,
    "image_pairs": write_pairs,
    "mnist": write_mnist,
    "imagenet_pixels": write_imagenet,
    "imagenet_encoded": write_encoded,
    "imagenet": write_latents,
    "celeba": write_celeba,
    "torch": lambda place: {"dataset._target_": "tests.dataloaders.user_sets.Points"},
}


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """official(name): settings that make configs/dataloaders/<name>.yaml small, its files being in the official format."""
    made: dict[str, dict[str, Any]] = {}

    def settings(name: str) -> dict[str, Any]:
        if name not in made:
            made[name] = WRITERS[name](tmp_path_factory.mktemp(name)) if name in WRITERS else {}
        return made[name]

    return settings
