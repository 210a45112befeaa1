#!/usr/bin/env python
"""Kill one run again and again with SIGKILL, drive it to its end, and compare it with a run that was left alone.

    python dev/kill_test.py                    # 100 kills, a few minutes
    python dev/kill_test.py --kills 10 --seed 1
    python dev/kill_test.py --and async_save=always   # the killed run saves while it trains; the one left alone does not

Most kills are aimed: each stage of a save (a file half written, written but not on the disk, on the disk but not in its
place, ...) gets as many as the others. One in seven comes at a random moment of a process's life, its start included. In
the end weights, averages and optimizer must equal the untouched run's bit for bit, metrics.jsonl must hold the same rows,
each once, and no file may be left over.

Every process is a fork of this one, so that the libraries are imported once. The disk is watched from here: nothing in
the project knows of it.
"""

import contextlib
import io
import json
import os
import random
import re
import signal
import stat
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import Parser, count, front
from common.errors import UserError

Notice = Callable[[str, str], None]  # (operation, file it is for), called before the operation, and half-way in a write
AIMED = 0.85  # share of the kills that are aimed at a stage of a save
PATIENCE = 4  # saves after which a process that has not come to its stage, or its moment, is killed anyhow
RANDOM = "a random moment"  # in the place of a stage
TIMING = ("second", "elapsed")  # parts of names of metrics that are never the same twice
SMALL = (
    "trackio.enabled=false", "device=cpu", "evaluation=loss_only", "evaluation.samples=16", "evaluation.final_samples=16",
    "model.width=8", "model.depth=1", "dataloaders.epoch_size=96", "batch_size=32", "log_every=2", "ema.decay=0.9",
    "callbacks=none", "gradient_accumulation_steps=2", "schedule.warmup_steps=3",
)  # fmt: skip


class Current(threading.local):
    """The file that this thread is writing, which an fsync is for."""

    file = ""


