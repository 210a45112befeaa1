"""From typed overrides to a configuration that is checked and ready to run: new, resumed, or one job of a sweep."""

import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from backends.base_backend import Backend
from common.errors import UserError
from common.files import in_working_folder
from common.own_objects import is_own
from configuration.build import build
from configuration.checks import check_contradictions, check_devices, check_memory, check_values
from configuration.compose import Own, compose_config, parse_overrides, resolved, typed_keys, without
from configuration.engines import check_engine
from configuration.nodes import lookup, rebuilt
from configuration.overrides import differences, laid_over
from configuration.stored import (
    AS_TYPED,
    allow_for,
    check_addresses,
    check_new_parts,
    check_plain,
    check_targets,
    upgraded,
    without_downloads,
)
from configuration.values import FREE, NEUTRAL
from run_files.checks import check_files, check_run_is_new
from run_files.mirror import StoredRun
from run_files.result import OF_ANOTHER, RunResult, result_of
from run_files.run_folder import RunFolder, run_folder_of
from run_files.run_lock import check_entries
from run_files.stored_values import CONFIG_REMEDY

DRAWN = "dataloaders.synthetic."  # data made of numbers alone, which is built at once to see whether they fit
NOTED = ("epochs", "max_steps", "device", "engine", "devices", "guidance")  # what may change freely and is noted in the log
# Of a command, what its teacher does not share: who it is, what it learns by and for how long.
OF_ONE_RUN = (
    "run_name", "experiment", "teacher", "loss", "solver", "guidance", "optimizer", "schedule", "ema", "epochs", "max_steps",
    "batch_size", "gradient_accumulation_steps", "log", "resume", "overwrite", "init_from", "eval_checkpoint",
)  # fmt: skip
NOT_THE_TEACHERS = ("run_name", "teacher", "resume", "overwrite", "eval_checkpoint")
OF_OBJECT = {"_target_", "run", "part", "name", "digest"}  # of a node: which object given from Python it stands for
SHARED = ("dataloaders", "source", "model")  # groups whose choices it has from the run it is for, typed or not
# Of a whole config.yaml, from its first keys to its last.
WRITTEN = ("run_name", "dataloaders", "model", "loss", "optimizer", "choices", "overrides", "changed")


def submit(config: dict[str, Any]) -> RunResult:
    """Hand a prepared configuration to its backend, its teacher's first; returns what came of it."""
    backend: Backend = build(config["backend"])
    if config.get("teacher") and not (backend.elsewhere or backend.queues or config["resume"] or config["eval_checkpoint"]):
        train_teacher(config)
    return result_of(config, backend.submit(config["overrides"], config))


def teacher_words(config: dict[str, Any]) -> list[str]:
    """Return the command of the run that is trained before this one: its data and network, what was typed of anything that
    is not training alone, and the words of teacher=. UserError for words that are not the teacher's to say.
    """
    own = config["teacher"].split()
    if bare := [word for word in own if "=" not in word]:
        raise UserError(
            f"teacher={config['teacher']}: teacher= takes the words of a run that is trained first, such as "
            f"teacher='loss=mse', and {bare[0]} is not key=value; a checkpoint that is there already goes to "
            "loss.coupling.teacher=, loss.teacher= or init_from="
        )
    if taken := [key for key in typed_keys(own) if key in NOT_THE_TEACHERS]:
        raise UserError(f"teacher= names what a run is trained by, such as loss=mse; leave {taken[0]} out of it")
    typed = zip(config["overrides"], typed_keys(config["overrides"]), strict=True)
    words = [word for word, key in typed if re.split(r"[./@]", key)[0] not in OF_ONE_RUN] + own
    chosen = [f"{group}={config['choices'][group]}" for group in SHARED if group not in typed_keys(words)]
    return [*chosen, *words, f"run_name={config['run_name']}_teacher"]


