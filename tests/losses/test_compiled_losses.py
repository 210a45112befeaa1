"""Every objective compiles as one graph by every derivative engine, dropout and dropped labels included."""

from pathlib import Path

import pytest
import torch

from configuration.compose import CONFIG_DIR, compose_config, resolved
from dataloaders.synthetic import KMeans
from evaluation.closed_forms import ExactFlow
from evaluation.parts import build_objective
from losses.flow_map_objective import FlowMapObjective
from training.ema import ConstantEMA
from training.state import averaged_objective

ENGINES = ["func", "separate", "finite_difference"]
OTHERS = ("cross_entropy", "reflow", "distillation")  # a classifier's, and those that need a teacher
FILES = [path for path in sorted(Path(CONFIG_DIR, "loss").glob("*.yaml")) if path.stem not in OTHERS]
CASES = [
    (path.stem, engine)
    for path in FILES
    for engine in (ENGINES if "\njvp:" in path.read_text() else [""])
    if (path.stem, engine) != ("terminal_velocity", "separate")  # it takes its derivative with a graph
]
TAUGHT = ("shortcut loss.teacher=exact", "")


@pytest.mark.slow
@pytest.mark.parametrize("loss, engine", [*CASES, TAUGHT])
def test_the_whole_step_is_one_graph_and_equals_the_eager_one(loss: str, engine: str) -> None:
    words = ["run_name=x", *f"loss={loss}".split(), *[f"loss.jvp={engine}"] * bool(engine)]
    hides = "\nlabel_dropout:" in Path(CONFIG_DIR, f"loss/{loss.split()[0]}.yaml").read_text()
    words += ["loss.label_dropout=0.5"] * hides
    words += ["model.width=16", "model.depth=1", "model.dropout=0.3", "conditional=true"]
    torch._dynamo.reset()
    objective = build_objective(resolved(compose_config(words)), torch.device("cpu")).train()
    if isinstance(objective, FlowMapObjective) and objective.teacher:
        flow = ExactFlow(KMeans().mixture, 1.0, objective.path)
        objective.follow(lambda z, r, label: flow(z, r))
    teacher = averaged_objective(objective, ConstantEMA()) if objective.needs_teacher else None
    x0, x1 = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(0))
    batch = objective.draw(x0, x1, torch.arange(16) % 3, torch.Generator().manual_seed(0))

    def gradients(forward: torch.nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(1)
        value = forward(batch, teacher)["loss"]
        used = [p for p in objective.parameters() if p.requires_grad]
        return [value, *torch.autograd.grad(value, used, allow_unused=True, materialize_grads=True)]

    ours, theirs = gradients(torch.compile(objective, fullgraph=True, backend="aot_eager")), gradients(objective)
    for compiled, eager in zip(ours, theirs, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-4, atol=1e-6)
