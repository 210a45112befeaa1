"""The cache of an autoencoder's latents: what it holds, killed, damaged, and of pictures that have changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.seeds import generator_for
from dataloaders.base_dataloaders import EpochPlan
from dataloaders.latent_cache import LatentCache
from dataloaders.stream import Rows
from models.vae.stable_diffusion_vae import StableDiffusionVAE
from run_files.run_lock import RunLock
from scripts import cache_latents
from tests.dataloaders.streamed import Official, build, folder, refusal

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(official: Official, tmp_path: Path) -> Path:
    """A copy of the small cache, to be changed."""
    return Path(shutil.copytree(official("imagenet")["path"], tmp_path / "latents"))


def words_of(official: Official, out: Path | str) -> list[str]:
    """The command that made the cache."""
    made = Path(official("imagenet")["path"]).parent
    words = [f"out={out}", "shard_rows=100", "batch_size=50", "num_workers=0", "device=cpu", "dataloaders=imagenet_pixels"]
    return [*words, f"dataloaders.root={made / 'pictures'}", "dataloaders.size=16", f"vae.path={made / 'vae'}"]


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_cached_latents_are_the_autoencoders_own(official: Official, cache: Path) -> None:
    made = cache_of(official)
    vae = StableDiffusionVAE(str(made.parent / "vae"))
    pictures = build("imagenet_pixels", {"root": made.parent / "pictures", "size": 16})
    read = pictures.train[Rows(list(range(252)), 0)]
    means = build("imagenet", {"path": cache, "sample": "false", "flip": "false"})
    x = read.stored.float() / 127.5 - 1
    expected, std = vae.moments(x)
    stored = means.train[Rows(list(range(0, 504, 2)), 0)]
    assert torch.equal(stored.labels, read.labels)
    torch.testing.assert_close(stored.stored[:, 0].float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(stored.stored[:, 1].float(), std, rtol=2e-3, atol=2e-3)
    mirrored = means.train[Rows(list(range(1, 504, 2)), 0)]
    torch.testing.assert_close(mirrored.stored[:, 0].float(), vae.moments(x.flip(3))[0], rtol=2e-3, atol=2e-3)
    assert means.num_classes == 3 and means.state_shape == (4, 2, 2) and len(means.unseen) == 81


def cache_of(official: Official) -> Path:
    return Path(official("imagenet")["path"])


def test_latents_are_drawn_from_their_moments_half_of_them_mirrored(official: Official) -> None:
    dataset = build("imagenet", official("imagenet"))
    assert isinstance(dataset, LatentCache)
    mean, std = torch.full((2000, 4, 2, 2), 1.5), torch.full((2000, 4, 2, 2), 0.25)
    drawn = dataset.states(torch.stack([mean, std], dim=1).half(), torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and abs(drawn.mean() - 1.5) < 0.01 and abs(drawn.std() - 0.25) < 0.01
    numbers = dataset.chosen(torch.arange(2000), torch.Generator().manual_seed(0))
    assert torch.equal(numbers // 2, torch.arange(2000)) and abs((numbers % 2).float().mean() - 0.5) < 0.05
    plans = (EpochPlan(9, generator_for(0, "o"), torch.Generator().manual_seed(k)) for k in (0, 1))
    (first, _), (again, _) = (next(dataset.epoch(plan)) for plan in plans)
    assert not torch.equal(first, again) and torch.allclose(first, again, atol=20 * float(std.max()))


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_encoding_goes_on_and_ends_the_same(official: Official, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "latents"
    words = words_of(official, out)
    code = f"""
import os, sys
sys.path.insert(0, '.')
from run_files.run_lock import RunLock
from scripts import cache_latents
from tests.dataloaders.streamed import Official, build, folder, pixels_of, refusal
add = cache_latents.Cache.add
def once(self, *shard):
    add(self, *shard)
    (self.folder / '.train-00001.npy.99.tmp').write_bytes(b'half')
    os.kill(os.getpid(), 9)
cache_latents.Cache.add = once
cache_latents.main({words!r})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -9
    assert {path.suffix for path in out.iterdir()} == {".npy", ".json", ".tmp", ".lock", ""}  # "": .lock
    assert "is not finished; give the command that began it again" in refusal("imagenet", {"path": out})
    before = (out / "train-00000.npy").stat().st_mtime_ns
    assert cache_latents.main(words) == 0
    assert (out / "train-00000.npy").stat().st_mtime_ns == before  # not made again
    assert contents(out) == contents(cache_of(official))
    assert cache_latents.main([f"out={out}", "verify=true"]) == 0 and "every checksum right" in capsys.readouterr().out


