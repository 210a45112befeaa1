"""A GPU rented from Modal: the same overrides, carried out there over a Volume.

Here a run is checked, an App is put together from pyproject.toml and this checkout, and one call is submitted; there
`on_modal` carries it out. modal itself is imported when something is to be sent, so that no other run needs it.
"""

import importlib.util
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from backends.base_backend import Backend
from backends.on_volume import carry_out_on
from common.errors import UserError
from configuration.checks import check_devices
from configuration.compose import nearest, parse_overrides
from run_files.provenance import COMMIT_VARIABLE, git_commit
from run_files.status_file import timestamp
from run_files.stored_values import as_object, parsed_config

ROOT = Path(__file__).resolve().parents[1]
CODE = PurePosixPath("/root")  # there: where modal looks for the modules of functions
MOUNT = PurePosixPath("/volume")  # there: the working folder of runs
MOST = {
    "T4": 8, "L4": 8, "A10": 4, "L40S": 8, "A100": 8, "A100-40GB": 8, "A100-80GB": 8, "RTX-PRO-6000": 8, "H100": 8,
    "H100!": 8, "H200": 8, "B200": 8, "B200+": 8,
}  # fmt: skip   # how many of a GPU one container can have: Modal's GPU guide, November 2026
CHECKPOINTS = ("init_from", "eval_checkpoint")  # keys of files that a run starts from
NOT_SENT = ["**/__pycache__", "**/.*"]
LONGEST_HOURS = 24.0  # that the service lets one attempt take
MOST_RETRIES = 10
LOST_AFTER = timedelta(hours=2)  # without a sign of life, a run whose call is not known counts as ended


def on_modal(overrides: list[str], call_settings: dict[str, Any]) -> dict[str, Any]:
    """Return the function that runs there; see carry_out_on."""
    import modal

    volume = modal.Volume.from_name(call_settings["volume"])

    def commit() -> None:
        try:
            volume.commit()
        except RuntimeError as error:  # open files: the service commits by itself all the time, and when the container ends
            print(f"note: the Volume put off a commit: {error}", flush=True)

    os.environ[COMMIT_VARIABLE] = call_settings["git_commit"]
    call = modal.current_function_call_id()
    assert call is not None
    return carry_out_on(Path(MOUNT), overrides, commit, call, 60 * call_settings["commit_minutes"])


