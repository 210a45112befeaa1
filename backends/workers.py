"""The processes of one run: who they are, what they tell each other, and how they end together.

One process is a run as well: every function here then answers at once. Several are started by torchrun, or by the launcher
through it (backends/torchrun.py), and find RANK, WORLD_SIZE and MASTER_ADDR in their environment. Each holds the whole
state; only rank 0 writes and speaks.
"""

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from backends.submission import bring, prepare
from common import distributed
from common.distributed import LostRankError, barrier, explained_lost_ranks, orphaned, world
from common.errors import UserError, bug_in_words
from configuration.checks import check_devices
from configuration.compose import typed_keys
from train import carry_out

PREPARED = "DENOISING_ZOO_PREPARED"  # the launcher's checked configuration, for the processes it starts
ERROR_FILE_ENV = "DENOISING_ZOO_SENTENCE"  # the file in which it looks for what they found wrong
EXIT_PEER_DIED = 75  # exit status of a process that ends because another has
START, PATIENCE = timedelta(minutes=15), timedelta(hours=24)  # to meet; to wait, as the others do for rank 0's scores


def run_distributed(work: Callable[[], Any]) -> NoReturn:
    """Do this process's part of the work among the others that torchrun has started, and end.

    What goes wrong is said by the first process to fail alone, a UserError's sentence through the launcher if that has
    started it. Status 0, that of a SystemExit, 130 after an early SIGINT, LOST where another has died, else 1.
    """
    if ERROR_FILE_ENV in os.environ:
        Path(os.environ[ERROR_FILE_ENV]).with_name(f"process-{os.getpid()}").write_text(str(os.getpid()))
    met = threading.Event()
    threading.Thread(target=leave_if_orphaned, args=(met,), daemon=True).start()
    distributed.meeting, number, count = next(dist.rendezvous("env://", timeout=START))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=distributed.meeting, rank=number, world_size=count, timeout=PATIENCE)
    met.set()
    try:
        status = status_of(work, silent=number > 0)
    except LostRankError:
        status = EXIT_PEER_DIED
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        status = 1
        if is_first_to_fail(str(error) or type(error).__name__):
            report_error(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if orphaned():
        remove_its_folder()
    os._exit(status)  # an orderly end aborts when a thread of the process group still wants the interpreter


def status_of(work: Callable[[], Any], silent: bool) -> int:
    """Return 0, or the status of the SystemExit that ended the work, once all ranks have come here."""
    status = 0
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere if silent else sys.stdout), explained_lost_ranks():
        try:
            work()
        except SystemExit as end:
            status = int(end.code or 0)
        barrier()  # torchrun would end those that still save
    return status


def report_error(error: Exception) -> None:
    """Report a UserError to the launcher, or on stderr where there is none; print a bug with its traceback."""
    if not isinstance(error, UserError):
        print(bug_in_words(error), file=sys.stderr)
    elif ERROR_FILE_ENV in os.environ:
        Path(os.environ[ERROR_FILE_ENV]).write_text(str(error))
    else:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)


def is_first_to_fail(why: str) -> bool:
    """Whether no other process has failed before; leaves word of why."""
    meeting = distributed.meeting
    assert meeting is not None
    try:
        if meeting.add("failed", 1) > 1:
            return False
        meeting.set("why", why)
    except dist.DistError:  # without torchrun's agent rank 0 keeps the words, and it has ended
        return False
    return True


def configuration(overrides: list[str]) -> dict[str, Any]:
    """Return what the launcher has checked for this process, or what `overrides` mean; `devices` is the number of processes.

    UserError for what is wrong with them, or for another typed number of devices.
    """
    prepared = os.environ.get(PREPARED)
    if not prepared:
        bring(overrides)
    config: dict[str, Any] = json.loads(prepared) if prepared else prepare(overrides)
    if config["devices"] != world() and "devices" in typed_keys(overrides):
        raise UserError(f"torchrun has started {world()} processes, and devices={config['devices']}; leave devices out")
    if config["choices"]["backend"] not in ("local", "torchrun"):
        where = config["choices"]["backend"]
        raise UserError(f"torchrun carries out a run here, and backend={where} elsewhere; leave one of them out")
    config["devices"] = world()
    check_devices(config)
    return config


def leave_if_orphaned(met: threading.Event) -> None:
    """End this process if its agent dies before all have met: nothing is lost yet, and it would wait for long."""
    while not met.wait(1):
        if orphaned():
            remove_its_folder()
            os._exit(EXIT_PEER_DIED)


def remove_its_folder() -> None:
    """Remove the temporary folder that the launcher made for its processes and, being killed, has left."""
    place = Path(os.environ.get(ERROR_FILE_ENV, "")).parent
    if place.name.startswith("torchrun-"):
        shutil.rmtree(place, ignore_errors=True)


def run_as_rank(overrides: list[str]) -> NoReturn:
    """Carry out a run together with the other processes that torchrun has started, and end this one."""
    run_distributed(lambda: carry_out(configuration(overrides)))
