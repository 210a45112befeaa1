"""A cluster run by Slurm: the same overrides, carried out there from a frozen copy of this code.

The sbatch script is written here and not by submitit (its source at 1.5.4), which pickles function and result into the job
folder and executes what it finds there, freezes no code, knows states from sacct alone, saves and requeues inside a signal
handler, and returns its script through private functions only.
"""

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from backends.base_backend import Backend
from backends.checkout import DIGEST_COMMAND, code, digest, freeze, frozen_place, is_intact
from backends.slurm_queue import asked, forget_submission, lacking_slurm, note_submission, queued_runs
from common.errors import UserError
from common.ranges import Positive, Range
from configuration.checks import check_devices
from configuration.compose import typed_keys, without
from configuration.nodes import nearest
from run_files.provenance import COMMIT_VARIABLE, git_commit

EARLY_SECONDS = 60  # by which Slurm may send its warning too soon, in its own words
NEVER = 100  # years ahead at which Slurm dates the start of a job that no node fits
LEAST_SECONDS = 30  # of training that the time limit must leave
WORD = re.compile(r"[A-Za-z0-9_.,:@%+-]+")
NAMES = {"partition": WORD, "account": WORD, "constraint": re.compile(r"[A-Za-z0-9_.,:&|*()\[\]-]+")}
SHOWN_BY = {"partition": "`sinfo`", "account": "`sacctmgr show associations`", "constraint": "`sinfo -o %f`"}


