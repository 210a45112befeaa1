"""From a resolved configuration to the objects of a run."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

from common.device import gradient_scaler, pick_device, set_numerics
from common.distributed import rank, rank0_first, world
from common.errors import UserError
from common.own_objects import is_own
from common.stores import fetched, is_address, local_copy
from configuration.build import build
from configuration.compose import typed_keys
from configuration.nodes import RECOMMENDATIONS
from configuration.stored import stored_config
from dataloaders.base_dataloaders import FlowDataset
from evaluation import parts
from evaluation.metrics.base_metric import EvaluationInputs
from evaluation.teacher import give_teacher
from losses.objective import FlowObjective, Objective
from models.layers import recompute_blocks
from run_files.checkpoint import load_checkpoint
from run_files.checkpoint_folder import CheckpointFolder
from run_files.run_folder import run_folder_of, saves_of
from run_files.trackers import NullTracker, tracker_from_config
from training.ema import EMA
from training.evaluation_budget import fit_samples
from training.records import Records, SilentRecords
from training.run import LogSettings, LoopSettings, Run
from training.sharding import is_sharded, shard
from training.state import TrainState, averaged_objective
from training.step_hooks import SkipNonFinite, StepHook
from training.width_transfer import base_network, scale_start, weight_groups

if TYPE_CHECKING:
    from engines.mlx_engine import MlxEngine

T = TypeVar("T")
MOMENT_ROWS = 2000


def start_weights(objective: Objective, path: Path) -> None:
    """Begin at the EMA weights of another run (init_from)."""
    payload = load_checkpoint(path)
    parts.load_network(objective.network, payload["ema"], path)
    one_pair_of_times = isinstance(objective, FlowObjective) and objective.learns == "generator"  # 0 and 1
    if payload["second_time"] != objective.second_time and not one_pair_of_times:
        print(
            f"note: {path} was trained with second_time={payload['second_time']}, this objective reads its second time as "
            f"{objective.second_time}; a flow trained with loss.second_time=state is the better start"
        )


def stored_start(place: str) -> Path:
    """Return where the weights lie that a run began at, which a command to go on does not say and so does not fetch."""
    return local_copy(place) if is_address(place) else Path(place)


def adopt_model(config: dict[str, Any], path: Path) -> None:
    """Set the network as that of init_from but for what was typed. UserError when that holds another kind of model."""
    stored = stored_config(path, load_checkpoint(path))
    kind, wanted = stored["choices"]["model"], config["choices"]["model"]
    if kind != wanted:
        raise UserError(f"init_from={path} holds model={kind}, this run has model={wanted}; add model={kind}")
    theirs, ours = ((c["loss"].get("prediction") or {}).get("_target_", "") for c in (stored, config))
    if theirs and ours and theirs != ours:
        raise UserError(
            f"init_from={path} predicts by {theirs.rpartition('.')[2]}, this run by {ours.rpartition('.')[2]}: the same "
            "numbers would mean another thing; choose the same loss/prediction"
        )
    theirs, ours = (bool(c["dataloaders"].get("standardize")) for c in (stored, config))
    if theirs != ours:
        print(
            f"note: {path} learned {'' if theirs else 'un'}standardized data, and this run's are "
            f"{'' if ours else 'un'}standardized; dataloaders.standardize={str(theirs).lower()} is the better start"
        )
    typed = typed_keys(config["overrides"])
    for key, value in () if is_own(config["model"]) else stored["model"].items():
        free = key in config["model"] and key not in (RECOMMENDATIONS, "state_shape", "num_classes", "augment_dim")
        if free and f"model.{key}" not in typed and config["model"][key] != value:
            print(f"note: model.{key}={value}, as in {path} (the default here is {config['model'][key]})")
            config["model"][key] = value


def check_compiles_recomputed(config: dict[str, Any]) -> None:
    """Raise UserError for blocks whose dropout torch cannot compile, as what is computed again must find its masks."""
    if config["compile"] and config["model"].get("dropout"):
        raise UserError(
            f"compile=true cannot compute blocks with model.dropout={config['model']['dropout']} again; leave one of "
            "checkpoint_activations and compile out, or set model.dropout=0"
        )


def assemble(config: dict[str, Any]) -> Run:
    """Return every part of the run, on its device, at its start or where its newest save left it. Writes nothing."""
    # Pick the device, and complete the configuration.
    by_mlx = config.get("engine") == "mlx"
    device = pick_device("cpu" if by_mlx else config["device"])  # MLX's device is its own, and torch draws on the CPU
    set_numerics(device, config["deterministic"])
    if not config["dataloaders"].get("standardize"):
        config.pop("standardized", None)  # resume=force may have turned it off
    if config["init_from"] and not config["resume"]:
        adopt_model(config, fetched(config["init_from"]))
    # Build the network in its objective, the solver and the evaluator, which must go together.
    objective, evaluator = parts.build_objective(config, device), build(config["evaluation"])
    solver = parts.build_solver(config)
    evaluator.check(objective)
    evaluator.check_monitor(config["monitor"])
    if by_mlx:
        check_has_mlx(objective)
    if isinstance(objective, FlowObjective):
        solver.check(objective)
    if config.get("checkpoint_activations"):  # which is in no configuration of before it
        recompute_blocks(objective.network)
        check_compiles_recomputed(config)
    # Take up the newest save where there is one, then build the data and what evaluations need.
    records, loop = assemble_records(config), settings_of(LoopSettings, config)
    state = assemble_state(objective, records.checkpoints, config, device)
    dataset, source = assemble_data(state, config, device), parts.build_source(config, device)
    give_teacher([state.objective, state.ema_objective], config, dataset, source, device)
    inputs = EvaluationInputs(
        state.ema_objective, dataset, source, solver, loop.seed, parts.dataset_key(config),
        Path(config["output_dir"]) / "cache", False, parts.sampled_flow(state.ema_objective, config, device),
        parts.build_decoder(config, device),
    )  # fmt: skip
    # Join all to a run.
    hook = (SkipNonFinite if loop.on_nan == "skip" else StepHook)(loop.log_every)
    callbacks = [build(node) for node in config["callbacks"].values() if node and rank() == 0]
    run = Run(
        loop, settings_of(LogSettings, config | config["log"]), device, dataset, source, state,
        forward_of(objective, config | {"compile": config["compile"] and not by_mlx}), evaluator, inputs, records, hook,
        callbacks, rank(), world(), engine=assemble_engine(state, config) if by_mlx else None,
    )  # fmt: skip
    state.schedule.count_in_steps(run.steps_per_epoch)
    if not config["resume"]:
        fit_samples(run, config)
    return run


def check_has_mlx(objective: Objective) -> None:
    """Raise UserError for an objective, or a network, that engine=mlx does not have."""
    from engines.mlx_engine import check_parts  # imports MLX

    check_parts(objective)


def assemble_engine(state: TrainState, config: dict[str, Any]) -> "MlxEngine":
    """Return MLX at the state of torch's objects, whose steps it takes."""
    from engines.mlx_engine import EngineSettings, MlxEngine

    settings = settings_of(EngineSettings, config)
    return MlxEngine(state.objective, state.ema_objective.network, state.optimizer, settings)


