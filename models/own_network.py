"""A user's own network, given from Python, under the contracts of the project's models."""

import inspect
from typing import Any

from torch import Tensor, nn

from common.errors import UserError
from models.classifier.classifier import Classifier
from models.network import Network
from models.velocity_model import VelocityModel


def forward_takes(network: nn.Module) -> tuple[bool, str]:
    """Return whether a network's forward takes label=, and what else it cannot do without, in words; "" for nothing."""
    parameters = list(inspect.signature(network.forward).parameters.values())
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    label = any(p.name == "label" or p.kind is p.VAR_KEYWORD for p in parameters[1:])
    return label, ", ".join(needed) if len([name for name in needed[1:] if name != "label"]) else ""


class Own(Network):
    """Holds a network of any class; what is saved has its own names, so that its load_state_dict takes them."""

    def __init__(self, network: nn.Module, num_classes: int = 0):
        super().__init__()
        self.network, self.num_classes = network, num_classes

    @property
    def named(self) -> nn.Module:
        return self.network

    def state_dict(self, *places: Any, **named: Any) -> Any:
        return self.network.state_dict(*places, **named)

    def load_state_dict(self, *weights: Any, **named: Any) -> Any:
        return self.network.load_state_dict(*weights, **named)


class OwnNetwork(Own, VelocityModel):
    """A network of the unified input, with a label if it knows classes. UserError for a forward that takes others."""

    def __init__(self, network: nn.Module, num_classes: int = 0):
        super().__init__(network, num_classes)
        name, (self.takes_label, others) = type(network).__name__, forward_takes(network)
        if others:
            raise UserError(
                f"the network {name} takes ({others}), and a run gives it one input, a state with its two times behind it; "
                "write forward(self, unified_input, label=None), and in it x, times = "
                "split_unified_flow_matching_input(unified_input), of models.inputs, times (B, 2) being r and t"
            )
        if num_classes and not self.takes_label:
            raise UserError(
                f"conditional=true gives the network labels, and the forward of {name} takes none; add label=None to it, "
                f"classes 0 to {num_classes - 1} and {num_classes} for a hidden one, or leave conditional out"
            )

    def forward(self, unified_input: Tensor, label: Tensor | None = None) -> Tensor:
        return self.network(unified_input, label=label) if self.takes_label else self.network(unified_input)


class OwnClassifier(Own, Classifier):
    """A network of images (B, C, H, W) to logits (B, num_classes)."""

    def features(self, images: Tensor) -> Tensor:
        raise UserError(
            f"{type(self.network).__name__} states no features to compare images by; judge them by a classifier of "
            "configs/model/"
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)