class SlurmBackend(Backend):
    """One job for each run, an array for a sweep; returns once they are submitted.

    partition, account: null for the cluster's own. time_minutes: of one attempt; save_seconds before its end the run is
    saved and goes back to the queue, and on from there. nodes, gpus_per_node, cpus_per_node, memory_gb (of a node; null for
    the cluster's own): what each job is given. constraint: features of nodes. setup: lines of the script before the run.
    container: words before `python`, such as "apptainer exec --nv torch.sif". UserError for what Slurm would refuse.
    """

    queues = True

    def __init__(
        self, partition: str | None, account: str | None, time_minutes: Annotated[int, Range(1, 525600)],
        nodes: Annotated[int, Range(1, 100_000)], gpus_per_node: Annotated[int, Range(0, 1000)],
        cpus_per_node: Annotated[int, Range(1, 10_000)], memory_gb: Positive | None, constraint: str | None,
        setup: list[str], container: str | None, save_seconds: Annotated[int, Range(15, 36_000)],
    ) -> None:  # fmt: skip
        for key, value in {"partition": partition, "account": account, "constraint": constraint}.items():
            if value is not None and not NAMES[key].fullmatch(value):
                raise UserError(f"backend.{key} takes a name as {SHOWN_BY[key]} shows, no spaces or quotes, not {value!r}")
        least = math.ceil((save_seconds + EARLY_SECONDS + LEAST_SECONDS) / 60)
        if time_minutes < least:
            raise UserError(
                f"backend.time_minutes={time_minutes} leaves no time to train before the save, backend.save_seconds="
                f"{save_seconds} and up to a minute earlier; use at least {least}"
            )
        for line in setup:
            if "\n" in line or line.lstrip().startswith("#SBATCH"):
                raise UserError(f"backend.setup takes one shell command an entry, and no option of sbatch, not {line!r}")
        self.options = {
            "partition": partition, "account": account, "time": time_minutes, "nodes": nodes, "ntasks-per-node": 1,
            "cpus-per-task": cpus_per_node, "gpus-per-node": gpus_per_node or None,
            "mem": memory_gb and f"{math.ceil(1024 * memory_gb)}M", "constraint": constraint,
            "signal": f"B:USR1@{save_seconds}", "open-mode": "append",
        }  # fmt: skip
        self.nodes, self.gpus, self.setup, self.save_seconds = nodes, gpus_per_node, setup, save_seconds
        self.container = words_in(container)
        self.frozen: tuple[Path, str] | None = None  # of what this object has submitted, all from one copy

    def check(self, overrides: list[str], config: dict[str, Any]) -> None:
        self.devices(overrides, config)

    def lacking(self) -> str | None:
        return lacking_cluster()

    def submit(self, overrides: list[str], config: dict[str, Any]) -> float | None:
        job = queued_runs(Path(config["output_dir"])).get(config["run_name"])
        if job is not None:
            raise UserError(f"run {config['run_name']} is {job.words()} already; wait, or end it by `scancel {job.number}`")
        self.send([config], config["run_name"])
        return None

    def submit_all(self, configs: list[dict[str, Any]], name: str) -> None:
        """Submit one array; a run that waits or runs already is left to its job."""
        queued = queued_runs(Path(configs[0]["output_dir"]))
        for config in configs:
            if config["run_name"] in queued:
                print(f"{config['run_name']}: is {queued[config['run_name']].words()}, skipped")
        left = [config for config in configs if config["run_name"] not in queued]
        if left:
            self.send(left, name)

    def send(self, configs: list[dict[str, Any]], name: str) -> None:
        """Submit, and say how to follow what was submitted."""
        number, many, output_dir = self.hand_in(configs, name), len(configs) > 1, Path(configs[0]["output_dir"])
        folder = "" if output_dir == Path("outputs") else f"--output-dir {shlex.quote(str(output_dir))} "
        log = shlex.quote(str(output_dir / "submitted" / f"{number}{'_0' * many}.log"))
        print(
            f"{name}: submitted to Slurm as job {number}{f', an array of {len(configs)} runs' * many}\n"
            f"  list      python scripts/runs.py {folder}list\n"
            f"  follow    tail -F {log}\n"
            f"  cancel    scancel {number}{f'          # one run of it: scancel {number}_0' * many}"
        )

    def hand_in(self, configs: list[dict[str, Any]], name: str) -> str:
        """Freeze the code, and submit."""
        if lacking := lacking_slurm():
            raise UserError(lacking)
        self.try_out(configs, name)
        output_dir = Path(configs[0]["output_dir"])
        self.frozen = self.frozen or freeze(output_dir)
        runs, comment = {config["run_name"]: config["overrides"] for config in configs}, comment_of(configs)
        note_submission(output_dir, comment, name, runs)
        number = sbatch(self.script_of(configs, name, *self.frozen), "--parsable").strip().partition(";")[0]
        note_submission(output_dir, number, name, runs)
        forget_submission(output_dir, comment)
        if not is_intact(*self.frozen):
            subprocess.run(["scancel", number], capture_output=True, check=False)
            raise UserError(
                f"{self.frozen[0]} was cleared or changed while runs were being submitted, so job {number} was cancelled; "
                "give the same command again"
            )
        return number

    def describe(self, overrides: list[str], config: dict[str, Any]) -> dict[str, str]:
        partition, minutes = self.options["partition"] or "the default partition", self.options["time"]
        nodes = f"{self.nodes} node{'s' * (self.nodes > 1)}"
        gpus = f"{self.gpus} GPUs on each" if self.gpus else "no GPU"
        return {
            "where": f"Slurm, {nodes} of {partition}, {gpus}, {minutes} min for each attempt",
            "processes": str(self.devices(overrides, config)),
            "slurm": self.lacking() or "found",
        }

    def script(self, configs: list[dict[str, Any]], name: str) -> str:
        if not self.lacking():
            self.try_out(configs, name)
        of_code = digest(code())
        return self.script_of(configs, name, frozen_place(Path(configs[0]["output_dir"]), of_code), of_code)

    def try_out(self, configs: list[dict[str, Any]], name: str) -> None:
        """UserError for a job that Slurm would refuse, or keep waiting for ever. Submits nothing."""
        partition = self.options["partition"]
        known = asked(["sinfo", "--noheader", "--format=%R"]).split()
        if partition is not None and not set(str(partition).split(",")) <= set(known):
            near = nearest(str(partition), known)
            raise UserError(f"backend.partition={partition} does not exist{near}; Slurm has {', '.join(known)}")
        said = sbatch(self.script_of(configs, name, Path("code"), "0"), "--test-only")
        start = re.search(r"to start at (\d{4})-", said)
        if start and int(start[1]) > datetime.now().year + NEVER:
            raise UserError(
                f"no nodes of {partition or 'the default partition'} can ever start this job; fit backend.nodes, "
                "gpus_per_node, cpus_per_node and time_minutes to what `sinfo -o '%P %D %c %G %l'` lists"
            )

    def devices(self, overrides: list[str], config: dict[str, Any]) -> int:
        """Return the number of processes of a run: one for each GPU, or node, unless typed. UserError for what cannot be
        shared out, or would leave a GPU idle."""
        if self.nodes > 1 and config.get("teacher") and not config["resume"]:
            raise UserError("teacher= trains two runs in turn, on one node; say backend.nodes=1, or train the teacher first")
        fitting, device = self.nodes * max(1, self.gpus), config["device"]
        count = config["devices"] if "devices" in typed_keys(overrides) else fitting
        if count % self.nodes or (self.gpus and count != fitting):
            raise UserError(
                f"devices={count} processes do not fit backend.nodes={self.nodes} with gpus_per_node={self.gpus}; leave "
                f"devices out, or use devices={fitting}"
            )
        if self.gpus and device in ("cpu", "mps"):
            raise UserError(f"device={device} would leave the node's GPUs idle; say device=auto, or backend.gpus_per_node=0")
        if not self.gpus and device not in ("auto", "cpu"):
            raise UserError(f"device={device} is not in a job without GPUs; say device=auto, or backend.gpus_per_node=1")
        check_devices(config | {"devices": count})
        return count

    def words(self, config: dict[str, Any]) -> list[str]:
        """Return what the launcher is given there."""
        overrides = config["overrides"]
        return [*without(overrides, ("backend", "devices")), f"devices={self.devices(overrides, config)}"]

    def script_of(self, configs: list[dict[str, Any]], name: str, place: Path, of_code: str) -> str:
        """Return the sbatch script of some runs, an array for several, that runs the code in `place` if it is unchanged."""
        many, logs = len(configs) > 1, Path(configs[0]["output_dir"]).absolute() / "submitted"
        log = f"{str(logs).replace('%', '%%')}/{'%A_%a' if many else '%j'}.log"
        options = {
            "job-name": name,
            "comment": comment_of(configs),
            "output": log,
            **self.options,
            "array": f"0-{len(configs) - 1}" if many else None,
        }
        job = ["-P", "-m", "backends.slurm_job", "--seconds", str(self.save_seconds)]
        job += ["--container", shlex.join(self.container)] if self.container else []
        return "\n".join([
            "#!/bin/bash",
            *(f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None),
            "#SBATCH --requeue",
            "trap '' USR1  # until Python handles it",
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            f"code={shlex.quote(str(place))}",
            f'digest=$(cd "$code" && {DIGEST_COMMAND}) || exit 1',
            f'[ "${{digest%% *}}" = {of_code} ] || {{',
            '  echo "the code in $code is not what was submitted; submit again" >&2',
            "  exit 1",
            "}",
            f"export {COMMIT_VARIABLE}={shlex.quote(git_commit())} PYTHONDONTWRITEBYTECODE=1",
            *self.setup,
            'export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"',
            "case ${SLURM_ARRAY_TASK_ID:-0} in",
            *(f"{task}) run=({shlex.join(self.words(config))}) ;;" for task, config in enumerate(configs)),
            "esac",
            f'exec {shlex.quote(sys.executable)} {shlex.join(job)} "${{run[@]}}"',
        ]) + "\n"  # fmt: skip


