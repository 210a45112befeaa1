"""The copies of a run in a store (mirror=s3://bucket/folder): made while training goes on, brought back where it is missing.

Below the address they lie as in an output folder: runs/<run>/ with the run's records, ckpts/<arch>/<run>_last.pt and
<run>_best.pt.
"""

import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import stores
from common.errors import UserError
from common.files import locked, share
from configuration.stored import CHOICE
from run_files.run_folder import RunFolder, wrong_status
from run_files.stored_values import MOST_BYTES, as_object, parsed_config

if TYPE_CHECKING:
    from run_files.checkpoint_folder import CheckpointFolder  # imports torch

SAVES = ("best", "last")  # the newest goes last
RECORDS = re.compile(
    r"config\.yaml|overrides\.txt|status\.json|metrics\.jsonl|log\.md|model\.safetensors|"
    r"samples/step_\d{8,20}(_neighbours)?\.png|averages/step_\d{8,20}\.pt"
)


class StoredRun:
    """A run in a store, as anyone may have written it. top: the address that holds runs/ and ckpts/."""

    def __init__(self, top: str, name: str) -> None:
        self.top, self.name = top, name

    def record(self, file: str) -> str:
        """Return the address of a file of its folder."""
        return stores.below(self.top, "runs", self.name, file)

    def save(self, arch: str, kind: str) -> str:
        """Return the address of its newest ("last") or best save."""
        return stores.below(self.top, "ckpts", arch, f"{self.name}_{kind}.pt")

    def text(self, file: str) -> str | None:
        content = stores.read(self.record(file), MOST_BYTES[file])
        return None if content is None else content.decode(errors="replace")

    def status(self) -> dict[str, Any]:
        """Return its status; empty where there is none that a run has written."""
        status = as_object(self.text("status.json") or "")
        return {} if status is None or wrong_status(status) else status

    def arch(self) -> str | None:
        """Return the folder of its saves; None where there is no such run. UserError for settings that name none."""
        text = self.text("config.yaml")
        arch = None if text is None else parsed_config(text, self.record("config.yaml")).get("choices", {}).get("model")
        if text is not None and not (isinstance(arch, str) and CHOICE.fullmatch(arch)):
            raise UserError(f"{self.record('config.yaml')} names no model; use another run, or another address")
        return arch

    def saves(self) -> dict[str, str]:
        """Return the addresses of the saves that it has, by "best" and "last"."""
        arch = self.arch()
        places = {} if arch is None else {kind: self.save(arch, kind) for kind in SAVES}
        return {kind: place for kind, place in places.items() if stores.info(place)}

    def records(self) -> list[str]:
        """Return which files of its folder there are, config.yaml last: without it there is no run."""
        found = stores.names_below(stores.below(self.top, "runs", self.name))
        return sorted(filter(RECORDS.fullmatch, found), key=lambda file: (file == "config.yaml", file))

    def bring(self, output_dir: Path) -> bool:
        """Copy it to an output folder that has no run of its name; returns whether there was one to copy.

        Its files are anyone's: they are read as those of every other run are, and have no names but known ones.
        """
        folder = RunFolder(output_dir / "runs" / self.name)
        if folder.config_path.is_file() or (arch := self.arch()) is None:
            return False
        with locked(folder.config_path):
            if folder.config_path.is_file():
                return False
            saves, records = self.saves(), self.records()
            print(f"{self.name}: copied from {self.top}, {len(saves)} save(s) and {len(records)} records", flush=True)
            for place in saves.values():
                stores.fetch(place, output_dir / "ckpts" / arch / place.rpartition("/")[2])
            for file in records:
                stores.fetch(self.record(file), folder.path / file)
        return True

    def move_aside(self, new_name: str) -> None:
        """Give it another name, its saves first."""
        new, arch = StoredRun(self.top, new_name), self.arch()
        for kind, place in self.saves().items():
            stores.move(place, new.save(str(arch), kind))
        for file in self.records():
            stores.move(self.record(file), new.record(file))