def test_one_folder_is_filled_by_one_command_at_a_time(official: Official, tmp_path: Path, capsys: Any) -> None:
    words = words_of(official, tmp_path / "out")
    held = RunLock(tmp_path / "out")
    held.acquire()
    assert cache_latents.main(words) == 1
    assert f"latents of out are being made by another process right now (process {os.getpid()} on" in capsys.readouterr().err
    assert [*contents(tmp_path / "out")] == [".lock"]
    assert cache_latents.main(["out=pyproject.toml", *words[1:]]) == 1
    assert "out=pyproject.toml is not a folder; give a new one" in capsys.readouterr().err
    held.release()
    assert cache_latents.main(words) == 0 and ".lock" not in contents(tmp_path / "out")


def test_damage_is_found_and_mended(official: Official, cache: Path, capsys: Any) -> None:
    whole, shard = contents(cache), cache / "train-00001.npy"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    (cache / "held_out-00000-labels.npy").unlink()
    assert "held_out-00000-labels.npy is missing or cut short; the command" in refusal("imagenet", {"path": cache})
    assert cache_latents.main([f"out={cache}", "verify=true"]) == 1
    said = capsys.readouterr().err
    assert "2 of 8 files" in said and "train-00001.npy" in said and "held_out-00000-labels.npy" in said
    assert "delete those that are there, then repeat the command" in said
    shard.unlink()
    assert "is missing or cut short" in refusal("imagenet", {"path": cache})
    assert cache_latents.main(words_of(official, cache)) == 0
    assert contents(cache) == whole


def test_pictures_that_cannot_be_read_are_left_out_of_a_cache(official: Official, tmp_path: Path, capsys: Any) -> None:
    made = cache_of(official).parent
    place = shutil.copytree(made / "pictures", tmp_path / "pictures")
    (place / "train" / "n02" / "n02_3.JPEG").write_text("no picture")
    words = [w for w in words_of(official, tmp_path / "latents") if not w.startswith("dataloaders.root")]
    assert cache_latents.main([*words, f"dataloaders.root={place}"]) == 0
    assert "1 pictures cannot be read and were left out: n02/n02_3.JPEG" in capsys.readouterr().out
    dataset = build("imagenet", {"path": tmp_path / "latents"})
    assert len(dataset.train) == 251 and dataset.train.labels.bincount().tolist() == [84, 84, 83]