def comment_of(configs: list[dict[str, Any]]) -> str:
    """Return what a job is known by before it has a number: the same for the same runs of the same folder."""
    runs = [[str(Path(config["output_dir"]).absolute()), config["run_name"], *config["overrides"]] for config in configs]
    return hashlib.blake2b(json.dumps(runs).encode(), digest_size=12).hexdigest()


def lacking_cluster() -> str | None:
    """Return why no cluster answers here, in a sentence; None where one does."""
    if lacking := lacking_slurm():
        return lacking
    try:
        asked(["sinfo", "--noheader", "--format=%R"])
    except UserError as error:
        return str(error)
    return None


def sbatch(script: str, option: str) -> str:
    """Hand a script to sbatch; returns what it prints. Variables SBATCH_* change nothing: the script says it all."""
    kept = {k: value for k, value in os.environ.items() if not k.startswith(("SBATCH_", "SLURM_")) or k == "SLURM_CONF"}
    return asked(["sbatch", option], script, kept)


def words_in(container: str | None) -> list[str]:
    """Return the words of a command. UserError where its quotes do not close."""
    try:
        words = shlex.split(container or "")
    except ValueError as error:
        raise UserError(f"backend.container={container!r} cannot be read as a command ({error}); close its quotes") from None
    if container is not None and not words:
        raise UserError("backend.container takes the words before python, such as 'apptainer exec --nv torch.sif', or null")
    return words