def settings_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass whose fields are the values of the same names."""
    return kind(**{one.name: values[one.name] for one in fields(kind) if one.name in values})  # type: ignore[arg-type]


def assemble_records(config: dict[str, Any]) -> Records:
    """Return the run's folder, saves and tracker; those of the ranks but the first write nothing."""
    in_background = {"auto": None, "always": True, "never": False}[config["async_save"]]
    place, arch = Path(config["output_dir"]), config["choices"]["model"]
    checkpoints = CheckpointFolder(place, arch, config["run_name"], config["keep_saves"], in_background)
    kind, tracker = (Records, tracker_from_config(config["trackio"])) if rank() == 0 else (SilentRecords, NullTracker())
    return kind(config, run_folder_of(config), checkpoints, tracker)


def assemble_state(
    objective: Objective, checkpoints: CheckpointFolder, config: dict[str, Any], device: torch.device
) -> TrainState:
    """Return the objective with its average, optimizer and schedule, from the newest save where there is one."""
    going_on, base = bool(config["resume"] and checkpoints.saves()), base_network(config)
    if config["init_from"] and not going_on:
        start_weights(objective, stored_start(config["init_from"]) if config["resume"] else fetched(config["init_from"]))
    elif base is not None:
        scale_start(objective.network, base)
    ema: EMA = build(config["ema"])
    averaged, found = averaged_objective(objective, ema), checkpoints.newest() if going_on else None
    if found is not None:
        for part, name in ((objective, "network"), (averaged, "ema")):
            parts.load_network(part.network, found[1][name], found[0])
    if config.get("sharding") == "full" and world() > 1:
        check_shards(objective, ema, config)
        for part in (objective, averaged):
            shard(part.network)
    weights: list[Any] = [p for p in objective.network.parameters() if p.requires_grad]
    if base is not None:
        weights = weight_groups(objective.network, base, config["optimizer"]["lr"])
    optimizer = build(config["optimizer"], params=weights)
    for settings in optimizer.param_groups:
        settings["initial_lr"] = settings["lr"]
    if device.type == "mps":  # its fused kernels ignore what loss scaling tells them: then it asks before each step
        optimizer._step_supports_amp_scaling = False
    state = TrainState(
        objective, averaged, ema, optimizer, build(config["schedule"]),
        gradient_scaler(device, config["precision"]),
        others=[(other, other.average_of(objective.network)) for other in ema.others()],
    )  # fmt: skip
    if found is not None:
        resume_state(state, *found, config)
    elif config["resume"]:
        check_same_arch(checkpoints)
        print(f"{config['run_name']} ended before its first save; beginning it again")
    return state


