"""base_model: a learning rate carried from a narrow model to a wide one."""

import pytest
import torch

from backends.submission import prepare
from common.errors import UserError
from training.assemble import assemble
from training.width_transfer import growth
from visualizers import coordinates

SMALL = ["device=cpu", "batch_size=64", "optimizer.lr=5e-3"]


def assembled(tmp_path, *words: str):
    return assemble(prepare(["run_name=x", f"output_dir={tmp_path}", *SMALL, *words]))


def test_rates_and_starts_follow_the_table_of_the_paper(tmp_path):
    """Table 3 of Tensor Programs V, Adam: inputs of hidden and output layers grow by 4, and outputs of hidden layers."""
    wide = assembled(tmp_path, "base_model={width:64}", "model.width=256")
    narrow = assembled(tmp_path, "model.width=64")
    rates = {id(weight): group["initial_lr"] for group in wide.state.optimizer.param_groups for weight in group["params"]}
    own, base = (dict(run.state.objective.network.requires_grad_(False).named_parameters()) for run in (wide, narrow))
    for name, weight in own.items():
        grows = name in ("layers.2.weight", "layers.4.weight", "layers.6.weight")
        assert rates[id(weight)] == pytest.approx(5e-3 / 4 if grows else 5e-3)
        size = {"layers.6.weight": 1 / 4}.get(name, 1 / 2 if grows else 1.0)
        assert float(weight.square().mean() / base[name].square().mean()) == pytest.approx(size**2, rel=1e-5)
    assert wide.state.optimizer.param_groups[0]["initial_lr"] == 5e-3, "the one that is logged"


def test_at_the_width_of_the_base_nothing_changes(tmp_path):
    run, plain = assembled(tmp_path, "base_model={width:32}", "model.width=32"), assembled(tmp_path, "model.width=32")
    pairs = zip(run.state.objective.network.parameters(), plain.state.objective.network.parameters(), strict=True)
    assert all(torch.equal(own, other) for own, other in pairs) and len(run.state.optimizer.param_groups) == 1


@pytest.mark.slow
def test_every_layer_changes_as_much_at_any_width_and_does_not_without(tmp_path):
    words = [*SMALL, "dataloaders=kmeans", "batch_size=256", "base_model={width:64}"]
    found = coordinates.measured(words, {"width": 64}, times := [1, 2, 4, 8], 8)
    powers = {name: [coordinates.power(times, values) for values in own.values()] for name, own in found.items()}
    assert max(map(abs, powers[coordinates.WITH])) < 0.12 < 0.3 < max(powers[coordinates.WITHOUT])


def test_a_run_goes_on_with_its_rates(small_run, tmp_path):
    words = ("base_model={width:8}", "schedule=constant")
    whole, part = small_run("x", *words, "epochs=2", output="whole"), small_run("x", *words, "epochs=1")
    small_run("x", *words, "epochs=2", "resume=true")
    states = [torch.load(folder / "ckpts/mlp/x_last.pt", weights_only=True) for folder in (whole, part)]
    assert len(states[0]["optimizer"]["param_groups"]) == 2
    assert all(torch.equal(one, states[1]["network"][name]) for name, one in states[0]["network"].items())
    with pytest.raises(UserError, match=r"base_model\.width was 8"):
        small_run("x", "base_model={width:4}", "epochs=3", "resume=true")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["base_model={widht:64}"], r"base_model=\{widht: \.\.\.\} is no setting of this model \(did you mean width\?\)"),
        (["base_model={width:64}", "optimizer=sgd"], "use optimizer=adamw or adam, and engine=torch"),
        (["base_model={width:64}", "optimizer=muon"], "use optimizer=adamw or adam, and engine=torch"),
        (["base_model={depth:2}"], "base_model has no layer layers.6, and this model has; give widths alone"),
        (["base_model={width:0}"], "base_model takes"),
        (["base_model=64"], "base_model takes"),
    ],
)
def test_a_base_that_cannot_be_one_is_one_sentence(words, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        assembled(tmp_path, *words)


def test_layers_are_compared_by_their_inputs_and_outputs():
    wide, narrow = (torch.nn.Sequential(torch.nn.Conv2d(3, c, 3), torch.nn.Conv2d(c, c, 1)) for c in (32, 8))
    assert growth(wide, narrow) == {"0.weight": (1.0, 4.0), "1.weight": (4.0, 4.0)}


def test_the_picture_and_its_table(tmp_path, capsys):
    words = ["base_model={width:8}", "times=1,2", "steps=2", f"out={tmp_path}", *SMALL]
    assert coordinates.check(words) == 0 and (tmp_path / "coordinates.png").stat().st_size > 5000
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("power of the width") and len(said) == 6 and "layers.6" in said[4]
    for wrong, sentence in (("times=2", "is one width"), ("steps=0", "steps takes"), ("base_model=null", "is missing"),
                            ("steps=10000", "is more than the"), ("out=x.png", "takes a folder")):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            coordinates.check([*words, wrong])
