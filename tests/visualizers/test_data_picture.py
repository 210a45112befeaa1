"""visualizers/data.py: every data set can be looked at before a network is trained on it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from configuration.compose import groups
from tests.test_layout import companions
from training.loop import epoch_groups
from visualizers import data

ENOUGH = ["batch_size=64", "device=cpu"]


def lines(text: str) -> dict[str, str]:
    return {key: value.strip() for key, _, value in (line.strip().partition("  ") for line in text.splitlines()[1:])}


@pytest.mark.parametrize("name", groups()["dataloaders"])
def test_every_data_set_has_its_picture(name, tmp_path, monkeypatch, capsys, official):
    extra = companions("dataloaders", name, tmp_path, official(name))
    monkeypatch.chdir(tmp_path)
    assert data.look([f"dataloaders={name}", *extra, *ENOUGH, f"out={tmp_path / 'seen'}"]) == 0
    said = lines(capsys.readouterr().out)
    assert {"states", "values", "batch", "picture"} <= set(said)
    if "none of states" not in said["picture"]:  # of four channels, as latents have
        assert np.asarray(Image.open(tmp_path / "seen" / "data.png").convert("L")).std() > 5


def test_the_batch_is_the_first_of_the_run(tmp_path):
    run, batch, _ = data.looked_at(["dataloaders=digits", "conditional=true", "loss.label_dropout=0.5", *ENOUGH])
    again = next(iter(next(epoch_groups(run))))
    assert torch.equal(batch.input, again.input)
    said = data.facts(run, batch)
    hidden = int((batch.label == 10).sum())
    assert 0 < hidden < 64 and said["batch"] == f"64 rows, the label of {hidden} hidden"
    counts = [int(part.split(": ")[1]) for part in said["classes"].split("batch ")[1].split(", ")]
    assert counts == torch.bincount(batch.label, minlength=11)[:10].tolist()


def test_states_go_from_noise_to_data_along_the_path():
    run, batch, _ = data.looked_at(["dataloaders=moons", "loss/coupling=minibatch_ot", *ENOUGH])
    states = data.on_the_way(run, batch)
    assert list(states) == ["t = 0", "t = 0.33", "t = 0.67", "t = 1"]
    for share, found in zip((0, 1 / 3, 2 / 3, 1), states.values(), strict=True):
        np.testing.assert_allclose(found, (1 - share) * batch.raw_source + share * batch.raw_target, atol=1e-6)


def test_scales_that_are_learned_badly_are_said(tmp_path, capsys):
    x = np.random.default_rng(0).normal([50, -3], [9, 0.05], (400, 2)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(400) % 3)
    words = ["dataloaders=array", f"dataloaders.path={tmp_path / 'x.npz'}", *ENOUGH, f"out={tmp_path}"]
    data.look(words)
    assert "standard deviations 0.0" in lines(capsys.readouterr().out)["note"]
    data.look([*words, "dataloaders.standardize=true"])
    said = lines(capsys.readouterr().out)
    assert "note" not in said and abs(float(said["values"].split()[-1]) - 1) < 0.1


def test_classifiers_have_their_images_and_latents_no_picture(tmp_path, capsys):
    data.look(["dataloaders=digits", "loss=cross_entropy", *ENOUGH, f"out={tmp_path}"])
    assert "data.png" in lines(capsys.readouterr().out)["picture"]
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 4, 8, 8)).astype(np.float32))
    data.look(["dataloaders=array", f"dataloaders.path={tmp_path / 'x.npy'}", *ENOUGH, f"out={tmp_path}"])
    assert lines(capsys.readouterr().out)["picture"] == "none of states of shape [4, 8, 8]"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dataloaders=nosuch"], "dataloaders=nosuch does not exist"),
        (["model=cnn"], "this model takes images"),
        (["out=x.png"], "out takes a folder"),
        (["batch_size=0"], "batch_size"),
    ],
)
def test_wrong_words_are_one_sentence(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        data.look(words)
    assert not list(Path(tmp_path).iterdir())