class ModalBackend(Backend):
    """One container on Modal for each run, which goes on there when this machine is turned off.

    gpu: a name of MOST, with :N for several; null for none. detach: return once the run is submitted; otherwise show what
    it prints and wait. volume: name of the Volume with runs, tracker data and data sets. timeout_hours: of one attempt.
    retries: attempts after the first; each goes on from the newest save. commit_minutes: between commits of the Volume.
    cpu, memory_gb: cores and GiB that are reserved. extras: of pyproject.toml. UserError for what Modal would refuse.
    """

    elsewhere = True

    def __init__(
        self, gpu: str | None, detach: bool, volume: str, timeout_hours: float, retries: int, commit_minutes: float,
        cpu: float, memory_gb: float, extras: list[str],
    ) -> None:  # fmt: skip
        self.gpu, self.count = parse_gpu(gpu)
        rules: list[tuple[str, bool, str]] = [
            ("detach", isinstance(detach, bool), "true or false"),
            ("timeout_hours", positive(timeout_hours, LONGEST_HOURS), f"a number of hours up to {LONGEST_HOURS:g}"),
            ("retries", isinstance(retries, int) and 0 <= retries <= MOST_RETRIES, f"a whole number up to {MOST_RETRIES}"),
            ("commit_minutes", positive(commit_minutes), "a number of minutes above 0"),
            ("cpu", positive(cpu), "a number of cores above 0, such as 0.5"),
            ("memory_gb", positive(memory_gb), "a number of GiB above 0"),
            ("volume", bool(re.fullmatch(r"[A-Za-z0-9_.\-]{1,63}", volume or "")), "letters, digits and . _ - (at most 63)"),
            ("extras", isinstance(extras, list), "a list such as [gpu]"),
        ]
        given = locals()
        for key, holds, words in rules:
            if not holds:
                raise UserError(f"backend.{key} takes {words}, not {'null' if given[key] is None else repr(given[key])}")
        self.detach, self.volume, self.retries, self.extras = detach, volume, retries, extras
        self.timeout_hours, self.commit_minutes, self.cpu, self.memory_gb = timeout_hours, commit_minutes, cpu, memory_gb

    def submit(self, overrides: list[str], config: dict[str, Any]) -> float | None:
        words, gpu = self.checked(overrides, config)
        volume = open_volume(self.volume)
        import modal

        name = config["run_name"]
        with explained(f"the run {name}"):
            check_volume(volume, self.volume, config)
            if config["resume"]:
                check_stored(volume, config, words, gpu)
            app, function = self.app(gpu)
            job: dict[str, Any] = {"overrides": words, "gpu": gpu, "submitted": timestamp()}
            call = outcome = None
            with modal.enable_output(), app.run(detach=self.detach, name=f"denoising-zoo {name}"):
                note_job(volume, name, job | {"app": app.app_id})
                call = function.spawn(words, self.call_settings())
                note_job(volume, name, job | {"app": app.app_id, "call": call.object_id})
                outcome = None if self.detach else call.get()
        if outcome is not None:
            return best_of(name, outcome)
        if call is None or not self.detach:  # app.run ends at Ctrl-C without a word
            raise UserError(
                f"stopped; what the run {name} on Modal had saved is on the Volume, and resume=true goes on from it"
            )
        print(
            f"{name} runs on Modal ({call.object_id}), whatever this machine does now\n"
            f"  watch     python scripts/modal_app.py logs {name}\n"
            f"  bring     python scripts/modal_app.py sync\n"
            f"  end       python scripts/modal_app.py stop {name}"
        )
        return None

    def describe(self, overrides: list[str], config: dict[str, Any]) -> dict[str, str]:
        words, gpu = self.checked(overrides, config)
        return {
            "where": f"Modal, a container with {gpu or 'no GPU'}, {'detached' if self.detach else 'streamed to here'}",
            "command": shlex.join(["python", str(CODE / "launcher.py"), *words]),
            "in": f"{MOUNT}, the Volume {self.volume}: runs, checkpoints and data sets under their paths of here",
            "tracker": str(MOUNT / "trackio" / config["run_name"]),
            "image": f"Debian slim, Python {python_version()}: {', '.join(packages(self.extras))}",
            "code": f"{', '.join(shipped())} of {ROOT} to {CODE}",
            "timeout": f"{self.timeout_hours:g} h for each attempt",
            "retries": f"{self.retries}, each from the newest save",
            "commits": f"every {self.commit_minutes:g} min, and at the end",
            "reserved": f"{self.cpu:g} CPU cores, {self.memory_gb:g} GiB of memory",
            "token": lacking_access() or "found",
        }

    def checked(self, overrides: list[str], config: dict[str, Any]) -> tuple[list[str], str | None]:
        """Return what the launcher is given there, and the GPUs as Modal writes them. UserError for what would be lost or
        idle.

        The number of devices is always said, so that a resumed run uses what is rented now.
        """
        check_on_volume("output_dir", str(config["output_dir"]), "give a folder relative to it, such as outputs")
        for key in CHECKPOINTS:
            if config[key] is not None:
                check_on_volume(key, str(config[key]), "give the path it has there, such as outputs/ckpts/mlp/last.pt")
        packages(self.extras)
        check_device(self.gpu, config["device"])
        keys = [override.key_or_group.split(".")[0] for override in parse_overrides(overrides)]
        words = [word for word, key in zip(overrides, keys, strict=True) if key not in ("backend", "devices")]
        typed, count = "devices" in keys, config["devices"]
        if self.gpu is not None:
            if typed and self.count not in (1, count):
                raise UserError(f"devices={count} does not use {self.gpu}:{self.count}; leave devices out, or rent :{count}")
            count = count if typed else self.count
            check_count(self.gpu, count)
        if not config["resume"] or "batch_size" in keys:
            check_devices(config | {"devices": count})
        return [*words, f"devices={count}"], self.gpu if self.gpu is None or count == 1 else f"{self.gpu}:{count}"

    def call_settings(self) -> dict[str, Any]:
        return {"volume": self.volume, "commit_minutes": self.commit_minutes, "git_commit": git_commit()}

    def function_settings(self, gpu: str | None) -> dict[str, Any]:
        """Return what App.function is told, without the image."""
        import modal

        return {
            "gpu": gpu,
            "volumes": {str(MOUNT): modal.Volume.from_name(self.volume, create_if_missing=True)},
            "timeout": round(3600 * self.timeout_hours),
            "retries": modal.Retries(max_retries=self.retries, initial_delay=10.0),
            "cpu": self.cpu,
            "memory": round(1024 * self.memory_gb),
            "single_use_containers": True,  # an attempt sees the Volume as the one before left it, not as an older mount did
            "include_source": False,
        }

    def app(self, gpu: str | None) -> tuple[Any, Any]:
        """Return the App and its one function. Sends nothing."""
        import modal

        app = modal.App("denoising-zoo", include_source=False)
        return app, app.function(image=image(self.extras), **self.function_settings(gpu))(on_modal)


def positive(value: Any, most: float = math.inf) -> bool:
    """Whether it is a finite number above 0, and not above `most`."""
    return isinstance(value, int | float) and 0 < value <= most and math.isfinite(value)