class Mirror:
    """Copies a run's records and its last and best save to a store, by a thread that training never waits for.

    Only what is newest when the thread comes to it is copied. A store that refuses costs one line, and everything that is
    not there yet is sent with the next save. What is sent together is of one moment: records that hold the save's step,
    then the save, so that whoever goes on from the store finds every row up to it.
    """

    def __init__(self, config: dict[str, Any], folder: RunFolder, saves: "CheckpointFolder") -> None:
        self.run, self.folder, self.saves = StoredRun(config["mirror"], folder.name), folder, saves
        self.arch, self.overrides = str(config["choices"]["model"]), list(config["overrides"])
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self.guard, self.numbers = threading.Lock(), count()
        self.waiting: dict[str, Path] | None = None  # saves that the thread has not begun to copy, by "best" and "last"
        self.sent: dict[str, tuple[int, ...]] = {}  # which version of a file was sent to an address
        self.job: Future[None] | None = None
        self.refusal = ""  # of the newest attempt, in words
        self.begun = False
        self.compared = False  # with what the store holds

    def claim(self, aside: str | None) -> None:
        """Take the name of a new run, before it is trained. UserError for one that has saves there, unless they are to be
        moved `aside`, and for a store that takes nothing."""
        if self.run.saves():
            if aside is None:
                raise UserError(
                    f"run_name={self.run.name} has saves in {self.run.top}; go on with it by resume=true, replace it (the "
                    "old one is moved aside) by overwrite=true, or choose another name"
                )
            self.run.move_aside(aside)
        stores.put("".join(f"{word}\n" for word in self.overrides).encode(), self.run.record("overrides.txt"))
        self.begun = self.compared = True

    def go_on(self) -> None:
        """Take up a run that goes on. UserError where the store's is another, or at a later step; one line where it cannot
        be asked now."""
        self.remove_temporaries()
        try:
            why = self.conflict()
        except UserError as error:
            self.refuse(error)
            why = None
        if why is not None:
            raise UserError(why)
        self.begun = True

    def conflict(self) -> str | None:
        """Return what forbids that the run in the store is replaced by this one, in a sentence, or None."""
        here, there = self.folder.status.read(), self.run.status()
        if there.get("started", here.get("started")) != here.get("started"):
            why = "holds another run of this name"
        elif there.get("step", 0) > here.get("step", 0):
            why = f"holds this run at step {there['step']:,}, and here it is at step {here.get('step', 0):,}"
        else:
            self.compared = True
            return None
        return (
            f"{self.run.top} {why}; move {self.folder.path} and its saves away, after which resume=true brings that one, or "
            "give another mirror"
        )

    def offer(self) -> None:
        """Have the run as it stands copied; called where nothing writes its saves at that moment."""
        pinned = self.pinned()
        with self.guard:
            before, self.waiting = self.waiting, pinned
        if before is not None:
            drop(before)
            return
        if self.job is not None and self.job.done():
            self.job.result()
        self.job = self.worker.submit(self.copy)

    def pinned(self) -> dict[str, Path]:
        """Return the run's saves under names that nobody replaces."""
        saves, pins = {"best": self.saves.best, "last": self.saves.last}, dict[str, Path]()
        for kind, path in saves.items():
            if path.exists():
                pins[kind] = path.with_name(f".{path.name}.{next(self.numbers)}.mirror")
                share(path, pins[kind])
        return pins

    def copy(self) -> None:
        """Send what is not in the store as it is here."""
        with self.guard:
            pins, self.waiting = self.waiting or {}, None
        try:
            if not self.compared and (why := self.conflict()):
                raise UserError(why)
            for file in self.own_records():
                self.send(self.folder.path / file, self.run.record(file))
            for kind, path in pins.items():
                self.send(path, self.run.save(self.arch, kind))
            self.refusal = ""
        except (UserError, OSError) as error:
            self.refuse(error)
        finally:
            drop(pins)

    def refuse(self, error: Exception) -> None:
        """Say once why nothing is copied."""
        if not self.refusal:
            print(f"note: {error}; the run goes on, and copies are tried again with each save", file=sys.stderr, flush=True)
        self.refusal = str(error)

    def own_records(self) -> Iterator[str]:
        """Yield the files of the run's folder that are copied."""
        found = (path.relative_to(self.folder.path).as_posix() for path in sorted(self.folder.path.rglob("*")))
        return (file for file in found if RECORDS.fullmatch(file))

    def send(self, path: Path, address: str) -> None:
        """Send a file unless this version of it was; of metrics.jsonl, which grows meanwhile, the whole lines."""
        now = path.stat()
        version = (now.st_ino, now.st_mtime_ns, now.st_size)
        if self.sent.get(address) == version:
            return
        grows = path.name == "metrics.jsonl"
        content = path.read_bytes() if grows else path
        stores.put(content[: content.rfind(b"\n") + 1] if isinstance(content, bytes) else content, address)
        self.sent[address] = version

    def close(self) -> None:
        """Send the rest and wait for it; one line where the store does not take it."""
        if self.begun and self.folder.lock.is_own():
            self.offer()
        self.worker.shutdown()
        if self.job is not None:
            self.job.result()
        if self.begun and self.refusal:
            print(
                f"note: {self.run.top} lacks the newest of the run {self.run.name} ({self.refusal}); it is in "
                f"{self.folder.path} and {self.saves.folder}",
                file=sys.stderr,
            )

    def remove_temporaries(self) -> None:
        """Remove what killed processes of this run have pinned. Its lock is held."""
        for path in self.saves.folder.glob(f".{self.run.name}_*.mirror"):
            if re.fullmatch(rf"\.{re.escape(self.run.name)}_(best|last)\.pt\.\d+\.mirror", path.name):
                path.unlink()


def drop(pins: dict[str, Path]) -> None:
    for path in pins.values():
        path.unlink(missing_ok=True)
