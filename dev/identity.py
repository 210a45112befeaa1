#!/usr/bin/env python
"""Tiny runs whose every weight and metric is hashed: a change that should alter no number shows it here.

python dev/identity.py --write before.json           # at the commit to be compared with
python dev/identity.py --compare before.json         # after the change: identical or different, run by run
python dev/identity.py --fixtures tests/fixtures     # a tiny run of each recipe, to be loaded and resumed by later code

Each run is a process of its own with one thread, on the CPU. Hashes are of one kind of processor and one version of torch.
The exit status of --compare is 1 when a run differs.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import ROOT, Parser, front
from common.errors import UserError
from configuration.nodes import check_known

PLAIN = (
    "device=cpu trackio.enabled=false callbacks=none evaluation.samples=100 evaluation.final_samples=100 "
    "++optimizer.fused=null"  # as before there was a choice
)
RUNS = {
    "default": "epochs=2",
    "moons_minibatch_ot": "dataloaders=moons loss/coupling=minibatch_ot batch_size=256 max_steps=60",
    **{
        f"gaussian_{loss}": f"dataloaders=gaussian loss={loss} max_steps=60"
        for loss in ("meanflow", "improved_meanflow", "shortcut", "terminal_velocity")
    },
    "digits_conditional_dropout": "dataloaders=digits model=cnn conditional=true model.dropout=0.1 epochs=1",
    "digits_classifier": "experiment=digits_classifier epochs=1",
    "two_processes": "dataloaders=gaussian devices=2 max_steps=60",
}
TIMES = re.compile(r"seconds|per_second|^(gpu|mps|cuda)/|^provenance$")  # of a row of metrics: what no seed decides

IMAGES = "dataloaders=random_images dataloaders.epoch_size=56 batch_size=8 dataloaders.state_shape=[{},8,8]"
UNET = "model.width=8 model.multipliers=[1] model.blocks=1 model.embedding=8"
MLP = "model.width=8 model.depth=1"
RESNET = "model.width=4 model.multipliers=[1,1] model.blocks=1 ~dataloaders.flip ~dataloaders.crop_padding"
SHRUNK = {  # by experiment; the others are small once their network is
    "cifar10_meanflow": f"{IMAGES.format(3)} {UNET} ~dataloaders.flip ~dataloaders.augment",
    "cifar10_classifier": f"{IMAGES.format(3)} {RESNET}",
    "cifar100_classifier": f"{IMAGES.format(3)} {RESNET}",
    "imagenet_meanflow": f"{IMAGES.format(4)} model.hidden_size=16 model.heads=2 model.depth=1",
    "digits": "model.width=8 model.inner_width=8 model.inner_blocks=1 model.embedding=8",
    "digits_classifier": "model.width=8 model.multipliers=[1,1]",
    "digits_conditional": UNET,
    "digits_one_step": f"{UNET} model.attention_up_to=0",
    "kmeans_one_step": f"{MLP} teacher='max_steps=2' loss.coupling.count=100",
    "photos": f"{UNET} dataloaders.crops=200 dataloaders.held_out_crops=50",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="store the hashes of every run")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="hold the runs against stored hashes")
    parser.add_argument("--fixtures", type=Path, metavar="DIR", help="make a tiny run of each experiment, in a new folder")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs or experiments alone")
    return parser.parse_args(arguments)


def carry_out(words: list[str]) -> int:
    """Carry out the command; 1 when a run differs."""
    options = parse(words)
    if options.fixtures:
        make_fixtures(options.fixtures, options.only)
        return 0
    before = None if options.compare is None else stored(options.compare)
    found, differ = {}, False
    for name in chosen(options.only, list(RUNS)):
        with tempfile.TemporaryDirectory(prefix="identity-") as place:
            train([f"run_name={name}", *PLAIN.split(), *RUNS[name].split()], Path(place))
            found[name] = hashes(Path(place), name)
        line = " ".join(f"{part} {digest[:12]}" for part, digest in found[name].items())
        if before is not None:
            parts = [part for part, digest in found[name].items() if before.get(name, {}).get(part) != digest]
            differ |= bool(parts)
            line = f"different: {', '.join(parts)}" if parts else "identical"
        print(f"{name}: {line}", flush=True)
    if options.write:
        options.write.write_text(json.dumps(found, indent=2) + "\n")
    return int(differ)


def chosen(only: list[str] | None, known: list[str]) -> list[str]:
    """Return the names asked for, all without any. UserError for an unknown one."""
    for name in only or ():
        check_known("--only", name, known)
    return only or known


def stored(file: Path) -> dict[str, dict[str, str]]:
    """Hashes by run and part that --write has stored. UserError for a file that holds none."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} holds no hashes ({error}); write them by --write={file}") from error


def train(words: list[str], place: Path) -> None:
    """Carry out a run below `place`, quietly. UserError with the last lines it said when it fails."""
    command = [sys.executable, str(ROOT / "launcher.py"), *words, f"output_dir={place}", f"log.file={place / 'LOG.md'}"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(words)} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")


def hashes(place: Path, name: str) -> dict[str, str]:
    """Return sha256 of the last save's weights and their average, and of all metrics but times."""
    import torch

    (save,) = place.glob(f"ckpts/*/{name}_last.pt")
    payload = torch.load(save, weights_only=True, map_location="cpu")
    rows = [json.loads(line) for line in (place / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    metrics = json.dumps([{key: row[key] for key in sorted(row) if not TIMES.search(key)} for row in rows])
    digests = {part: hashlib.sha256() for part in ("network", "ema")}
    for part, digest in digests.items():
        for key, tensor in sorted(payload[part].items()):
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    digests["metrics"] = hashlib.sha256(metrics.encode())
    return {part: digest.hexdigest() for part, digest in digests.items()}


def make_fixtures(folder: Path, only: list[str] | None) -> None:
    """Two steps of every experiment, made small: <folder>/<experiment>/ is the output_dir of a run of that name."""
    experiments = sorted(file.stem for file in (ROOT / "configs/experiment").glob("*.yaml"))
    for name in chosen(only, experiments):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists; give a new folder, or remove it")
        with tempfile.TemporaryDirectory(prefix="identity-") as place:
            small = f"{PLAIN} {SHRUNK.get(name, MLP)} max_steps=2 keep_saves=1"
            small += " evaluation=classifier" if name.endswith("classifier") else " evaluation=loss_only"
            train([f"run_name={name}", f"experiment={name}", *small.split()], Path(place))
            keep(Path(place), folder / name, name)
        size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        print(f"{folder / name}: {size / 1024:.0f} kB", flush=True)


def keep(place: Path, to: Path, name: str) -> None:
    """Copy what a run goes on from: its last save and its folder, without copies of the save and the lock."""
    (save,) = place.glob(f"ckpts/*/{name}_last.pt")
    target = to / save.relative_to(place)
    target.parent.mkdir(parents=True)
    shutil.copy(save, target)
    shutil.copytree(place / f"runs/{name}", to / f"runs/{name}", ignore=shutil.ignore_patterns(".*", "samples"))


if __name__ == "__main__":
    sys.exit(front(sys.argv[1:], None, carry_out))
