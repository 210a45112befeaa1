"""Experiment: a run of objects given from Python is the run that a command line would have made of files."""

import copy
import functools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import launcher
from common.own_objects import makers
from common.seeds import stream_seed
from configuration.build import build
from configuration.compose import compose_config, resolved
from evaluation.sample import load
from experiment import Experiment
from losses.flow_matching_loss import FlowMatchingLoss
from losses.objective import FlowBatch, FlowObjective
from models.inputs import split_unified_flow_matching_input
from run_files.checkpoint import load_checkpoint
from scripts import sample
from solvers.runge_kutta import Euler
from training.run import Callback, Run

WORDS = (
    "trackio.enabled=false", "device=cpu", "evaluation=loss_only", "evaluation.samples=16", "evaluation.final_samples=64",
    "log_every=2", "~callbacks.pictures", "schedule=constant", "batch_size=64",
)  # fmt: skip
CPU = torch.device("cpu")


def points(rows: int = 400) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(1)) + 1


class Net(nn.Module):
    """A network that knows nothing of this project but its input."""

    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.1), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, unified: Tensor) -> Tensor:
        x, times = split_unified_flow_matching_input(unified)
        return self.layers(torch.cat([x, times], 1))


class Rows(Dataset[dict[str, Any]]):
    """A data set as a user has it, items being dictionaries."""

    def __init__(self, shift: float = 0.0):
        self.shift = shift

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.full((2,), index / 60) + self.shift + torch.rand(2), "label": index % 3}


