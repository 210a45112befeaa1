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
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.checks import check_devices
from training.config import parse_overrides
from training.errors import UserError
from training.launch import prepare

PREPARED = "DENOISING_ZOO_PREPARED"  # the launcher's checked configuration, for the processes it starts
AGENT = "DENOISING_ZOO_AGENT"  # the launcher's process, which watches them
SENTENCE = "DENOISING_ZOO_SENTENCE"  # the file in which it looks for what they found wrong
LOST = 75  # exit status of a process that ends because another has
START, PATIENCE = timedelta(minutes=15), timedelta(hours=24)  # to meet; to wait, as the others do for rank 0's scores
DIED = "another process of the run has died"
PARENT = os.getppid()

T = TypeVar("T")
meeting: dist.Store | None = None  # where ranks leave words that outlive them


class LostRankError(UserError):
    """Another process of the run has died."""


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def together(work: Callable[[], Any]) -> NoReturn:
    """Do this process's part of the work among the others that torchrun has started, and end.

    What goes wrong is said by the first process to fail alone, a UserError's sentence through the launcher if that has
    started it. Status 0, that of a SystemExit, 130 after an early SIGINT, LOST where another has died, else 1.
    """
    global meeting
    if SENTENCE in os.environ:
        Path(os.environ[SENTENCE]).with_name(f"process-{os.getpid()}").write_text(str(os.getpid()))
    met = threading.Event()
    threading.Thread(target=leave_if_orphaned, args=(met,), daemon=True).start()
    meeting, number, count = next(dist.rendezvous("env://", timeout=START))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=meeting, rank=number, world_size=count, timeout=PATIENCE)
    met.set()
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere if number else sys.stdout), explained_losses():
            status = status_of(work)
            wait_for_all()  # torchrun would end those that still save
    except LostRankError:
        status = LOST
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        status = 1
        if first_to_fail(str(error) or type(error).__name__):
            tell(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if orphaned():
        remove_its_folder()
    os._exit(status)  # an orderly end aborts when a thread of the process group still wants the interpreter


def status_of(work: Callable[[], Any]) -> int:
    """0, or the status of the SystemExit that ended it."""
    try:
        work()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def tell(error: Exception) -> None:
    """A UserError to the launcher, or where there is none in a sentence on stderr; a bug of ours with its traceback."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    elif SENTENCE in os.environ:
        Path(os.environ[SENTENCE]).write_text(str(error))
    else:
        print(f"launcher.py: {error}", file=sys.stderr)


def first_to_fail(why: str) -> bool:
    """Whether no other process has failed before; leaves word of why."""
    assert meeting is not None
    try:
        if meeting.add("failed", 1) > 1:
            return False
        meeting.set("why", why)
    except dist.DistError:  # without torchrun's agent rank 0 keeps the words, and it has ended
        return False
    return True


@contextmanager
def explained_losses() -> Iterator[None]:
    """Errors of a broken connection as LostRankError, with the word that the other left if it could."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "NCCL" not in str(error):
            raise
        why = DIED
        with suppress(dist.DistError):
            if meeting is not None and meeting.check(["why"]):
                why = meeting.get("why").decode()
        raise LostRankError(why) from error


def configuration(overrides: list[str]) -> dict[str, Any]:
    """What the launcher has checked for this process, or what `overrides` mean; `devices` is the number of processes.

    UserError for what is wrong with them, or for another typed number of devices.
    """
    prepared = os.environ.get(PREPARED)
    config: dict[str, Any] = json.loads(prepared) if prepared else prepare(overrides)
    if config["devices"] != world() and any(o.key_or_group == "devices" for o in parse_overrides(overrides)):
        raise UserError(f"torchrun has started {world()} processes, and devices={config['devices']}; leave devices out")
    if config["choices"]["backend"] not in ("local", "torchrun"):
        where = config["choices"]["backend"]
        raise UserError(f"torchrun carries out a run here, and backend={where} elsewhere; leave one of them out")
    config["devices"] = world()
    check_devices(config)
    return config


def wait_for_all() -> None:
    """Until every rank has come here."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1))


@contextmanager
def first_alone(alone: bool) -> Iterator[None]:
    """A block that rank 0 carries out before the others begin it, if `alone`."""
    if alone and rank():
        wait_for_all()
    try:
        yield
    finally:
        if alone and rank() == 0:
            wait_for_all()


def from_first(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def agreed(own: T | None) -> T | None:
    """The value of the lowest rank that has one, on every rank; None where none has. Between the CPUs: no device waits."""
    if world() == 1:
        return own
    some = torch.tensor([float(own is not None)])
    dist.all_reduce(some)
    if not some:
        return None
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, own)
    return next(value for value in values if value is not None)


def any_rank(flag: bool) -> bool:
    """Return whether `flag` holds on any rank. Between the CPUs: no device waits."""
    if world() == 1:
        return flag
    some = torch.tensor([float(flag)])
    dist.all_reduce(some)
    return bool(some)


def averaged(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means over the ranks of scalars of the same names."""
    if world() == 1 or not values:
        return dict(values)
    mean = torch.stack(list(values.values()))
    dist.all_reduce(mean)
    return dict(zip(values, mean / world(), strict=True))


def put_together(parts: Tensor) -> Tensor:
    """The sum over the ranks: of tensors that are zero but for each rank's own rows, all rows, exactly."""
    if world() > 1:
        dist.all_reduce(parts)
    return parts


def orphaned() -> bool:
    """Whether the agent that started this process, and watched it, is gone."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != int(os.environ.get(AGENT, PARENT))


def leave_if_orphaned(met: threading.Event) -> None:
    """End this process if its agent dies before all have met: nothing is lost yet, and it would wait for long."""
    while not met.wait(1):
        if orphaned():
            remove_its_folder()
            os._exit(LOST)


def remove_its_folder() -> None:
    """Remove the temporary folder that the launcher made for its processes and, being killed, has left."""
    place = Path(os.environ.get(SENTENCE, "")).parent
    if place.name.startswith("torchrun-"):
        shutil.rmtree(place, ignore_errors=True)
