"""From a resolved configuration to the objects of a run."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from common.device import gradient_scaler, pick_device, set_numerics
from common.distributed import rank, rank0_first, world
from common.errors import UserError
from configuration.build import build
from configuration.compose import RECOMMENDATIONS, parse_overrides
from configuration.stored import stored_config
from dataloaders.base_dataloaders import FlowDataset
from evaluation.evaluator import GeneratorEvaluator
from evaluation.metrics.base_metric import EvaluationInputs
from evaluation.parts import (
    build_dataset,
    build_decoder,
    build_objective,
    build_solver,
    build_source,
    dataset_key,
    load_network,
    sampled_flow,
)
from helpers_cfg import Guidance
from losses.objective import FlowObjective, Objective
from run_files.checkpoint import load_checkpoint
from run_files.checkpoint_folder import CheckpointFolder
from run_files.run_folder import run_folder_of
from run_files.trackers import NullTracker, tracker_from_config
from training.records import Records, SilentRecords
from training.run import Run
from training.settings import LogSettings, LoopSettings, SaveSettings, settings_of, summary_settings
from training.state import TrainState, averaged_objective
from training.step_hooks import SkipNonFinite, StepHook

SAMPLE_COUNTS = {
    "evaluation.samples", "evaluation.final_samples", "dataloaders.training.evaluation_samples",
    "dataloaders.training.final_evaluation_samples",
}  # fmt: skip
FEWEST_SAMPLES = 8
MOMENT_ROWS = 2000
LIGHT, LIGHT_GPU = {"cpu": 2.5e12}, 5e14  # parameters x pixels x rows through the network that take about ten seconds


def start_weights(objective: Objective, path: Path) -> None:
    """Begin at the EMA weights of another run (init_from)."""
    payload = load_checkpoint(path)
    load_network(objective.network, payload["ema"], path)
    if payload["second_time"] != objective.second_time:
        print(
            f"note: {path} was trained with second_time={payload['second_time']}, this objective reads its second time as "
            f"{objective.second_time}; a flow trained with loss.second_time=state is the better start"
        )


def adopt_model(config: dict[str, Any], path: Path) -> None:
    """Build the network as that of init_from, but for what was typed (losses choose time embeddings).

    UserError when the checkpoint holds another kind of model.
    """
    stored = stored_config(path, load_checkpoint(path))
    kind, wanted = stored["choices"]["model"], config["choices"]["model"]
    theirs, ours = ((c["loss"].get("prediction") or {}).get("_target_", "") for c in (stored, config))
    why = ""
    if kind != wanted:
        why = f"holds model={kind}, this run has model={wanted}; add model={kind}"
    elif theirs and ours and theirs != ours:
        why = (
            f"predicts by {theirs.rpartition('.')[2]}, this run by {ours.rpartition('.')[2]}: the same numbers would mean "
            "another thing; choose the same loss/prediction"
        )
    if why:
        raise UserError(f"init_from={path} {why}")
    theirs, ours = (bool(c["dataloaders"].get("standardize")) for c in (stored, config))
    if theirs != ours:
        print(
            f"note: {path} learned {'' if theirs else 'un'}standardized data, and this run's are "
            f"{'' if ours else 'un'}standardized; dataloaders.standardize={str(theirs).lower()} is the better start"
        )
    typed = {override.key_or_group for override in parse_overrides(config["overrides"])}
    for key, value in stored["model"].items():
        free = key in config["model"] and key not in (RECOMMENDATIONS, "state_shape", "num_classes", "augment_dim")
        if free and f"model.{key}" not in typed and config["model"][key] != value:
            print(f"note: model.{key}={value}, as in {path} (the default here is {config['model'][key]})")
            config["model"][key] = value


def assemble(config: dict[str, Any]) -> Run:
    """Return every part of the run, on its device, at its start or where its newest save left it. Writes nothing."""
    device, first = pick_device(config["device"]), rank() == 0
    set_numerics(device, config["deterministic"])
    if not config["dataloaders"].get("standardize"):
        config.pop("standardized", None)  # resume=force may have turned it off
    if config["init_from"] and not config["resume"]:
        adopt_model(config, Path(config["init_from"]))
    objective, solver, evaluator = build_objective(config, device), build_solver(config), build(config["evaluation"])
    evaluator.check(objective)
    if isinstance(objective, FlowObjective):
        solver.check(objective)
    checkpoints = CheckpointFolder(
        Path(config["output_dir"]), config["choices"]["model"], config["run_name"], config["keep_saves"],
        in_background={"auto": None, "always": True, "never": False}[config["async_save"]],
    )  # fmt: skip
    state = assemble_state(objective, checkpoints, config, device)
    dataset, source = assemble_data(state, config, device), build_source(config, device)
    loop = settings_of(LoopSettings, config)
    inputs = EvaluationInputs(
        state.ema_objective, dataset, source, solver, loop.seed, dataset_key(config), Path(config["output_dir"]) / "cache",
        False, sampled_flow(state.ema_objective, config, device), build_decoder(config, device),
    )  # fmt: skip
    tracker = tracker_from_config(config["trackio"]) if first else NullTracker()
    records = Records if first else SilentRecords
    run = Run(
        loop, settings_of(LogSettings, config | config["log"]), summary_settings(config), device, dataset, source, state,
        forward_of(objective, config), evaluator, inputs,
        records(settings_of(SaveSettings, config), config, run_folder_of(config), checkpoints, tracker),
        (SkipNonFinite if loop.on_nan == "skip" else StepHook)(loop.log_every),
        [build(node) for node in config["callbacks"].values() if node and first], rank(), world(),
    )  # fmt: skip
    if not config["resume"]:
        fit_samples(run, config)
    return run


def assemble_state(
    objective: Objective, checkpoints: CheckpointFolder, config: dict[str, Any], device: torch.device
) -> TrainState:
    """Return the objective with its average, optimizer and schedule, from the newest save where there is one."""
    going_on = bool(config["resume"] and checkpoints.saves())
    if config["init_from"] and not going_on:
        start_weights(objective, Path(config["init_from"]))
    ema = build(config["ema"])
    optimizer = build(config["optimizer"], params=[p for p in objective.network.parameters() if p.requires_grad])
    for settings in optimizer.param_groups:
        settings["initial_lr"] = settings["lr"]
    state = TrainState(
        objective, averaged_objective(objective, ema), ema, optimizer, build(config["schedule"]),
        gradient_scaler(device, config["precision"]),
    )  # fmt: skip
    if going_on:
        resume_state(state, *checkpoints.newest(), config)
    elif config["resume"]:
        check_same_arch(checkpoints)
        print(f"{config['run_name']} ended before its first save; beginning it again")
    return state


def assemble_data(state: TrainState, config: dict[str, Any], device: torch.device) -> FlowDataset:
    """Return the data; where they are to be standardised, their moments become part of the objective and of `config`."""
    with rank0_first(bool(config["dataloaders"].get("download"))):
        dataset = build_dataset(config, device)
    if dataset.standardize and "standardized" not in config:
        config["standardized"] = moments(dataset)
        for flow in (state.objective, state.ema_objective):
            assert isinstance(flow, FlowObjective)
            flow.standardise_by(**config["standardized"], state_shape=dataset.state_shape)
    return dataset


def moments(dataset: FlowDataset) -> dict[str, list[float]]:
    """Return mean and standard deviation of training rows, of each channel of images or dimension of vectors; a constant has
    1.

    Of all rows in memory, of MOMENT_ROWS read from disk.
    """
    part = dataset.training_part(MOMENT_ROWS)
    assert part is not None, "only data that are stored can be standardised"
    numbers = part[0].double().transpose(0, 1).flatten(1)
    std = numbers.std(1, correction=0)
    return {"mean": numbers.mean(1).tolist(), "std": torch.where(std > 0, std, 1.0).tolist()}


def fit_samples(run: Run, config: dict[str, Any]) -> None:
    """Draw fewer samples of images where evaluations that nobody asked for would cost more than a fifth of the run.

    A rule of the shape, the network, the kind of device and the length of the run alone, a training step counted as three
    forward passes; the counts become part of the configuration, so a run that goes on keeps them. Evaluations of about ten
    seconds (LIGHT) stay as they are.
    """
    evaluator, flow, shape = run.evaluator, run.inputs.flow, run.dataset.state_shape
    typed = {override.key_or_group for override in parse_overrides(config["overrides"])}
    if not isinstance(evaluator, GeneratorEvaluator) or flow is None or len(shape) != 3 or typed & SAMPLE_COUNTS:
        return
    passes = 1 + isinstance(flow.network, Guidance)
    during, last = (passes * evaluator.rows(flow, run.dataset, run.inputs.solver, final) for final in (False, True))
    evaluations = (-(-run.total_steps // run.steps_per_epoch) - 1) // run.settings.eval_every
    allowed = 3 * run.dataset.epoch_size * run.total_steps / run.steps_per_epoch / 4
    share = min(1.0, allowed / (evaluations * during + last))
    size = run.state.objective.network.parameter_count() * math.prod(shape[1:])
    light = LIGHT.get(run.device.type, LIGHT_GPU)
    node: dict[str, Any] = config["evaluation"]
    for key, rows in [("samples", during)] + [("final_samples", last)] * bool(evaluator.metrics):
        if size * rows > light:
            node[key] = min(node[key], max(FEWEST_SAMPLES, int(share * node[key])))
    if (node["samples"], node["final_samples"]) != (evaluator.samples, evaluator.final_samples):
        print(
            f"note: evaluations draw {node['samples']:,} samples and the last one {node['final_samples']:,}, not "
            f"{evaluator.samples:,} and {evaluator.final_samples:,}, "
            + (
                f"{FEWEST_SAMPLES} being the fewest, which costs so short a run more than a fifth"
                if FEWEST_SAMPLES in (node["samples"], node["final_samples"])
                else "so that they take about a fifth of this run"
            )
            + "; set evaluation.samples= and evaluation.final_samples= for others"
        )
        node["loss_samples"] = evaluator.loss_samples
    evaluator.samples, evaluator.final_samples = node["samples"], node["final_samples"]


def check_same_arch(checkpoints: CheckpointFolder) -> None:
    """Raise UserError when a run that is to begin again has saves, of another model."""
    for folder in checkpoints.folder.parent.glob("*"):
        other = CheckpointFolder(folder.parent.parent, folder.name, checkpoints.run_name, keep=0)
        if other.saves():
            raise UserError(
                f"run {checkpoints.run_name} was trained with model={folder.name} and cannot go on with "
                f"model={checkpoints.folder.name}; start another run_name"
            )


def resume_state(state: TrainState, path: Path, payload: dict[str, Any], config: dict[str, Any]) -> None:
    """Take up a save; the optimizer's settings are the configuration's, in case resume=force changed one.

    UserError when the save is of another network or optimizer.
    """
    before = payload["config"].get("devices", 1)
    if before != config["devices"]:
        print(
            f"note: the run goes on with {config['devices']} devices instead of {before}: rows of a fixed data set come in "
            "the order of one sitting, but noise, times and data that is drawn afresh are other draws"
        )
    load_network(state.objective.network, payload["network"], path)
    load_network(state.ema_objective.network, payload["ema"], path)
    wanted = [{key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups]
    saved = payload["optimizer"].get("param_groups", [])
    other = "schedule" if state.schedule.state_dict().keys() - payload["schedule"].keys() else None
    if [group.keys() for group in wanted] != [group.keys() - {"params"} for group in saved]:
        other = "optimizer"
    if other:
        raise UserError(
            f"{path} holds the state of another {other} than {config['choices'][other]}; leave {other} as it was, or start "
            "another run_name from these weights by init_from"
        )
    state.load_state_dict(payload)
    for settings, ours in zip(state.optimizer.param_groups, wanted, strict=True):
        settings.update(ours)


def forward_of(objective: Objective, config: dict[str, Any]) -> Any:
    """Return the objective, or its compiled form: the whole loss is compiled, never the network alone.

    With several ranks their gradients are averaged in its backward pass; all ranks wait here for each other.
    """
    forward = torch.compile(objective, mode=config["compile_mode"]) if config["compile"] else objective
    return forward if world() == 1 else DistributedDataParallel(forward, gradient_as_bucket_view=True)
