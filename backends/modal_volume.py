"""The Volume on Modal: access to it, and what on it forbids a run."""

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from common.errors import UserError
from configuration.checks import begins_at_teacher, check_devices
from configuration.compose import typed_keys
from run_files.stored_values import as_object, parsed_config

CHECKPOINTS = ("init_from", "eval_checkpoint")  # keys of files that a run starts from
LOST_AFTER = timedelta(hours=2)  # without a sign of life, a run whose call is not known counts as ended


def check_device(gpu: str | None, device: str) -> None:
    """Raise UserError for a GPU that would be paid for and idle, and for a GPU that is not there."""
    if gpu is not None and device in ("cpu", "mps"):
        raise UserError(f"device={device} would leave the rented {gpu} idle; say device=auto, or rent none by --gpu null")
    if gpu is None and device not in ("auto", "cpu"):
        raise UserError(f"device={device} is not in a container without a GPU; say device=auto, or rent one by --gpu L4")


def lacking_access() -> str | None:
    """Return what stands between this machine and Modal, in a sentence; None where nothing does."""
    if importlib.util.find_spec("modal") is None:
        return 'the package modal is not installed; `uv sync --extra modal` or `pip install -e ".[modal]"` brings it'
    try:
        from modal.config import config
    except Exception as error:  # its settings file is read on import
        return f"modal cannot be loaded: {' '.join(str(error).split())}"
    if (config.get("token_id") and config.get("token_secret")) or config.get("oauth_refresh_token"):
        return None
    return "this machine has no token of Modal; `modal token new` makes one, in a browser"


def open_volume(name: str) -> Any:
    """Return the Volume, made where it is missing. UserError without modal or a token. Nothing is sent yet."""
    if lacking := lacking_access():
        raise UserError(lacking)
    import modal

    print("connecting to Modal ...", file=sys.stderr, flush=True)  # which takes a minute where there is no network
    return modal.Volume.from_name(name, create_if_missing=True)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """What Modal refuses becomes one sentence."""
    import modal

    try:
        yield
    except (modal.exception.Error, ChildProcessError) as error:
        raise UserError(f"Modal, {what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def note_job(volume: Any, name: str, job: dict[str, Any]) -> None:
    """Write on the Volume which App carries out the run, for scripts/modal_app.py on any machine."""
    with volume.batch_upload(force=True) as batch:
        batch.put_file(io.BytesIO(json.dumps(job, indent=2).encode()), f"/jobs/{name}.json")


def check_volume(volume: Any, volume_name: str, config: dict[str, Any]) -> None:
    """Raise UserError where what is on the Volume makes the run impossible, before a GPU is paid for to find out."""
    name, place = config["run_name"], run_place(config)
    there = on_volume(volume, f"{place}/config.yaml")
    check_ended(volume, name, place)
    if config["resume"] and not there:
        raise UserError(f"there is no run {name} on the Volume {volume_name} to resume; leave resume=true out to start it")
    if there and not (config["resume"] or config["overwrite"] or config["eval_checkpoint"]):
        raise UserError(
            f"run_name={name} exists already on the Volume {volume_name}; go on with it by resume=true, replace it (the old "
            "run is moved aside) by overwrite=true, or choose another name"
        )
    for key in () if config["resume"] else CHECKPOINTS:
        made_there = key == "init_from" and begins_at_teacher(config)
        if config[key] is not None and not made_there and not on_volume(volume, str(PurePosixPath(config[key]))):
            raise UserError(
                f"{key}={config[key]} is not on the Volume {volume_name}; `python scripts/modal_app.py ckpts` lists what "
                f"is, and `modal volume put {volume_name} FILE PATH` brings more"
            )


def run_place(config: dict[str, Any]) -> str:
    """Return the run's folder on the Volume."""
    return str(PurePosixPath(config["output_dir"]) / "runs" / config["run_name"])


def check_ended(volume: Any, name: str, place: str) -> None:
    """Raise UserError where the run may still be carried out: two containers would train one run.

    The service knows of the call that the job notes. Where none is noted (the command was cut short, or another version
    sent it), the run counts as ended when nothing was heard of it for LOST_AFTER.
    """
    job, status = read_object(volume, f"jobs/{name}.json"), read_object(volume, f"{place}/status.json")
    if "stopped" in job:
        return
    if "call" in job:
        alive = is_pending(job["call"])
    else:
        signs = [job.get("submitted", ""), status.get("updated", "") if status.get("state") == "running" else ""]
        alive = any(is_recent(sign) for sign in signs)
    if alive:
        raise UserError(
            f"the run {name} may still be running on Modal; wait for it, or say `python scripts/modal_app.py stop {name}`, "
            "which ends it, or notes that it has ended, and go on with it by resume=true"
        )


def is_pending(call: str) -> bool:
    """Whether the service still carries out a call, or will again. Its exceptions where it does not answer that."""
    from modal import FunctionCall
    from modal import exception as of_modal

    try:
        FunctionCall.from_id(call).get(timeout=0)
    except TimeoutError:  # no outcome yet; modal's own exceptions of such names are others
        return True
    except (
        of_modal.ConnectionError, of_modal.ClientClosed, of_modal.AuthError, of_modal.PermissionDeniedError,
        of_modal.ServiceError, of_modal.InternalError, of_modal.ResourceExhaustedError,
    ):  # fmt: skip
        raise
    except (Exception, of_modal.InputCancellation):  # whatever the call ended with
        return False
    return False


def is_recent(moment: str) -> bool:
    """Whether a time stamp is younger than LOST_AFTER; what is none is not."""
    try:
        return datetime.now().astimezone() - datetime.fromisoformat(moment).astimezone() < LOST_AFTER
    except ValueError:
        return False


def read_object(volume: Any, path: str) -> dict[str, Any]:
    """Return the JSON object in a file of the Volume; empty where there is none."""
    text = b"".join(volume.read_file(path)).decode(errors="replace") if on_volume(volume, path) else ""
    return as_object(text) or {}


def check_stored(volume: Any, config: dict[str, Any], words: list[str], gpu: str | None) -> None:
    """Raise UserError where the stored settings of a run to resume do not fit what is rented now."""
    path = f"{run_place(config)}/config.yaml"
    text = b"".join(volume.read_file(path)).decode(errors="replace")
    loaded = parsed_config(text, f"the config.yaml of the run {config['run_name']} on the Volume")
    typed = typed_keys(words)
    stored = {key: loaded[key] for key in ("device", "batch_size") if key in loaded and key not in typed}
    now = config | stored | {"devices": int(words[-1].removeprefix("devices="))}
    check_device(gpu, now["device"])
    check_devices(now)


def on_volume(volume: Any, path: str) -> bool:
    """Whether the Volume has the file."""
    import modal

    try:
        return bool(volume.listdir(path))
    except modal.exception.NotFoundError:
        return False