def assemble_data(state: TrainState, config: dict[str, Any], device: torch.device) -> FlowDataset:
    """Return the data; where they are to be standardised, their moments become part of the objective and of `config`."""
    with rank0_first(bool(config["dataloaders"].get("download"))):
        dataset = parts.build_dataset(config, device)
    if dataset.standardize and "standardized" not in config:
        config["standardized"] = moments(dataset)
        for flow in (state.objective, state.ema_objective):
            assert isinstance(flow, FlowObjective)
            flow.standardise_by(**config["standardized"], state_shape=dataset.state_shape)
    return dataset


def moments(dataset: FlowDataset) -> dict[str, list[float]]:
    """Return mean and standard deviation of each channel of images or dimension of vectors in training; a constant has 1.

    Of all rows in memory, of MOMENT_ROWS read from disk.
    """
    part = dataset.training_part(MOMENT_ROWS)
    assert part is not None, "only data that are stored can be standardised"
    numbers = part[0].double().transpose(0, 1).flatten(1)
    std = numbers.std(1, correction=0)
    return {"mean": numbers.mean(1).tolist(), "std": torch.where(std > 0, std, 1.0).tolist()}


def check_shards(objective: Objective, ema: EMA, config: dict[str, Any]) -> None:
    """Raise UserError for what weights that are shared out over the ranks cannot do."""
    for reason, holds in (
        ("compile=true", config["compile"]), ("on_nan=skip", config["on_nan"] == "skip"),
        (f"loss={config['choices']['loss']}, whose target is the average's own answer,", objective.needs_teacher),
        (f"ema={config['choices']['ema']}, which stores several averages", bool(ema.snapshots)),
        ("a network with buffers that training changes, such as batch norm", any(
            name in objective.state_dict() for name, _ in objective.named_buffers())),
    ):  # fmt: skip
        if holds:
            raise UserError(f"sharding=full does not go with {reason}; leave one of them out")


def check_same_arch(checkpoints: CheckpointFolder) -> None:
    """Raise UserError when a run that is to begin again has saves, of another model."""
    place = checkpoints.output_dir / "ckpts"
    for save in saves_of(checkpoints.output_dir, checkpoints.run_name):
        model = save.relative_to(place).as_posix().removesuffix(f"/{save.name}").removesuffix("/archive")
        raise UserError(
            f"run {checkpoints.run_name} was trained with model={model} and cannot go on with "
            f"model={checkpoints.folder.relative_to(place)}; start another run_name"
        )


def resume_state(state: TrainState, path: Path, payload: dict[str, Any], config: dict[str, Any]) -> None:
    """Take up a save, but for the optimizer's settings, which resume=force may have changed. UserError for another's."""
    before = payload["config"].get("devices", 1)
    if before != config["devices"]:
        print(
            f"note: the run goes on with {config['devices']} devices instead of {before}: rows of a fixed data set come in "
            "the order of one sitting, but noise, times and data that is drawn afresh are other draws"
        )
    for ema, average in state.others:
        name = f"ema_{ema.lengths[0]:g}"
        if not isinstance(payload.get(name), dict):
            lacking = f"{path} holds no average of ema.lengths={ema.lengths[0]:g}"
            raise UserError(f"{lacking}; leave ema as it was, or start another run_name")
        parts.load_network(average, payload[name], path)
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
    """Return the objective, or its compiled form: the whole loss is compiled, never the network alone, once for whole
    batches and once for the last, smaller one of an epoch: a graph for any number of rows takes longer to make and to run.

    With several ranks their gradients are averaged in its backward pass; all ranks wait here for each other. Buffers
    that a save holds may change in training, as a batch norm's statistics do: then rank 0's are every rank's at each step.
    """
    forward = torch.compile(objective, mode=config["compile_mode"], dynamic=False) if config["compile"] else objective
    if world() == 1 or is_sharded(objective.network):
        return forward
    saved = objective.state_dict().keys()
    changing = any(name in saved for name, _ in objective.named_buffers())
    return DistributedDataParallel(forward, forward_sync_buffers=changing, gradient_as_bucket_view=True)