def test_a_cache_of_pictures_that_have_changed_is_left_alone(official: Official, cache: Path, capsys: Any) -> None:
    """Killed before its end, it would else go on with a picture that is both trained on and held out."""
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["made_from"]["files"] = {"count": 332, "blake2b": "of one picture less"}
    (cache / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    (cache / "train-00001.npy").unlink()
    before = contents(cache)
    assert cache_latents.main(words_of(official, cache)) == 1
    said = capsys.readouterr().err
    assert "the pictures are not those that out=" in said and "(332 then, 333 now;" in said and said.count("\n") == 1
    assert contents(cache) == before


def test_what_tells_one_set_of_pictures_from_another(pictures: Path) -> None:
    """A name, a size in bytes, a class and a part; not when or in which order it was written."""

    def state() -> dict[str, Any]:
        return cache_latents.files_of(build("image_folder", folder(pictures, held_out_fraction=fraction)))

    fraction, found = 0.25, []
    file, other = pictures / "class0" / "00.png", pictures / "class1" / "00.png"
    for change in (
        lambda: None,
        lambda: shutil.copy(file, pictures / "class0" / "99.png"),
        lambda: file.write_bytes(file.read_bytes() + b" "),
        lambda: file.rename(other),
    ):
        change()
        found.append(state())
        os.utime(pictures / "class1" / "01.png", (0, 0))
        assert state() == found[-1]
    fraction = 0.5
    assert len({each["blake2b"] for each in [*found, state()]}) == 5
    assert [each["count"] for each in found] == [12, 13, 13, 13]


@pytest.mark.parametrize("words, sentence", [
    ([], "out is missing"),
    (["out={out}", "rows=3"], "cannot use 'rows=3'"),
    (["out={out}", "shard_rows=0"], "shard_rows takes a whole number of at least 1"),
    (["out={out}", "verify=true"], "only cached latents can be verified"),
    (["out={out}", "verify=yes"], "verify takes true or false"),
    (["out={out}", "dataloaders=kmeans"], "dataloaders=kmeans has no coloured pictures"),
])  # fmt: skip
def test_the_script_refuses_in_one_sentence(words: list[str], sentence: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert cache_latents.main([word.format(out=out) for word in words] or ["verify=false"]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not out.exists()


def test_a_folder_of_other_things_is_never_written_to(official: Official, cache: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    assert cache_latents.main(words_of(official, other)) == 1 and "holds other things" in capsys.readouterr().err
    before = contents(cache)
    assert cache_latents.main([w.replace("shard_rows=100", "shard_rows=50") for w in words_of(official, cache)]) == 1
    assert "made with another shard_rows" in capsys.readouterr().err and contents(cache) == before


SHARD = {
    "part": "train", "rows": 1, "file": "train-00000.npy", "labels": "train-00000-labels.npy",
    "file_bytes": 1, "labels_bytes": 1, "file_blake2b": "",
    "labels_blake2b": "",
}  # fmt: skip
WHOLE = {"finished": True, "shape": [4, 8, 8], "num_classes": 2, "shards": [], "made_from": {}}


@pytest.mark.parametrize("text, words", [
    (None, "there are no cached latents in"),
    ("{", "is no manifest"),
    (json.dumps({"finished": True}), "is no manifest"),
    (json.dumps({"format": 0, "finished": False, "shards": [], "made_from": {}}), "is not finished"),
    (json.dumps({"finished": True, "shards": [], "made_from": []}), r"(made_from)"),
    (json.dumps(WHOLE | {"num_classes": "y"}), r"(num_classes)"),
    (json.dumps(WHOLE | {"shape": [1e400]}), r"(shape)"),
    (json.dumps(WHOLE | {"shards": [{"x": 1}]}), r"(part)"),
    (json.dumps(WHOLE | {"shards": [SHARD | {"file": "../int.npy"}]}), r"(file)"),
    (json.dumps(WHOLE | {"shards": [SHARD | {"labels": "/x.npy"}]}), r"(labels)"),
])  # fmt: skip
def test_a_folder_that_is_no_cache_is_one_sentence(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    assert words in refusal("imagenet", {"path": tmp_path})
    assert cache_latents.main([f"out={tmp_path}", "verify=true"]) == 1


def test_encoding_on_the_fly_needs_an_autoencoder(official: Official) -> None:
    settings = {key: value for key, value in official("imagenet_encoded").items() if key != "vae"}
    assert "add vae=stable_diffusion vae.path=<folder>" in refusal("imagenet_encoded", settings)


def test_latents_in_a_store_are_those_of_a_folder(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where the machine is lost on the way, and on one that has nothing of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    store, address, added = tmp_path / "store", f"file://{tmp_path / 'store'}", list[str]()
    add = cache_latents.Cache.add

    def lost(cache: Any, part: str, name: str, *rest: Any) -> None:
        added.append(name)
        if len(added) == 3:
            raise KeyboardInterrupt
        add(cache, part, name, *rest)

    monkeypatch.setattr(cache_latents.Cache, "add", lost)
    assert cache_latents.main(words_of(official, address)) == 130
    assert f"{address} is not finished" in refusal("imagenet", {"path": address})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    assert cache_latents.main(words_of(official, address)) == 0
    assert contents(store) == contents(cache_of(official)) and added[3:] == [added[2], "held_out-00000.npy"]
    assert cache_latents.main([f"out={address}", "verify=true"]) == 0 and "every checksum right" in capsys.readouterr().out

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    there, here = build("imagenet", {"path": address}), build("imagenet", {"path": cache_of(official)})
    for mine, theirs in ((there.train, here.train), (there.unseen, here.unseen)):
        assert torch.equal(mine[Rows([0, 7], 0)].stored, theirs[Rows([0, 7], 0)].stored)
    (fetched,) = (tmp_path / "third").rglob("train-00000.npy")
    before, other = fetched.stat().st_mtime_ns, fetched.with_name("train-00001.npy")
    other.unlink()
    build("imagenet", {"path": address})  # fetches what is missing, and no more
    assert contents(fetched.parent).keys() - {".manifest.json.lock"} == contents(store).keys()
    assert fetched.stat().st_mtime_ns == before
    damaged = bytearray((store / other.name).read_bytes())
    damaged[-7] ^= 1
    (store / other.name).write_bytes(damaged)
    other.unlink()
    assert "train-00001.npy is damaged" in refusal("imagenet", {"path": address})
    assert cache_latents.main([f"out={address}", "verify=true"]) == 1 and "1 of 8 files" in capsys.readouterr().err
    manifest = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(manifest.replace("train-00001.npy", "../../train-00001.npy"))
    assert "is no manifest of cached latents (file)" in refusal("imagenet", {"path": address})
    (store / "notes.txt").write_text("x")
    (store / "manifest.json").unlink()
    assert cache_latents.main(words_of(official, address)) == 1
    assert "holds other things" in capsys.readouterr().err
