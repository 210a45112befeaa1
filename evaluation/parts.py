"""The objects that sampling and scoring need, built from a resolved configuration."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.device import weight_layout
from common.errors import UserError
from common.seeds import stream_seed
from common.stores import fetched
from configuration.build import build
from configuration.checks import check_fits
from configuration.signatures import derives
from configuration.stored import stored_config
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from evaluation.closed_forms import ExactFlow
from evaluation.conditional_flow import ConditionalFlow
from evaluation.guided_flows import GuidedFlow
from evaluation.metrics.base_metric import Decode, EvaluationInputs
from evaluation.metrics.oracles import KnownFlow, known_flow
from helpers_cfg import guided
from losses.objective import FlowObjective, Objective
from models.conditioned import Conditioned, widened
from models.network import Network
from run_files.checkpoint import load_checkpoint
from solvers.base_solver import Sampler


def build_dataset(config: dict[str, Any], device: torch.device) -> FlowDataset:
    """Return the data on `device`, its epoch cut to limit_data draws if asked."""
    dataset: FlowDataset = build(config["dataloaders"])
    if config.get("balanced"):
        dataset.balance()
    if config["limit_data"]:
        dataset.epoch_size = min(dataset.epoch_size, config["limit_data"])
    dataset.num_workers = config.get("num_workers", 0)
    return dataset.to(device)


def build_source(config: dict[str, Any], device: torch.device) -> Source:
    source: Source = build(config["source"])
    return source.to(device)


def build_solver(config: dict[str, Any]) -> Sampler:
    """Return the solver. UserError for one that needs Gaussian noise on another source."""
    solver: Sampler = build(config["solver"])
    if solver.gaussian_source and build_source(config, torch.device("cpu")).gaussian_std is None:
        raise UserError(
            f"solver={config['choices'].get('solver')} adds Gaussian noise as the source has it, and "
            f"source={config['choices']['source']} is no centred Gaussian; use solver=midpoint, or source=gaussian"
        )
    return solver


def build_network(config: dict[str, Any]) -> Network:
    """Return the model, which takes conditions where the run is conditional. UserError for one without state_shape."""
    data, node = config["dataloaders"], config["model"]
    shape = data.get("condition_shape") if config.get("conditional") else None
    if shape is None or derives(node["_target_"], "models.classifier.classifier.Classifier"):
        network: Network = build(node)
        return network
    if "state_shape" not in node:
        raise UserError(
            "conditions are further channels of the state that a model sees, and this one has no setting state_shape; use "
            "conditional=false, or a model that is made for a shape"
        )
    inner = build(node | {"state_shape": widened(data["state_shape"], shape)})
    return Conditioned(inner, data["state_shape"], shape)


def build_objective(config: dict[str, Any], device: torch.device) -> Objective:
    """Return the objective around a freshly initialised network, the same for the same seed on every rank.

    UserError for a network that cannot fit: four fp32 numbers for each weight, its average and the optimizer's two included.
    """
    with torch.device("meta"):
        weights = build_network(config).parameter_count()
    check_fits(f"the {weights:,} weights of this model", 16 * weights, "a smaller model")
    torch.manual_seed(stream_seed(config["seed"], "weights"))
    network = build_network(config)
    network.init_weights()
    objective: Objective = build(config["loss"], network=network).to(device, memory_format=weight_layout(device))
    if config.get("standardized") and isinstance(objective, FlowObjective):
        objective.standardise_by(**config["standardized"], state_shape=config["dataloaders"]["state_shape"])
    return objective


def sampled_flow(objective: Objective, config: dict[str, Any], device: torch.device) -> FlowObjective | None:
    """Return what evaluations sample, None for a classifier. UserError for a classifier under guidance."""
    if isinstance(objective, FlowObjective):
        return build_flow(objective, config, device)
    if config.get("guidance"):
        raise UserError("guidance steers samples, and a classifier makes none; leave guidance out")
    return None


def build_flow(objective: FlowObjective, config: dict[str, Any], device: torch.device) -> FlowObjective:
    """Return the objective under the configuration's guidance, if any. UserError for guidance this model cannot have.

    A guidance with a checkpoint gets the network in it as `guide`, and the exact flow of that one's data as `guide_flow`.
    """
    node = config.get("guidance")
    if not node:
        return objective
    parts: dict[str, Any] = {"network": objective.network}
    if "checkpoint" in node:
        parts["guide"], parts["guide_flow"] = load_guide(fetched(node["checkpoint"]), objective, config, device)
    return guided(objective, build({key: value for key, value in node.items() if key != "checkpoint"}, **parts))


def load_guide(
    path: Path, objective: FlowObjective, config: dict[str, Any], device: torch.device
) -> tuple[torch.nn.Module, ExactFlow | str]:
    """Return the EMA network of a checkpoint, frozen, and the exact flow of the data it learned, or why that is not known.

    UserError when its output does not mean what the objective's does.
    """
    payload = load_checkpoint(path)
    stored = stored_config(path, payload)
    guide = build_objective(stored, device)
    if not isinstance(guide, FlowObjective):
        raise UserError(f"guidance.checkpoint={path} holds a classifier; give a weaker model trained on the same data")
    what, remedy = "cannot guide this model", "give a weaker model trained on the same data with the same loss"
    check_agree(f"guidance.checkpoint={path} {what}", meaning(guide, stored), meaning(objective, config), remedy)
    load_network(guide.network, payload["ema"], path)
    flow: KnownFlow | str = "the truth of the data that the guide learned is not known in closed form"
    data = stored["dataloaders"]["_target_"]
    if derives(data, "dataloaders.synthetic.SyntheticDataset"):  # others would be read from disk
        cpu = torch.device("cpu")
        flow = known_flow(guide, build_dataset(stored, cpu), build_source(stored, cpu))
    if isinstance(flow, ConditionalFlow):
        flow = "the flow under guidance by conditions is not known exactly"
    if isinstance(flow, GuidedFlow):
        flow = "the guide's training has guidance in it, and the flow that results is not known exactly"
    return guide.network.eval().requires_grad_(False), flow


def meaning(objective: FlowObjective, config: dict[str, Any]) -> dict[str, Any]:
    """Return what must agree for two networks' outputs to be combined, by name."""
    return {
        "state shape": list(config["dataloaders"]["state_shape"]),
        "second_time": objective.second_time,
        "prediction": type(objective.prediction).__name__,
        "path": " ".join([type(objective.path).__name__, *(f"{k}={v}" for k, v in vars(objective.path).items())]),
        "kind of output": objective.learns,
        "standardization of the data": config.get("standardized"),
    }


