"""Whose velocity an objective learns a map of, as loss.teacher says: the exact one of its data, or a trained flow's."""

from typing import Any

import torch

from common.errors import UserError
from common.seeds import fork_generators
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.sources import Source
from evaluation.metrics.oracles import known_flow
from evaluation.parts import check_agree, meaning
from evaluation.sample import load
from losses.flow_map_objective import FlowMapObjective, Velocity
from losses.meanflow_loss import MeanFlowLoss
from losses.objective import FlowObjective, Objective
from losses.world import EXACT


def give_teacher(
    objectives: list[Objective], config: dict[str, Any], dataset: FlowDataset, source: Source, device: torch.device
) -> None:
    """Give objectives of one configuration the velocity of its teacher, if it names one.

    UserError where the exact flow is not known, or where the checkpoint's flow is one of other states.
    """
    taught = [one for one in objectives if isinstance(one, FlowMapObjective) and one.teacher is not None]
    if not taught:
        return
    first = taught[0]
    exact = first.teacher == EXACT
    velocity = exact_velocity(first, dataset, source, device) if exact else learned_velocity(first, config, device)
    for objective in taught:
        objective.follow(velocity)


def exact_velocity(objective: FlowObjective, dataset: FlowDataset, source: Source, device: torch.device) -> Velocity:
    """Return the velocity of the data's own flow, or of each class's, in fp32. UserError where it is not known."""
    flow = known_flow(objective, dataset, source)
    if isinstance(flow, str):
        without = "" if objective.marginals_only else ", or leave loss.teacher out"
        raise UserError(f"loss.teacher=exact: {flow}; give a trained flow's checkpoint{without}")
    return flow.plain.to(device, torch.float32)


def learned_velocity(objective: FlowMapObjective, config: dict[str, Any], device: torch.device) -> Velocity:
    """Return the velocity of a checkpoint's EMA network, frozen. UserError where it does not fit this run."""
    assert objective.teacher is not None
    with fork_generators(device):  # building reseeds torch's own
        model = load(objective.teacher, device.type)
    if not model.objective.learns_velocity:
        raise UserError(f"loss.teacher={objective.teacher} learned no velocity at an instant; give a flow, as of loss=mse")
    if isinstance(objective, MeanFlowLoss) and objective.scale != 1 and not model.objective.label_dropout:
        raise UserError(
            f"loss.teacher={objective.teacher} was trained with label_dropout=0 and knows no velocity of a hidden label, "
            "as loss/guidance asks for; give a flow trained with loss.label_dropout above 0, or leave loss/guidance out"
        )
    what, theirs = f"loss.teacher={objective.teacher} is a flow of other states", flow_of(model.objective, model.config)
    check_agree(what, theirs, flow_of(objective, config), "give a flow trained with the same")
    data, own = model.config["choices"]["dataloaders"], config["choices"]["dataloaders"]
    if data != own:
        print(f"note: loss.teacher={objective.teacher} learned dataloaders={data}, and this run draws its states from {own}")
    return model.objective.velocity


def flow_of(objective: FlowObjective, config: dict[str, Any]) -> dict[str, Any]:
    """Return by name what must agree for one objective to learn the map of another's velocity."""
    shared = meaning(objective, config)
    found = {what: shared[what] for what in ("state shape", "path", "standardization of the data")}
    labels = {"number of classes": objective.network.num_classes, "shape of conditions": objective.network.condition_shape}
    return found | labels | {"noise": config["source"]}
