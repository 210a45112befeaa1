"""A GPU rented from Modal: the same overrides, carried out there over a Volume.

Here a run is checked, an App is put together from pyproject.toml and this checkout, and one call is submitted; there
`on_modal` carries it out. modal itself is imported when something is to be sent, so that no other run needs it.
"""

import os
import platform
import re
import shlex
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from backends.base_backend import Backend
from backends.checkout import NOT_SENT, ROOT, project, shipped
from backends.modal_volume import (
    CHECKPOINTS,
    check_device,
    check_stored,
    check_volume,
    explained,
    lacking_access,
    note_job,
    open_volume,
)
from backends.on_volume import carry_out_on
from common.errors import UserError
from common.ranges import Positive, Range
from configuration.checks import check_devices
from configuration.compose import typed_keys, without
from configuration.nodes import check_known, nearest
from run_files.provenance import COMMIT_VARIABLE, git_commit
from run_files.run_folder import timestamp

CODE = PurePosixPath("/root")  # there: where modal looks for the modules of functions
MOUNT = PurePosixPath("/volume")  # there: the working folder of runs
MOST = {
    "T4": 8, "L4": 8, "A10": 4, "L40S": 8, "A100": 8, "A100-40GB": 8, "A100-80GB": 8, "RTX-PRO-6000": 8, "H100": 8,
    "H100!": 8, "H200": 8, "B200": 8, "B200+": 8,
}  # fmt: skip   # how many of a GPU one container can have: Modal's GPU guide, November 2026
PYTHON = ".".join(platform.python_version_tuple()[:2])


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
        self, gpu: str | None, detach: bool, volume: str, timeout_hours: Annotated[float, Range(0, 24, above=True)],
        retries: Annotated[int, Range(0, 10)], commit_minutes: Positive, cpu: Positive, memory_gb: Positive,
        extras: list[str],
    ) -> None:  # fmt: skip
        self.gpu, self.count = parse_gpu(gpu)
        if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,63}", volume):
            raise UserError(f"backend.volume takes letters, digits and . _ - (at most 63), not {volume!r}")
        self.detach, self.volume, self.retries, self.extras = detach, volume, retries, extras
        self.timeout_hours, self.commit_minutes, self.cpu, self.memory_gb = timeout_hours, commit_minutes, cpu, memory_gb

    def submit(self, overrides: list[str], config: dict[str, Any]) -> float | None:
        words, gpu = self.checked(overrides, config)
        volume, name = open_volume(self.volume), config["run_name"]
        with explained(f"the run {name}"):
            check_volume(volume, self.volume, config)
            if config["resume"]:
                check_stored(volume, config, words, gpu)
            call, outcome = self.sent(volume, name, words, gpu)
        if outcome is not None:
            return best_of(name, outcome)
        if call is None or not self.detach:  # app.run ends at Ctrl-C without a word
            raise UserError(f"stopped; what the run {name} had saved is on the Volume, and resume=true goes on from it")
        print(
            f"{name} runs on Modal ({call.object_id}), whatever this machine does now\n"
            f"  watch     python scripts/modal_app.py logs {name}\n"
            f"  bring     python scripts/modal_app.py sync\n"
            f"  end       python scripts/modal_app.py stop {name}"
        )
        return None

    def sent(self, volume: Any, name: str, words: list[str], gpu: str | None) -> tuple[Any, Any]:
        """Return the call that carries out the run, and what came of it where that is waited for; None each at Ctrl-C."""
        import modal

        app, function = self.app(gpu)
        job: dict[str, Any] = {"overrides": words, "gpu": gpu, "submitted": timestamp()}
        settings = {"volume": self.volume, "commit_minutes": self.commit_minutes, "git_commit": git_commit()}
        call = outcome = None
        with modal.enable_output(), app.run(detach=self.detach, name=f"denoising-zoo {name}"):
            note_job(volume, name, job | {"app": app.app_id})
            call = function.spawn(words, settings)
            note_job(volume, name, job | {"app": app.app_id, "call": call.object_id})
            outcome = None if self.detach else call.get()
        return call, outcome

    def describe(self, overrides: list[str], config: dict[str, Any]) -> dict[str, str]:
        words, gpu = self.checked(overrides, config)
        return {
            "where": f"Modal, a container with {gpu or 'no GPU'}, {'detached' if self.detach else 'streamed to here'}",
            "command": shlex.join(["python", str(CODE / "launcher.py"), *words]),
            "in": f"{MOUNT}, the Volume {self.volume}: runs, checkpoints and data sets under their paths of here",
            "tracker": str(MOUNT / "trackio" / config["run_name"]),
            "image": f"Debian slim, Python {PYTHON}: {', '.join(packages(self.extras))}",
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
        if config.get("mirror"):
            raise UserError(
                "runs on Modal are kept on its Volume, from which modal_app.py sync brings them; leave mirror out"
            )
        packages(self.extras)
        check_device(self.gpu, config["device"])
        keys, words = typed_keys(overrides), without(overrides, ("backend", "devices"))
        typed, count = "devices" in keys, config["devices"]
        if self.gpu is not None:
            if typed and self.count not in (1, count):
                raise UserError(f"devices={count} does not use {self.gpu}:{self.count}; leave devices out, or rent :{count}")
            count = count if typed else self.count
            check_count(self.gpu, count)
        if not config["resume"] or "batch_size" in keys:
            check_devices(config | {"devices": count})
        return [*words, f"devices={count}"], self.gpu if self.gpu is None or count == 1 else f"{self.gpu}:{count}"

    def function_settings(self, gpu: str | None) -> dict[str, Any]:
        """Return the arguments of App.function, without the image."""
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


def check_on_volume(key: str, place: str, remedy: str) -> None:
    """Raise UserError for a path that is not relative to the Volume, or leaves it."""
    path = PurePosixPath(place)
    if path.is_absolute() or ".." in path.parts or place.startswith("~"):
        raise UserError(f"{key}={place} is no path inside the Volume; {remedy}")


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


def best_of(name: str, outcome: dict[str, Any]) -> float | None:
    """Return the best monitored value of a run that was waited for. UserError when it failed."""
    if outcome["status"]:
        why = f" ({outcome['why']})" if outcome["why"] else ""
        raise UserError(f"the run {name} on Modal ended with status {outcome['status']}{why}; what it said is above")
    best: float | None = outcome["best"]
    return best


def packages(extras: list[str]) -> list[str]:
    """Return what the image installs: those of the project and of these extras. UserError for an unknown extra."""
    table = project()["project"]
    optional = table["optional-dependencies"]
    for extra in extras:
        check_known("backend.extras", extra, list(optional))
    return sorted({*table["dependencies"], *(package for extra in extras for package in optional[extra])})


def image(extras: list[str]) -> Any:
    """Debian with what pyproject.toml asks for, and the project's files, which change without a new build.

    The packages come from pyproject.toml and not from a uv.lock: that is no part of the project, and names the index of
    the machine it was made on.
    """
    import modal

    built = modal.Image.debian_slim(PYTHON).uv_pip_install(*packages(extras))
    for name in shipped():
        here, there = ROOT / name, str(CODE / name)
        built = built.add_local_dir(here, there, ignore=NOT_SENT) if here.is_dir() else built.add_local_file(here, there)
    return built