def with_teacher(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with its teacher's save in place of its name. UserError for words that make no such run."""
    teacher = resolved(compose_config(teacher_words(config)))
    check_values(teacher)
    check_contradictions(teacher)
    name, place = teacher["run_name"], Path(teacher["output_dir"]) / "ckpts" / teacher["choices"]["model"]
    readers = ("loss.coupling.teacher", "loss.teacher", "init_from")
    if not config["resume"] and name not in [lookup(config, key) for key in readers]:
        raise UserError(
            f"teacher= trains the run {name}, of which this one reads nothing; add loss=distillation and "
            "'loss.coupling.teacher=${run_name}_teacher', or leave teacher out"
        )
    save = lambda node: {k: str(place / f"{name}_last.pt") if v == name else v for k, v in node.items()}  # noqa: E731
    if config["resume"] and not run_folder_of(config).config_path.is_file() and run_folder_of(teacher).config_path.is_file():
        config |= {"resume": False, "overrides": without(config["overrides"], ("resume",))}  # stopped in the teacher's time
    return config | {"loss": rebuilt(config["loss"], save)} | save({"init_from": config["init_from"]})


def train_teacher(config: dict[str, Any]) -> None:
    """Train the run whose words are teacher=, go on with it, or leave it as it is where it has finished.

    UserError, before that, for a solver that cannot use what the run itself learns.
    """
    import torch  # slow

    from evaluation.parts import build_objective, build_solver
    from losses.objective import FlowObjective

    student = build_objective(config, torch.device("cpu"))
    if isinstance(student, FlowObjective):
        build_solver(config).check(student)
    words = teacher_words(config)
    made = begun_job(words, resolved(compose_config(words)))
    if not isinstance(made, RunResult):
        print(f"first its teacher: python launcher.py {shlex.join(made)}", flush=True)
        submit(prepare(made))
    elif made.state == OF_ANOTHER:
        raise UserError(f"another process trains the teacher {made.name}; give the same command when it has finished")
    else:
        print(f"its teacher {made.name} has been trained", flush=True)


def describe(configs: list[dict[str, Any]], name: str) -> str:
    """Return what `submit` would do with prepared configurations, in a few lines each, and the script that would be sent.

    name: of all of them together. UserError for what it refuses.
    """
    backend: Backend = build(configs[0]["backend"])
    for config in configs:
        if "monitor" in typed_keys(config["overrides"]):
            build(config["evaluation"]).check_monitor(config["monitor"])
    return "\n".join([*map(described, configs), *filter(None, [backend.script(configs, name)])])


def described(config: dict[str, Any]) -> str:
    """Return the lines of one run."""
    backend: Backend = build(config["backend"])
    name, choices, folder = config["run_name"], config["choices"], run_folder_of(config)
    what = f"{choices['model']} learns {choices['dataloaders']} by {choices['loss']}"
    engine = "torch" if config["eval_checkpoint"] else config.get("engine", "torch")
    lines = {"backend": str(choices["backend"]), "engine": engine, **backend.describe(config["overrides"], config)}
    if config["resume"] and backend.elsewhere:
        what = "goes on as it was begun there"
    elif config["eval_checkpoint"]:
        what = f"scores {config['eval_checkpoint']}"
    else:
        lines |= {"teacher, first": f"python launcher.py {shlex.join(teacher_words(config))}"} if config["teacher"] else {}
        lines |= {
            "run folder": str(folder.path) + (" (goes on)" if config["resume"] else ""),
            "checkpoints": str(Path(config["output_dir"]) / "ckpts" / choices["model"]),
        }
    width = max(map(len, lines))
    return "\n".join([f"{name}: {what}", *(f"  {line:<{width}}  {value}" for line, value in lines.items())])


def prepare(overrides: list[str], own: Own | None = None) -> dict[str, Any]:
    """Return the resolved configuration of a run, with `command`, `overrides` and `changed` (key -> (old, new)) beside its
    keys.

    UserError for anything that is wrong with it. Nothing is written. For a backend elsewhere what hangs on a machine's
    files, such as a run to resume, is left to that machine. own: parts given from Python, see compose_config.
    """
    config = resolved(compose_config(overrides, own))
    check_values(config)
    check_contradictions(config)
    config |= {"command": "python launcher.py " + shlex.join(overrides), "overrides": overrides, "changed": {}}
    if config["teacher"]:
        config = with_teacher(config)
    allow_for(config)
    check_new_parts(config)
    if not config["resume"]:
        check_devices(config)  # else once it is known what the run was begun with
        check_engine(config)
    backend: Backend = build(config["backend"])
    if not backend.elsewhere:
        config = checked_here(config)
    if str(config["dataloaders"].get("_target_")).startswith(DRAWN):
        build(config["dataloaders"])
    return config


def checked_here(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that fits this machine and its files, that of a stored run where it is to go on."""
    if config["resume"]:
        config = resumed(config, parse_overrides(config["overrides"]))
        check_new_parts(config)
        check_values(config)
        check_devices(config)
        check_engine(config)
    check_memory(config)
    check_files(config)
    check_run_is_new(config, run_folder_of(config).path)
    return config


def resumed(config: dict[str, Any], typed: list[Override]) -> dict[str, Any]:
    """Return the stored configuration of the run with what was typed now laid over it.

    The stored one may be anyone's: it builds what is allowed, fetches nothing, and has nothing written elsewhere. UserError
    for that, when there is no such run, or when a setting that matters differs and resume is not `force`.
    """
    folder, mirror = run_folder_of(config), config["mirror"]
    teacher = run_folder_of(config | {"run_name": f"{folder.name}_teacher"})
    if not folder.config_path.is_file() and teacher.config_path.is_file():
        raise UserError(
            f"of the run {folder.name} only the teacher has begun, {folder.name}_teacher; give the whole command of "
            f"{folder.name} again, which goes on with it"
        )
    if not folder.config_path.is_file():
        raise UserError(
            f"there is no run {config['run_name']} in {folder.path.parent}{f' or {mirror}' * bool(mirror)} to resume; "
            "leave resume=true out to start it, or see `python scripts/runs.py list`"
        )
    before = stored_settings(folder, config, typed)
    merged = given_again(laid_over(without_downloads(before), config, typed), config)
    check_targets(merged, folder.config_path, set(merged) - set(AS_TYPED))
    check_log(merged["log"], folder, typed)
    check_addresses(merged, folder.config_path)
    changed = {k: pair for k, pair in differences(before, merged).items() if k.split(".")[-1] not in ("download", "url")}
    hard = {key: pair for key, pair in changed.items() if key.split(".")[0] not in FREE}
    if hard and config["resume"] != "force":
        listed = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, (old, new) in hard.items())
        raise UserError(f"run {folder.name} was made with other settings: {listed}; leave them out, or say resume=force")
    return merged | {"changed": hard | {key: pair for key, pair in changed.items() if key.split(".")[0] in NOTED}}


def given_again(stored: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the parts that this command gives from Python; its own callbacks are left out."""
    own = {key: node for key, node in config.items() if is_own(node)}
    same = {key: stored[key] | {name: node[name] for name in OF_OBJECT & node.keys()} for key, node in own.items()
            if is_own(stored[key])}  # fmt: skip
    called = {key: config["choices"][key] for key in own}
    watching = {key: node for key, node in stored["callbacks"].items() if not is_own(node)}
    watching |= {key: node for key, node in config["callbacks"].items() if is_own(node)}
    return stored | own | same | {"callbacks": watching, "choices": stored["choices"] | called}


def stored_settings(folder: RunFolder, config: dict[str, Any], typed: list[Override]) -> dict[str, Any]:
    """Return what the run was made with, keys of a later date being as they are now. UserError for one that is damaged."""
    check_entries(folder.path)
    before = upgraded(folder.read_config())
    lacking = [key for key in WRITTEN if key not in before]
    if lacking:
        raise UserError(f"{folder.config_path} is cut: it lacks {', '.join(lacking)}; {CONFIG_REMEDY}")
    now = {override.key_or_group.split(".")[0] for override in typed}
    before.setdefault("monitor_mode", "min")  # as it was before there was a choice
    before |= {key: value for key, value in config.items() if key not in before and key not in now}
    check_plain(before, folder.config_path)
    return before


def check_log(log: dict[str, Any], folder: RunFolder, typed: list[Override]) -> None:
    """Raise UserError where a run would go on in a log outside the working folder that this command does not name."""
    file, named = str(log.get("file")), any(override.key_or_group in ("log", "log.file") for override in typed)
    if log.get("expect") and not named and not in_working_folder(Path(file)):
        raise UserError(
            f"{folder.config_path} has the run's section written to {file}, outside the working folder; add "
            f"log.file={file} if it belongs there"
        )


def sweep_name(run_name: str, swept: list[tuple[str, str]]) -> str:
    """Return run_name with the job's own overrides appended: short, fit for a file name, the same whatever their order."""
    leaves = [key.split(".")[-1] for key, _ in swept]
    parts = []
    for key, value in sorted(swept):
        leaf = key.split(".")[-1]
        word = f"{leaf if leaves.count(leaf) == 1 else key}={value}"
        clean = re.sub(r"[^A-Za-z0-9._=+\-]+", "-", word).strip("-")
        if len(clean) > 40 or clean != word.replace("/", "-"):
            clean = f"{clean[:32]}-{hashlib.blake2s(word.encode(), digest_size=3).hexdigest()}"
        parts.append(clean)
    return "_".join([run_name, *parts])


def sweep_job(job: list[str], swept_keys: set[str], brings: bool = True) -> list[str] | RunResult:
    """Return the overrides of one job of a sweep under its own run_name, as `begun_job`."""
    parsed = parse_overrides(job)
    swept = [(o.key_or_group, (o.input_line or "").partition("=")[2]) for o in parsed if o.key_or_group in swept_keys]
    config = resolved(compose_config([text for text in job if not re.match(r"(resume|overwrite)=", text)]))
    name = sweep_name(str(config["run_name"]), swept)
    words = [text for text in job if not text.startswith("run_name=")]
    return begun_job([*words, f"run_name='{name}'"], config | {"run_name": name}, brings)


def bring(overrides: list[str]) -> None:
    """Copy a run that is to go on from its mirror, where this machine has none of its name."""
    if {"mirror", "resume"} <= set(typed_keys(overrides)):
        config = resolved(compose_config(overrides))
        check_values(config)
        bring_run(config)


def bring_run(config: dict[str, Any]) -> None:
    """Copy a run, and the teacher it may have, from the mirror of its configuration if there is one and it holds them."""
    backend: Backend = build(config["backend"])
    if config["mirror"] and not backend.elsewhere:
        for name in (f"{config['run_name']}_teacher", config["run_name"]):
            StoredRun(config["mirror"], name).bring(Path(config["output_dir"]))


def begun_job(overrides: list[str], config: dict[str, Any], brings: bool = True) -> list[str] | RunResult:
    """Return the overrides with which a sweep's job goes on from where it stands; its result if that is not for this sweep
    to do: it has finished, or another process trains it. brings: whether a run that only its mirror holds is copied here.

    UserError when a run of that name exists that another command made.
    """
    overrides, folder = [text for text in overrides if not re.match(r"(resume|overwrite)=", text)], run_folder_of(config)
    if brings:
        bring_run(config)
    begun, result = folder.config_path.is_file(), result_of(config)
    if begun and settings_of(folder.read_config().get("overrides", [])) != settings_of(overrides):
        raise UserError(f"run {folder.path} exists from another command; choose another run_name, or remove that run")
    if result.state == OF_ANOTHER or (begun and result.state == "finished"):
        return result
    if not begun:
        return overrides
    return [*overrides, "resume=true" if folder.status.read().get("step") else "overwrite=unsaved"]


def settings_of(overrides: list[str]) -> list[str]:
    """Return the overrides that results depend on, sorted: no NEUTRAL one but guidance, which samples depend on."""
    return sorted(without(overrides, NEUTRAL - {"guidance"}))
