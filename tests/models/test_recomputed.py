"""Blocks that compute their activations again: the same loss and gradient, fewer numbers kept, masks of dropout included."""

from pathlib import Path
from typing import Any

import pytest
import torch

from backends.submission import prepare
from common.errors import UserError
from configuration.compose import compose_config, resolved
from dev.contestant import LiveBytes
from evaluation.parts import build_objective
from losses.objective import FlowObjective
from models.layers import recompute_blocks
from training.assemble import assemble

MODELS = {
    "unet_small": ["model.width=8", "model.multipliers=[1,2]", "model.embedding=8", "model.attention_up_to=4"],
    "dit_s": ["model.hidden_size=16", "model.depth=3", "model.heads=2"],
}
ENGINES = {"meanflow": ["func", "separate", "finite_difference"], "terminal_velocity": ["func", "finite_difference"]}
LOSSES = {"mse": ["loss=mse"]} | {
    f"{loss} {engine}": [f"loss={loss}", f"loss.jvp={engine}"] for loss, engines in ENGINES.items() for engine in engines
}


def objective_of(*words: str) -> FlowObjective:
    config = resolved(compose_config(["run_name=x", "dataloaders=digits", "model.dropout=0.3", "conditional=true", *words]))
    objective = build_objective(config, torch.device("cpu")).train()
    assert isinstance(objective, FlowObjective)
    with torch.no_grad():
        for parameter in objective.parameters():  # outputs that start at zero have no derivative
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return objective


def gradients(objective: FlowObjective, forward: Any = None, rows: int = 8) -> list[torch.Tensor]:
    """The loss of a batch and the gradient of every weight."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, rows, 1, 8, 8, generator=generator)
    batch = objective.draw(x0, x1, torch.arange(rows) % 10, generator)
    torch.manual_seed(1)
    value = (objective if forward is None else forward)(batch)["loss"]
    return [
        value.detach(),
        *torch.autograd.grad(value, list(objective.parameters()), allow_unused=True, materialize_grads=True),
    ]


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The norm of the difference of losses and gradients, over that of theirs."""
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (ours, theirs))
    assert other.norm() > 1
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_activations_that_are_kept(model: str, loss: str) -> None:
    objective = objective_of(f"model={model}", *MODELS[model], *LOSSES[loss])
    kept = gradients(objective)
    recompute_blocks(objective.network)
    assert difference(gradients(objective), kept) < 1e-6


@pytest.mark.parametrize(
    ("model", "loss"), [("unet_small", "mse"), ("dit_s", "meanflow func"), ("dit_s", "meanflow finite_difference")]
)
def test_fewer_numbers_are_kept(model: str, loss: str) -> None:
    most = []
    for recomputed in (False, True):
        objective = objective_of(f"model={model}", *MODELS[model], *LOSSES[loss])
        if recomputed:
            recompute_blocks(objective.network)
        with LiveBytes() as memory:
            gradients(objective, rows=32)
        most.append(memory.most)
    assert most[1] < 0.75 * most[0]


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"checkpoint_activations=true computes the blocks of a U-Net.*has none"):
        recompute_blocks(objective_of("model=cnn").network)


def test_dropout_is_not_compiled_with_it(tmp_path: Path) -> None:
    words = ["run_name=x", f"output_dir={tmp_path}", "dataloaders=digits", "model=dit_s", *MODELS["dit_s"], "compile=true"]
    with pytest.raises(UserError, match=r"compile=true cannot compute blocks with model.dropout=0.1 again; leave one"):
        assemble(prepare([*words, "checkpoint_activations=true", "model.dropout=0.1", "device=cpu"]))


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    objective = objective_of("model=dit_s", *MODELS["dit_s"], *LOSSES["meanflow func"], "model.dropout=0", "model.depth=1")
    kept = gradients(objective)
    recompute_blocks(objective.network)
    again = gradients(objective, torch.compile(objective, fullgraph=True, backend="aot_eager"))
    assert difference(again, kept) < 1e-4
