"""A learning rate carried from a narrow model to a wide one, by the maximal update parametrisation (muP).

Tensor Programs V (Yang et al. 2022, arXiv 2203.03466), table 3, of Adam: a layer whose inputs grow in number by a factor m
takes 1/m of the learning rate and starts with weights 1/sqrt(m) as large, 1/m where its outputs do not grow with them; what
else there is, biases included, starts as large as in the narrow model. So that every layer's outputs change by as much in a
step at any width (visualizers/coordinates.py), and the best rate stays.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.seeds import stream_seed
from configuration.nodes import nearest
from evaluation.parts import build_network
from models.network import Network

GROWING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers whose weights are (outputs, inputs, ...)


def base_network(config: Mapping[str, Any]) -> Network | None:
    """Return the model with the settings of `base_model` in place of its own, at its start; None where that is not set.

    UserError for settings that the model has not, for another optimizer than Adam's, and for another engine than torch.
    """
    base, node = config.get("base_model"), config["model"]
    if not base:
        return None
    unknown = next((key for key in base if key not in node), None)
    if unknown is not None:
        raise UserError(f"base_model={{{unknown}: ...}} is no setting of this model{nearest(unknown, list(node))}")
    if config["choices"]["optimizer"] not in ("adamw", "adam") or config.get("engine") == "mlx":
        raise UserError("base_model carries a learning rate of Adam by torch; use optimizer=adamw or adam, and engine=torch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config["seed"], "weights"))
        network = build_network({**config, "model": {**node, **base}})
        network.init_weights()
    return network


def growth(network: nn.Module, base: nn.Module) -> dict[str, tuple[float, float]]:
    """Return by how much the inputs and the outputs of each layer's weight are more than those of the base.

    UserError for a base of other layers.
    """
    narrow, found = dict(base.named_parameters()), dict[str, tuple[float, float]]()
    for name, module in network.named_modules():
        if not isinstance(module, GROWING):
            continue
        weight, key = module.weight, f"{name}.weight".lstrip(".")
        if key not in narrow or narrow[key].ndim != weight.ndim:
            raise UserError(f"base_model has no layer {name}, and this model has; give widths alone, such as {{width: 64}}")
        (out, into), (base_out, base_in) = weight.shape[:2], narrow[key].shape[:2]
        found[key] = into / base_in, out / base_out
    return found


@torch.no_grad()
def scale_start(network: nn.Module, base: nn.Module) -> None:
    """Give each layer's weights and biases the size that follows from the base's."""
    ours, theirs = dict(network.named_parameters()), dict(base.named_parameters())
    for name, (into, out) in growth(network, base).items():
        bias = name.removesuffix("weight") + "bias"
        for key, factor in ((name, 1 / into if out == 1 else into**-0.5), (bias, 1.0)):
            if key in ours and (size := root_mean_square(ours[key])):
                ours[key].mul_(factor * root_mean_square(theirs[key]) / size)


def root_mean_square(weight: torch.Tensor) -> float:
    """Return it as the CPU finds it, so that equal weights have the same on every device."""
    return float(weight.cpu().square().mean().sqrt())


def weight_groups(network: nn.Module, base: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Return the weights to train as an optimizer takes them, those of one learning rate together, the full one first."""
    factors = {name: 1 / into for name, (into, _) in growth(network, base).items()}
    trained = [(factors.get(name, 1.0), weight) for name, weight in network.named_parameters() if weight.requires_grad]
    kinds = sorted({factor for factor, _ in trained}, key=lambda factor: (factor != 1.0, -factor))
    return [{"params": [weight for own, weight in trained if own == kind], "lr": lr * kind} for kind in kinds]