def check_on_volume(key: str, place: str, remedy: str) -> None:
    """Raise UserError for a path that is not relative to the Volume, or leaves it."""
    path = PurePosixPath(place)
    if path.is_absolute() or ".." in path.parts or place.startswith("~"):
        raise UserError(f"{key}={place} is no path inside the Volume; {remedy}")


def check_device(gpu: str | None, device: str) -> None:
    """Raise UserError for a GPU that would be paid for and idle, and for a GPU that is not there."""
    if gpu is not None and device in ("cpu", "mps"):
        raise UserError(f"device={device} would leave the rented {gpu} idle; say device=auto, or rent none by --gpu null")
    if gpu is None and device not in ("auto", "cpu"):
        raise UserError(f"device={device} is not in a container without a GPU; say device=auto, or rent one by --gpu L4")


def parse_gpu(text: str | None) -> tuple[str | None, int]:
    """Name and count of "H100:4"; None for null. UserError for a GPU that Modal does not have, or not so many of."""
    if text is None or text.lower() == "null":
        return None, 1
    name, _, number = text.upper().partition(":")
    if name not in MOST:
        raise UserError(f"Modal has no GPU {text}{nearest(name, list(MOST))}; it has {', '.join(MOST)}, with :N for several")
    if not re.fullmatch(r"[0-9]*", number) or (":" in text and not number):
        raise UserError(f"backend.gpu={text} does not say how many; write {name}:2 for two")
    count = int(number or 1)
    check_count(name, count)
    return name, count


def check_count(name: str, count: int) -> None:
    """Raise UserError for more GPUs than one container can have."""
    if not 1 <= count <= MOST[name]:
        raise UserError(f"a container on Modal has 1 to {MOST[name]} of {name}, not {count}")


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


def require_access() -> None:
    """Raise UserError without modal or a token."""
    if lacking := lacking_access():
        raise UserError(lacking)


def open_volume(name: str) -> Any:
    """Return the Volume, made where it is missing. UserError without modal or a token. Nothing is sent yet."""
    require_access()
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
        if config[key] is not None and not on_volume(volume, str(PurePosixPath(config[key]))):
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
    parsed = parse_overrides(words)
    typed = {override.key_or_group for override in parsed}
    stored = {key: loaded[key] for key in ("device", "batch_size") if key in loaded and key not in typed}
    now = config | stored | {"devices": parsed[-1].value()}
    check_device(gpu, now["device"])
    check_devices(now)


def on_volume(volume: Any, path: str) -> bool:
    """Whether the Volume has the file."""
    import modal

    try:
        return bool(volume.listdir(path))
    except modal.exception.NotFoundError:
        return False


def best_of(name: str, outcome: dict[str, Any]) -> float | None:
    """Return the best monitored value of a run that was waited for. UserError when it failed."""
    if outcome["status"]:
        why = f" ({outcome['why']})" if outcome["why"] else ""
        raise UserError(f"the run {name} on Modal ended with status {outcome['status']}{why}; what it said is above")
    best: float | None = outcome["best"]
    return best


def python_version() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def project() -> dict[str, Any]:
    """Return pyproject.toml. UserError where the project is installed without it."""
    path = ROOT / "pyproject.toml"
    if not path.is_file():
        raise UserError(f"backend=modal sends the source tree, and {ROOT} has no pyproject.toml; run from a checkout")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def packages(extras: list[str]) -> list[str]:
    """Return what the image installs: the dependencies of the project and of these extras. UserError for an extra there is
    not.
    """
    table = project()["project"]
    optional = table["optional-dependencies"]
    for extra in extras:
        if extra not in optional:
            raise UserError(f"backend.extras: pyproject.toml has no extra {extra}; it has {', '.join(optional)}")
    return sorted({*table["dependencies"], *(package for extra in extras for package in optional[extra])})


def shipped() -> list[str]:
    """Return what is sent of this folder: the project's modules and the folders of its packages."""
    tools = project()["tool"]["setuptools"]
    return sorted({name.partition(".")[0] for name in tools["packages"]}) + [f"{name}.py" for name in tools["py-modules"]]


def image(extras: list[str]) -> Any:
    """Debian with what pyproject.toml asks for, and the project's files, which change without a new build.

    The packages come from pyproject.toml and not from a uv.lock: that is no part of the project, and names the index of
    the machine it was made on.
    """
    import modal

    built = modal.Image.debian_slim(python_version()).uv_pip_install(*packages(extras))
    for name in shipped():
        here, there = ROOT / name, str(CODE / name)
        built = built.add_local_dir(here, there, ignore=NOT_SENT) if here.is_dir() else built.add_local_file(here, there)
    return built
