"""Scripts whose work several processes of torchrun share: two end with what one gives, to the byte."""

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import cache_latents, eval_fid
from tests.conftest import DIGITS, write_imagenet, write_vae
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.process]


def by_two(script: str, words: list[str], place: Path) -> list[subprocess.CompletedProcess[str]]:
    """What two ranks of a script's command have said, rank 0 first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    own = [shared | {"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(2)]
    ranks = [Forked(ROOT / f"scripts/{script}.py", *words, cwd=place, env=env) for env in own]
    return [process.completed() for process in ranks]


def test_two_processes_score_samples_as_one(shared_run: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = shared_run("x", *DIGITS) / "ckpts/cnn/x_last.pt"
    words = [f"ckpt={checkpoint}", "n=1100", "nfe=2", "replicates=2", "device=cpu"]  # a whole chunk of samples, and a part
    alone = [vars(score) for score in eval_fid.evaluate([*words, f"cache={tmp_path / 'one'}"])]
    ranks = by_two("eval_fid", [*words, f"cache={tmp_path / 'two'}", "out=scores.json"], tmp_path)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(alone)) and len(alone) > 5
    assert "frechet_distance" in ranks[0].stdout and ranks[1].stdout == ""


def test_two_processes_write_the_latents_of_one_and_go_on_after_a_kill(tmp_path: Path) -> None:
    pictures, vae = tmp_path / "pictures", write_vae(tmp_path / "vae")
    settings = write_imagenet(pictures)
    words = ["shard_rows=50", "batch_size=50", "num_workers=0", "device=cpu", f"vae.path={vae}"]
    words += ["dataloaders=imagenet_pixels"] + [f"dataloaders.{key}={value}" for key, value in settings.items()]
    cache_latents.cache_latents([f"out={tmp_path / 'one'}", *words])
    whole = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert sum(name.startswith("train-") for name in whole) == 12  # six shards

    left = tmp_path / "two"  # as of two processes that were killed, each in its second shard
    left.mkdir()
    manifest = json.loads(whole["manifest.json"])
    listed = [shard for shard in manifest["shards"] if shard["file"] in ("train-00000.npy", "train-00001.npy")]
    cut = {"format": manifest["format"], "finished": False, "made_from": manifest["made_from"], "shards": listed}
    (left / "manifest.json").write_text(json.dumps(cut))
    (left / ".manifest.json.lock").touch()
    for name in [shard[key] for shard in listed for key in ("file", "labels")]:
        (left / name).write_bytes(whole[name])
    before = (left / "train-00000.npy").stat().st_mtime_ns
    ranks = by_two("cache_latents", [f"out={left}", *words], tmp_path)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert {path.name: path.read_bytes() for path in left.iterdir()} == whole
    assert (left / "train-00000.npy").stat().st_mtime_ns == before and "333 pictures" in ranks[0].stdout

    ranks = by_two("cache_latents", [f"out={left}", *words, "shard_rows=60"], tmp_path)
    said = [line for rank in ranks for line in rank.stderr.splitlines() if line.startswith("cache_latents.py: ")]
    assert len(said) == 1 and "made with another shard_rows" in said[0]
    assert {rank.returncode for rank in ranks} <= {1, 75} and all("Traceback" not in rank.stderr for rank in ranks)