class Stop(Callback):
    """Presses Ctrl-C at a step."""

    def __init__(self, step: int):
        self.step = step

    def step_end(self, run: Run) -> None:
        if run.state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class Shades(nn.Module):
    """A velocity for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.shades = nn.Parameter(torch.zeros(3))

    def forward(self, unified: Tensor, **given: Tensor | None) -> Tensor:
        label = given["label"]
        shade = self.shades[2:] if label is None else self.shades[label]
        return shade.reshape(-1, *[1] * (unified.ndim - 1)).expand_as(unified[:, :-2])


class Steps(Callback):
    """Counts them."""

    def __init__(self) -> None:
        self.taken = 0

    def step_end(self, run: Run) -> None:
        self.taken += 1


def experiment(place: Path, *words: str, name: str = "x", **parts: Any) -> Experiment:
    given = {"network": Net(), "data": points(), "epochs": 2} | parts
    return Experiment(*WORDS, f"output_dir={place}", f"log.file={place / 'log.md'}", *words, run_name=name, **given)


def weights(path: Path | None) -> list[Tensor]:
    assert path is not None
    payload = load_checkpoint(path)
    return [*payload["network"].values(), *payload["ema"].values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_objects_train_bit_for_bit_as_the_files_they_stand_for(tmp_path):
    np.save(tmp_path / "x.npy", points().numpy())
    words = [*WORDS, f"output_dir={tmp_path}", "epochs=2", "model=mlp", "model.width=16", "optimizer.lr=1e-2"]
    launched = launcher.run("run_name=launched", "dataloaders=array", f"dataloaders.path={tmp_path / 'x.npy'}", *words)
    torch.manual_seed(stream_seed(0, "weights"))
    network = build(resolved(compose_config(["run_name=x", *words]))["model"])
    network.init_weights()
    before = copy.deepcopy(network.state_dict())
    own = experiment(tmp_path, "optimizer.lr=1e-2", network=network)
    result = own.fit()
    assert equal(weights(launched.checkpoint), weights(result.checkpoint)) and result == launched
    files = [{path.name for path in (tmp_path / "runs" / name).iterdir()} for name in ("launched", "x")]
    assert files[0] == files[1] and {"config.yaml", "metrics.jsonl", "status.json", "model.safetensors"} <= files[0]
    assert all(torch.equal(old, network.state_dict()[name]) for name, old in before.items())  # copies were trained
    assert launched.checkpoint is not None and torch.equal(own.sample(5), load(launched.checkpoint).sample(5))
    ema = load_checkpoint(own.checkpoint())["ema"]
    assert own.trained_network().state_dict().keys() == ema.keys() == network.state_dict().keys()
    assert own.evaluate()["eval/loss"] == result.scores["eval/loss"]
    with pytest.raises(Exception, match="evaluations takes a whole number of at least 1, or null, not 0"):
        own.sample(5, evaluations=0)


def test_an_interrupted_run_goes_on_in_another_session_that_is_given_the_same_objects(tmp_path, capsys):
    straight = experiment(tmp_path, name="straight").fit()
    own = experiment(tmp_path, callbacks=[Stop(4)])
    with pytest.raises(SystemExit):
        own.fit()
    assert load_checkpoint(own.checkpoint())["step"] == 4
    makers.clear()  # another session
    assert launcher.main(["run_name=x", f"output_dir={tmp_path}", "resume=true"]) == 1
    assert sample.main([f"ckpt={own.checkpoint()}", f"out={tmp_path / 's.npz'}"]) == 1
    said = capsys.readouterr().err
    assert said.count("of run x (Net) was given from Python and is in no file; give it again, as in Experiment(") == 2
    with pytest.raises(Exception, match=r"dataloaders.digest was '\w+' and is now '\w+'"):
        experiment(tmp_path, "resume=true", data=points() + 1).fit()
    again = experiment(tmp_path, "resume=true")
    assert equal(weights(again.fit().checkpoint), weights(straight.checkpoint))
    again.fit()
    assert "has done its 12 steps" in capsys.readouterr().out
    assert again.fit("epochs=3").state == "finished" and load_checkpoint(again.checkpoint())["step"] == 18


def test_a_data_set_streams_and_goes_on(tmp_path):
    straight = experiment(tmp_path, name="straight", data=Rows()).fit()
    own = experiment(tmp_path, data=Rows(), epochs=1)
    own.fit()
    assert equal(weights(own.fit("epochs=2").checkpoint), weights(straight.checkpoint))
    with pytest.raises(Exception, match="the data given are others than the run was made with"):
        experiment(tmp_path, data=Rows(1.0)).evaluate()


class Late(FlowObjective):
    def forward(self, batch: FlowBatch, teacher: FlowObjective | None = None) -> dict[str, Tensor]:
        v = self.predict(batch.unified_input, batch.input, batch.r, batch.label)
        return {"loss": self.weighted(v - batch.conditional_velocity)}


def plain(network: Any, x0: Tensor, x1: Tensor) -> Tensor:
    t = torch.rand(len(x0), 1)
    return (network((1 - t) * x0 + t * x1, t) - (x1 - x0)).square().mean()


def pair_map(network: Any, x0: Tensor, x1: Tensor) -> Tensor:
    return (network(x0, 0.0, 1.0) - (x1 - x0)).square().mean()


@pytest.mark.parametrize("loss", [
    "meanflow", Late, functools.partial(FlowMatchingLoss, second_time="state"), plain, pair_map, "instance"
])  # fmt: skip
def test_losses_of_every_form_train_and_evaluate_the_same_each_time(loss, tmp_path):
    if loss == "instance":
        config = resolved(compose_config(["run_name=x", "loss=mse", "model.width=8", "model.depth=1"]))
        loss = build(config["loss"], network=build(config["model"]))
    solver = Euler(2) if isinstance(loss, str) else "midpoint"
    own = experiment(tmp_path, "max_steps=3", loss=loss, solver=solver)
    result = own.fit()
    assert result.state == "finished" and own.sample(3).isfinite().all()
    torch.manual_seed(5)
    assert own.evaluate()["eval/loss"] == result.scores["eval/loss"]
    assert own.model().objective.learns == ("flow_map" if loss in ("meanflow", pair_map) else "velocity")


def test_a_classifier_of_ones_own(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    words = [word for word in WORDS if "evaluation" not in word]
    own = Experiment(
        *words, f"output_dir={tmp_path}", "optimizer.lr=1e-2", network=network, data="digits", loss="cross_entropy", epochs=5
    )
    assert own.fit().scores["eval/accuracy"] > 0.8
    assert own.trained_network()(torch.zeros(2, 1, 8, 8)).shape == (2, 10) and own.run_name == "experiment_1"


def test_pixels_in_classes_are_learned_as_minus_one_to_one_and_every_callback_watches(tmp_path):
    classes, counters = torch.arange(40) % 2, [Steps(), Steps()]
    pixels = (255 * classes).byte()[:, None, None, None].expand(40, 1, 2, 2)
    own = experiment(
        tmp_path, "conditional=true", "optimizer.lr=0.5", "batch_size=9", network=Shades(), data=(pixels, classes),
        callbacks=counters, epochs=1,
    )  # fmt: skip
    own.fit()
    assert [counter.taken for counter in counters] == [4, 4]
    dark, bright, _ = own.trained_network().shades.tolist()
    assert dark < -0.5 and bright > 0.5
    model = own.model()
    assert model.config["dataloaders"]["value_range"] == [-1.0, 1.0] and model.classes(3, None).tolist() == [0, 1, 0]


def test_bytes_that_are_no_pixels_stay_as_they_are(tmp_path):
    own = experiment(tmp_path, "max_steps=1", data=(points() * 10 + 100).byte())
    own.fit()
    assert own.model().real(40)[0].min() > 50


class Asks(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("words, parts, sentence", [
    ([], {"network": Asks()}, r"the network Asks takes \(x, t\), and a run gives it one input.*unified_input, label=None\)"),
    ([], {"network": nn.Linear(4, 3)}, r"the model \(Linear\) returned a tensor of shape \[2, 3\]; it must return a vel"),
    ([], {"network": nn.Linear(5, 2)}, r"the model \(Linear\) fails: RuntimeError"),
    (["conditional=true"], {"data": (points(), torch.arange(400) % 2)}, "the forward of Net takes none; add label=None"),
    ([], {"network": 3}, "network takes an nn.Module or the name of a model such as 'mlp', not int"),
    ([], {"network": "mpl"}, r"model=mpl does not exist \(did you mean mlp\?\)"),
    (["model=cnn"], {}, "network= and the word model= both say what it is"),
    ([], {"data": points()[:5]}, r"N being 10 or more, not \[5, 2\]"),
    ([], {"data": points().reshape(10, 20, 4)}, r"\(N, D\) or \(N, C, H, W\)"),
    ([], {"data": points() / 0}, "rows of data are not finite"),
    ([], {"data": points().double() * 1e300}, "rows of data are not finite in fp32"),
    ([], {"data": points() + 1j}, "data takes real numbers"),
    ([], {"data": (points(), torch.ones(400))}, "one whole number from 0 up for each of its 400 rows"),
    ([], {"data": object()}, r"data takes states, \(states, labels\)"),
    ([], {"callbacks": [print]}, "callbacks takes a list of objects of subclasses of training.run.Callback, not print"),
    ([], {"callbacks": 3}, "callbacks takes a list of objects of subclasses of training.run.Callback, not int"),
    ([], {"solver": 7}, "solver takes a solvers.base_solver.Sampler"),
    ([], {"loss": 7}, "loss takes a FlowObjective, a function"),
    ([], {"loss": lambda network, x0, x1: network.nothing}, "called as .*, fails: AttributeError"),
    (["conditional=true", "model.time_frequencies=[1.0]"],
     {"network": "mlp", "data": (points(), torch.arange(400) % 2), "loss": plain}, "and a function is not"),
    (["devices=2"], {}, "objects given from Python are in this process alone"),
    (["teacher='loss=mse'"], {}, "objects given from Python are in this process alone"),
    (["batch_size=0"], {}, "batch_size takes a whole number of at least 1"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(words, parts, sentence, tmp_path):
    with pytest.raises(Exception, match=sentence) as caught:
        experiment(tmp_path, *words, **parts).fit()
    assert caught.type.__name__ == "UserError" and caught.value._render_traceback_() == [f"UserError: {caught.value}"]
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_taken_and_a_run_without_saves(tmp_path):
    own = experiment(tmp_path, "max_steps=1")
    with pytest.raises(Exception, match="the run x has no save yet"):
        own.sample(2)
    own.fit()
    with pytest.raises(Exception, match="run_name=x exists already"):
        experiment(tmp_path).fit()