@contextlib.contextmanager
def watched_disk(notice: Notice) -> Iterator[None]:
    """Within the block, every write, fsync, link, rename and removal of a file by this project's code is announced first."""
    current = Current()

    class Watched(io.BufferedWriter):
        """A temporary file of the run."""

        def write(self, content: Any) -> int:
            view = memoryview(content)
            super().write(view[: len(view) // 2])
            super().flush()
            notice("write", current.file)
            super().write(view[len(view) // 2 :])
            return len(view)

    class WatchedRows(io.FileIO):
        """metrics.jsonl."""

        def write(self, content: Any) -> int:
            half = super().write(content[: len(content) // 2])
            notice("write", str(self.name))
            return half + super().write(content[len(content) // 2 :])

    def announced(operation: str, call: Callable[..., Any], position: int) -> Callable[..., Any]:
        def watched(*arguments: Any, **keys: Any) -> Any:
            path = os.fspath(arguments[position])
            if operation != "remove":
                current.file = path
            if operation != "remove" or not path.endswith(".tmp"):
                notice(operation, path)
            return call(*arguments, **keys)

        return watched

    def fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        notice("fsync the folder of" if folder else "fsync", current.file)
        real_fsync(descriptor)

    def opened(path: Any, mode: str = "r", *arguments: Any, **keys: Any) -> Any:
        if mode == "wb" and str(path).endswith(".tmp"):
            current.file = str(path)
            return Watched(io.FileIO(path, "w"))
        return real_open(path, mode, *arguments, **keys)

    real_fsync, real_open = os.fsync, io.open
    with (
        mock.patch("os.fsync", fsync),
        mock.patch("io.open", opened),
        mock.patch("os.replace", announced("rename to", os.replace, 1)),
        mock.patch("os.link", announced("link for", os.link, 1)),
        mock.patch("os.unlink", announced("remove", os.unlink, 0)),
        mock.patch("run_files.metrics_file.FileIO", WatchedRows),
    ):
        yield


def stage(operation: str, file: str) -> str:
    """Return the operation and the kind of file, whatever run, epoch and process it is of."""
    name = re.sub(r"^\.(.*)\.\d+\.tmp$", r"\1", Path(file).name)
    return f"{operation} {re.sub(r'x_epoch_[0-9]+', 'x_epoch', name).removeprefix('x.')}"


class Aim:
    """Writes down when the first file is written, and then kills its own process at a stage of a save, if there is one."""

    def __init__(self, wanted: str | None, skip: int, kills: Path) -> None:
        self.wanted, self.skip, self.kills, self.seen = wanted, skip, kills, Counter[str]()

    def __call__(self, operation: str, file: str) -> None:
        here = stage(operation, file)
        if not self.seen:
            self.tell(f"{time.monotonic()}")
        self.seen[here] += 1
        late = self.wanted is not None and self.seen["fsync x_epoch.pt"] > PATIENCE
        if late or (here == self.wanted and self.seen[here] > self.skip):
            self.tell(here)
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, line: str) -> None:
        with self.kills.open("a") as file:
            file.write(f"{line}\n")


def forked(words: list[str], log: Path, aim: Aim) -> int:
    """Start a process that carries out the run; its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            import launcher

            with watched_disk(aim):
                status = launcher.main(words)
    finally:
        os._exit(status)


def words_for(folder: Path, epochs: int, more: Sequence[str] = ()) -> list[str]:
    """Return the command line that begins the run, or goes on with it."""
    place = ["run_name=x", f"output_dir={folder}", f"log.file={folder / 'log.md'}"]
    begun = (folder / "runs/x/config.yaml").exists()
    return [*place, "resume=true"] if begun else [*place, *SMALL, f"epochs={epochs}", *more]


def rows(folder: Path, name: str = "x") -> list[dict[str, Any]]:
    """Return metrics.jsonl of a run without its timings."""
    lines = (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not any(word in k for word in TIMING)} for line in lines]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def same(first: Any, second: Any) -> bool:
    """Return whether nested values are equal, tensors bit for bit."""
    from run_files.checkpoint import digest_of

    return digest_of(first) == digest_of(second)


def check_equal(killed: Path, alone: Path) -> None:
    """Raise UserError for the first thing in which the killed run differs from the one left alone."""
    from run_files.checkpoint import load_checkpoint

    mine, theirs = (load_checkpoint(folder / "ckpts/mlp/x_last.pt") for folder in (killed, alone))
    for key in ("step", "network", "ema", "optimizer", "schedule", "window", "best", "waited"):
        if not same(mine[key], theirs[key]):
            raise UserError(f"{key} in {killed}/ckpts/mlp/x_last.pt differs from that of the run left alone")
    if rows(killed) != rows(alone):
        raise UserError(f"{killed}/runs/x/metrics.jsonl differs from that of the run left alone")
    if files(killed) != files(alone):
        raise UserError(f"{killed} differs in the files {sorted(files(killed) ^ files(alone))} from the run left alone")
    if json.loads((killed / "runs/x/status.json").read_text())["state"] != "finished":
        raise UserError(f"{killed}/runs/x/status.json does not say finished")


def drive(folder: Path, kills: int, chance: random.Random, more: Sequence[str] = ()) -> Counter[str]:
    """Carry out the run alone and killed, compare them, and return how many kills came at which stage."""
    import train  # noqa: F401  with all that a run needs, imported here once for every process
    from backends.submission import prepare
    from training.assemble import assemble

    epochs, log, noted = 5 * kills + 10, folder / "log.txt", folder / "kills.txt"
    assemble(prepare(words_for(folder, 1)))  # and what a configuration names
    began = time.monotonic()
    if os.waitpid(forked(words_for(folder / "alone", epochs), log, Aim(None, 0, noted)), 0)[1]:
        raise UserError(f"the run failed; {log} says why")
    start_seconds = float(noted.read_text()) - began
    stages = save_stages()
    counts: Counter[str] = Counter()
    for number in range(kills):
        aimed = chance.random() < AIMED
        wanted = min(stages, key=lambda name: (counts[name], chance.random())) if aimed else RANDOM
        skip = chance.randrange(100 if wanted.startswith("write") else 3)  # a save is many writes
        process = forked(words_for(folder / "killed", epochs, more), log, Aim(wanted, skip, noted))
        if wanted == RANDOM:
            time.sleep(chance.uniform(0, 1.5 * start_seconds))
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if not os.WIFSIGNALED(status):
            raise UserError(f"process {number} ended with status {status} before it was killed; {log} says why")
        here = RANDOM if wanted == RANDOM else noted.read_text().splitlines()[-1]
        counts[here] += 1
    if os.waitpid(forked(words_for(folder / "killed", epochs, more), log, Aim(None, 0, noted)), 0)[1]:
        raise UserError(f"the run could not go on after {kills} kills; {log} says why")
    check_equal(folder / "killed", folder / "alone")
    return counts


def save_stages() -> list[str]:
    """Return every stage of the save at an epoch's end that is also the best so far, in order."""
    from run_files.checkpoint_folder import CheckpointFolder

    seen: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointFolder(Path(folder), "mlp", "x", keep=1)
        checkpoints.save({"step": 1}, 1, best=True)
        with watched_disk(lambda operation, file: seen.append(stage(operation, file))):
            checkpoints.save({"step": 2}, 2, best=True)
    return list(dict.fromkeys(seen))


def carry_out(words: list[str]) -> str:
    """Carry out the command, and return how many kills came where. UserError where the killed run differs."""
    parser = Parser(description=__doc__)
    parser.add_argument("--kills", type=count, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--and", nargs="+", default=[], dest="more", help="words for the run that is killed")
    options = parser.parse_args(words)
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        try:
            counts = drive(Path(folder), options.kills, random.Random(options.seed), options.more)
        except UserError:
            log = Path(folder) / "log.txt"
            print(log.read_text()[-3000:] if log.exists() else "", file=sys.stderr)
            raise
    lines = [f"  {count:4d}  {name}" for name, count in sorted(counts.items())]
    return "\n".join([*lines, f"{options.kills} kills: weights, metrics and files equal those of the run left alone"])


if __name__ == "__main__":
    sys.exit(front(sys.argv[1:], None, carry_out))