def check_agree(what: str, theirs: dict[str, Any], ours: dict[str, Any], remedy: str) -> None:
    """Raise UserError, which begins with `what`, for the first fact of another model that is not this run's."""
    for name, value in theirs.items():
        if value != ours[name]:
            raise UserError(f"{what}: its {name} is {value}, here it is {ours[name]}; {remedy}")


def build_decoder(config: dict[str, Any], device: torch.device) -> Decode | None:
    """Return the VAE's decoder, from latent states to images in [-1, 1]; None where states are no latents."""
    return build(config["vae"]).to(device).decode if config.get("vae") else None


def evaluation_inputs(
    objective: Objective, config: dict[str, Any], device: torch.device, cache: Path, weights: str
) -> EvaluationInputs:
    """Return what the last evaluation of a run would judge the objective by; weights: which it has, in words."""
    return EvaluationInputs(
        objective, build_dataset(config, device), build_source(config, device), build_solver(config), config["seed"],
        dataset_key(config), cache, True, sampled_flow(objective, config, device), build_decoder(config, device), weights,
    )  # fmt: skip


def dataset_key(config: dict[str, Any]) -> str:
    """Return a name of the data's settings and of the weights that decode it: part of every cache key."""
    vae = config.get("vae") or {}
    files = sorted(Path(vae["path"]).glob("*.safetensors")) if "path" in vae else []
    settings = json.dumps([config["dataloaders"], vae, [file_hash(file) for file in files]], sort_keys=True)
    return f"{config['choices']['dataloaders']}-{hashlib.blake2s(settings.encode(), digest_size=8).hexdigest()}"


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2s).hexdigest()


def load_network(network: torch.nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Copy saved weights into a network. UserError when they are of another shape or kind, or not finite."""
    check_weights(network.state_dict(), weights, path)
    network.load_state_dict(weights)


def check_weights(ours: Mapping[str, torch.Tensor], weights: dict[str, Any], path: Path) -> None:
    """Raise UserError when weights have other names, shapes or kinds than a network's, or are not finite."""
    wrong = [name for name, value in ours.items() if name not in weights or weights[name].shape != value.shape]
    wrong += [name for name in weights if name not in ours]
    if wrong:
        raise UserError(f"{path} holds another network than this model ({wrong[0]} differs); use the settings of its run")
    for name, value in weights.items():
        if value.is_floating_point() != ours[name].is_floating_point():
            raise UserError(f"{path} holds {name} as {value.dtype}, and this model has {ours[name].dtype}; use another save")
        if not value.isfinite().all():
            raise UserError(f"{path} holds weights that are NaN or infinite (in {name}); use an earlier save")
