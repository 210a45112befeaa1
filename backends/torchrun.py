"""Several processes on this machine, one device each."""

import json
import logging
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from backends.base_backend import Backend
from common.errors import UserError
from common.signals import handled_by, when_asked_again
from configuration.checks import check_devices
from run_files.run_folder import run_folder_of

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

NODES = "DENOISING_ZOO_NODES"  # where several nodes meet: {"addresses": of each, "port": of the first, "id": of the run}
LAUNCHER = Path(__file__).resolve().parents[1] / "launcher.py"
GRACE = 24 * 3600  # seconds a signalled run has for its step, evaluation and save; a second signal ends it at once


class TorchrunBackend(Backend):
    """`devices` processes that train together, started and watched by torchrun's agent in this process.

    Returns when the run has ended. When one process fails, all end: UserError with what it found wrong, or that it was
    killed; SystemExit with its status where it has written a traceback. SystemExit 130, 143 or 129 after SIGINT, SIGTERM or
    SIGHUP, the run being saved.

    torchelastic's own supervision does less: its failures have times in whole seconds, so that of two ranks with one mistake
    neither is the first; a rank that hangs ends after its shutdown timeout, which must last as long as a save; and its
    workers, in sessions of their own, outlive an agent that is killed. So ranks leave a sentence and their process numbers
    (backends/workers.py).
    """

    def submit(self, overrides: list[str], config: dict[str, Any]) -> float | None:
        check_devices_here(config)
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        with TemporaryDirectory(prefix="torchrun-") as name, environment(config, Path(name)), own_signals(Path(name)):
            settings = LaunchConfig(
                nproc_per_node=config["devices"] // nodes(), max_restarts=0, logs_specs=DefaultLogsSpecs(log_dir=name),
                signals_to_handle="none", **meeting(),
            )  # fmt: skip
            try:
                elastic_launch(settings, sys.executable)(str(LAUNCHER), *overrides)
            except SignalException as error:
                raise SystemExit(128 + error.sigval) from None
            except ChildFailedError as error:
                raise verdict(error, config, Path(name)) from None
        return None  # its metrics say

    def describe(self, overrides: list[str], config: dict[str, Any]) -> dict[str, str]:
        check_devices_here(config)
        return {
            "where": f"this machine, {config['devices']} processes, device={config['device']}, one device each",
            "batch": f"{config['batch_size']} rows, {config['batch_size'] // config['devices']} on each device",
        }


def nodes() -> int:
    """Return how many nodes a run has, each with a launcher of its own."""
    return len(json.loads(os.environ[NODES])["addresses"]) if NODES in os.environ else 1


def meeting() -> dict[str, Any]:
    """Return the settings of LaunchConfig by which the agents of all nodes find each other."""
    here: dict[str, Any] = {"addresses": ["localhost"], "port": 0, "id": uuid.uuid4().hex}
    place = json.loads(os.environ[NODES]) if NODES in os.environ else here
    addresses = place["addresses"]
    own = int(os.environ["SLURM_NODEID"]) if len(addresses) > 1 else 0
    return {
        "min_nodes": len(addresses), "max_nodes": len(addresses), "run_id": place["id"], "rdzv_backend": "c10d",
        "rdzv_endpoint": f"{addresses[0]}:{place['port']}", "local_addr": addresses[own],
        "rdzv_configs": {"is_host": str(own == 0).lower()} if len(addresses) > 1 else {},
    }  # fmt: skip


def check_devices_here(config: dict[str, Any]) -> None:
    """Raise UserError when this machine has not so many devices."""
    import torch

    from common.device import pick_device

    kind, devices = pick_device(config["device"]).type, config["devices"] // nodes()
    check_devices(config | {"device": kind})
    if kind == "cuda" and devices > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(f"devices={devices}, and this machine has {there} CUDA device(s); use so many, or device=cpu")


@contextmanager
def environment(config: dict[str, Any], place: Path) -> Iterator[None]:
    """The variables that the processes find: the checked configuration, where to leave word, their share of the cores."""
    from backends.workers import ERROR_FILE_ENV, PREPARED
    from common.distributed import AGENT

    threads = max(1, (os.cpu_count() or 1) // (config["devices"] // nodes()))
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ |= {
        AGENT: str(os.getpid()),
        PREPARED: json.dumps(config),
        ERROR_FILE_ENV: str(place / "sentence"),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE),
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextmanager
def own_signals(place: Path) -> Iterator[None]:
    """A first signal has the agent pass it on and wait; a second one ends every process at once, one that hangs as well.

    place: the folder where each process leaves its number. The agent logs nothing meanwhile.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    came: list[int] = []

    def handle(number: int, _: object) -> None:
        if came and when_asked_again() == signal.SIG_IGN:
            return
        if came:
            for path in place.glob("process-*"):
                with suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
            shutil.rmtree(place, ignore_errors=True)
            os._exit(128 + number)
        came.append(number)
        raise SignalException(f"signal {number}", signal.Signals(number))

    logging.disable(logging.CRITICAL)
    try:
        with handled_by(handle):
            yield
    finally:
        logging.disable(logging.NOTSET)


def verdict(error: "ChildFailedError", config: dict[str, Any], place: Path) -> BaseException:
    """Return what ends this process: the sentence of the rank that failed first, one about it, or its exit status."""
    if (place / "sentence").is_file():
        return UserError((place / "sentence").read_text())
    from backends.workers import EXIT_PEER_DIED

    followers = (EXIT_PEER_DIED, -signal.SIGTERM)
    ranked = sorted(error.failures.items(), key=lambda item: (item[1].exitcode in followers, item[1].timestamp))
    number, failure = ranked[0]
    if failure.exitcode > 0 and failure.exitcode != EXIT_PEER_DIED:
        return SystemExit(failure.exitcode)
    how = "lost contact with the others"
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        how += ", as the system does when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
    why = f"rank {number} of {config['devices']} {how}"
    mark_failed(config, why)
    return UserError(f"{why}; go on with resume=true")


def mark_failed(config: dict[str, Any], why: str) -> None:
    """Put right the status of a run whose rank 0 could not. UserError when another process trains it."""
    from common.distributed import DIED

    folder = run_folder_of(config)
    status = folder.status.read()
    if nodes() > 1 and folder.lock.is_held():  # by its rank 0, on another node, which says so itself
        return
    if not config["eval_checkpoint"] and (status.get("state") == "running" or status.get("why") == DIED):
        folder.lock.acquire()
        folder.status.write("failed", status["step"], status["epoch"], status["seconds"], why=why)
        folder.release()
