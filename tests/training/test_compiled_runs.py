"""compile=true trains as eager does, goes on from a save, and is what ranks share; in the suite without inductor."""

from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

import launcher
from backends.submission import prepare
from run_files.checkpoint import load_checkpoint
from training.assemble import assemble
from training.loop import after_step, epoch_groups, train_step

real = torch.compile
MODELS = {
    "mlp": ["loss=meanflow", "dataloaders=kmeans", "dataloaders.epoch_size=320", "model.width=16", "model.depth=1"],
    "cnn": ["dataloaders=digits", "model.width=8", "model.inner_width=16", "model.inner_blocks=1", "model.embedding=16"],
    "unet_small": ["dataloaders=digits", "model.width=8", "model.multipliers=[1]", "model.embedding=16"],
    "dit_s": ["loss=meanflow", "dataloaders=digits", "model.hidden_size=16", "model.depth=1", "model.heads=2"],
}
WORDS = [
    "run_name=x", "device=cpu", "trackio.enabled=false", "callbacks=none", "evaluation=loss_only",
    "conditional=true", "loss.label_dropout=0.3", "model.dropout=0.2", "batch_size=16",
    "schedule=constant",
]  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and differentiated as ever, and run by torch's own kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))


def losses(place: Path, *words: str) -> list[float]:
    """Twenty steps, and the sum of the weights after them."""
    run, found = assemble(prepare([*WORDS, f"output_dir={place}", *words])), []
    for group in islice(epoch_groups(run), 20):
        values = train_step(run, group)
        found.append(values["loss"].item())
        after_step(run, values)
    return [*found, *(weight.norm().item() for weight in run.state.trainable())]


@pytest.mark.parametrize("model", MODELS)
def test_twenty_steps_are_those_of_eager(model, tmp_path):
    words = [f"model={model}", *MODELS[model]]
    eager = losses(tmp_path, *words)
    compiled = losses(tmp_path, *words, "compile=true")
    assert len(eager) > 20 and compiled == pytest.approx(eager, rel=1e-4)


def test_a_compiled_run_goes_on_from_its_save(tmp_path):
    words = [*WORDS[1:], *MODELS["mlp"], "compile=true", f"output_dir={tmp_path}"]
    launcher.run("run_name=whole", *words, "max_steps=4")
    launcher.run("run_name=parts", *words, "max_steps=2")
    launcher.run("run_name=parts", "resume=true", f"output_dir={tmp_path}", "max_steps=4", "callbacks=none")
    whole, parts = (load_checkpoint(tmp_path / f"ckpts/mlp/{name}_last.pt") for name in ("whole", "parts"))
    assert parts["step"] == 4 and all(torch.equal(value, parts["ema"][name]) for name, value in whole["ema"].items())


def test_no_graph_is_made_for_any_number_of_rows(tmp_path, monkeypatch):
    """Three batches of 16 rows and one of 8: two graphs, whose inputs are tensors alone, no sizes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append({type(value) for value in inputs})
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda objective, mode, **given: real(objective, backend=backend, **given))
    words = [*MODELS["mlp"], "dataloaders.epoch_size=56", "compile=true", f"output_dir={tmp_path}"]
    run = assemble(prepare([*WORDS, *words]))
    for group in islice(epoch_groups(run), 4):
        after_step(run, train_step(run, group))
    assert len(graphs) == 2 and all(issubclass(kind, torch.Tensor) for kinds in graphs for kind in kinds)
