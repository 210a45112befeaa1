"""A flow exported to .npz and sampled in NumPy is the flow that torch samples; weights come back from files of arrays."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from evaluation.sample import load
from minigrad import MLP, sample
from run_files.checkpoint import METADATA, load_checkpoint, write_export
from scripts import export
from scripts import sample as torch_sample

SETTINGS = {
    "midpoint": ("loss=mse", [], []),
    "cosine path, noise, rk4": ("loss=mse", ["loss/path=cosine", "loss/prediction=x0"], ["solver=rk4", "solver.steps=3"]),
    "conditional, data, heun, dense grid": (
        "loss=mse",
        [
            "conditional=true", "loss/prediction=x1", "dataloaders=array", "dataloaders.path={data}",
            "dataloaders.standardize=true", "dataloaders.epoch_size=360",
        ],
        ["solver=heun", "solver.steps=3", "solver/grid=dense"],
    ),
    "flow map": ("loss=meanflow", [], ["solver=flow_map", "solver.steps=2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_numpy_draws_what_torch_draws(name, shared_run, tmp_path, capsys):
    loss, training, sampling = SETTINGS[name]
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal([50, -3], [9, 0.2], (400, 2)).astype(np.float32), y=np.arange(400) % 3)
    training = [word.format(data=tmp_path / "data.npz") for word in training]
    folder = shared_run("flow", loss, *training, "max_steps=20")
    ckpt = folder / "ckpts" / "mlp" / "flow_last.pt"
    words = [f"ckpt={ckpt}", "n=200", "seed=3", *sampling]
    assert torch_sample.main([*words, f"out={tmp_path / 'torch.npy'}"]) == 0
    assert export.main([*words, f"out={tmp_path / 'flow.npz'}"]) == 0
    print(sample.carry_out([str(tmp_path / "flow.npz"), "n=150", f"out={tmp_path / 'numpy.npy'}"]))
    assert "150 samples, mean" in capsys.readouterr().out
    ours, theirs = np.load(tmp_path / "numpy.npy"), np.load(tmp_path / "torch.npy")
    assert np.abs(ours - theirs[:150]).max() < 1e-5 * max(1, np.abs(theirs).max())


def test_what_has_no_such_form_is_one_sentence(shared_run, tmp_path, capsys):
    ckpt = shared_run("flow", "loss=mse", "max_steps=20") / "ckpts" / "mlp" / "flow_last.pt"
    small = ("model.width=8", "dataloaders.epoch_size=1438", "max_steps=1")
    digits = shared_run("digits", "dataloaders=digits", "model=cnn", *small)
    out = f"out={tmp_path / 'x.npz'}"
    cases = [
        ([f"ckpt={ckpt}", out, "solver=dopri5"], "Dopri5 cannot be exported; add solver=midpoint"),
        ([f"ckpt={ckpt}", out, "solver=flow_map"], "solver=flow_map samples with a learned flow map"),
        ([f"ckpt={ckpt}", "out=x.npy"], "out=x.npy must end in .npz"),
        ([f"ckpt={ckpt}"], "out is missing"),
        ([f"ckpt={next((digits / 'ckpts').glob('*/digits_last.pt'))}", out], "only model=mlp can be exported"),
    ]
    for words, sentence in cases:
        assert export.main(words) == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_a_file_that_is_no_exported_flow_is_one_sentence(tmp_path):
    np.savez(tmp_path / "other.npz", noise=np.zeros((3, 2)))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "pickled.npz", noise=np.array([print], dtype=object))
    whole = io.BytesIO()
    np.savez_compressed(whole, noise=np.random.default_rng(0).normal(size=(300, 2)))
    damaged = bytearray(whole.getvalue())
    damaged[2000:2040] = bytes(40)  # in the compressed stream
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with zipfile.ZipFile(tmp_path / "lying.npz", "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
        archive.writestr("noise.npy", header.getvalue())
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("other", "text", "pickled", "damaged", "lying"):
        with pytest.raises(sample.UserError, match="is no exported flow") as refused:
            sample.carry_out([str(tmp_path / f"{name}.npz")])
        assert "allow_pickle" not in str(refused.value)
    for name, sentence in (("absent.npz", "there is no file"), ("pipe.npz", "is not a file")):
        with pytest.raises(sample.UserError, match=sentence):
            sample.carry_out([str(tmp_path / name)])
        with pytest.raises(ValueError, match="there is no file"):
            MLP.load(tmp_path / name)
    for words in (["n=many"], ["n=-1"], ["out=x.txt"], ["more.npz"]):
        with pytest.raises(sample.UserError, match="give one exported file"):
            sample.carry_out(["a.npz", *words])


@pytest.fixture
def flow(shared_run, tmp_path):
    """The newest save of a run, and a function that exports weights to a file: what it prints is returned."""
    ckpt = shared_run("flow", "loss=mse", "max_steps=20") / "ckpts" / "mlp" / "flow_last.pt"
    return ckpt, lambda out, *words, of=ckpt: export.export([f"ckpt={of}", "form=weights", f"out={tmp_path / out}", *words])


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_are_read_where_checkpoints_are_and_come_back_changed(flow, suffix, small_run, tmp_path):
    """The arrays have torch's names and layout; a run begins at them, sampling is the checkpoint's to the bit."""
    ckpt, export_to = flow
    path, own = tmp_path / f"x{suffix}", load_checkpoint(ckpt)["ema"]
    assert "a run starts there by init_from=" in export_to(path.name)
    assert equal(load_checkpoint(path)["ema"], own) and torch.equal(load(path).sample(9), load(ckpt).sample(9))
    arrays = dict(np.load(path)) if suffix == ".npz" else {name: tensor.numpy() for name, tensor in load_file(path).items()}
    arrays.pop(METADATA, None)
    assert {name: array.shape for name, array in arrays.items()} == {name: tuple(t.shape) for name, t in own.items()}
    np.savez(tmp_path / "other.npz", **arrays | {"layers.0.bias": arrays["layers.0.bias"] + 1.0})
    export_to(f"new{suffix}", f"weights={tmp_path / 'other.npz'}", of=path)
    bias = own["layers.0.bias"] + 1
    assert equal(load_checkpoint(tmp_path / f"new{suffix}")["ema"], own | {"layers.0.bias": bias})
    run = small_run("y", f"init_from={tmp_path / f'new{suffix}'}", "max_steps=1", "optimizer.lr=1e-9")
    assert torch.allclose(load_checkpoint(run / "ckpts/mlp/y_last.pt")["network"]["layers.0.bias"], bias, atol=1e-6)


def test_what_minigrad_trained_goes_on_in_torch(flow, tmp_path):
    ckpt, export_to = flow
    export.export([f"ckpt={ckpt}", f"out={tmp_path / 'flow.npz'}", "n=5"])
    network, arrays = MLP.load(tmp_path / "flow.npz"), dict(np.load(tmp_path / "flow.npz"))
    for layer in network.layers:
        layer.weight.data = layer.weight.data * 1.5
        layer.bias.data = layer.bias.data.astype(np.float64) - 0.25
    network.save(tmp_path / "trained")
    export_to("back.npz", f"weights={tmp_path / 'trained.npz'}")
    z, times = torch.randn(7, 2), torch.full((7,), 0.25)
    found = load(tmp_path / "back.npz").objective.mean_velocity(z, times, torch.ones(7)).detach().numpy()
    assert (
        np.abs(network(sample.features(arrays | {"class_rows": np.zeros((7, 0))}, z.numpy(), 0.25, 1.0)).data - found).max()
        < 1e-5
    )


def test_weights_of_another_kind_are_one_sentence_and_write_nothing(flow, tmp_path):
    ckpt, export_to = flow
    own = {name: tensor.numpy() for name, tensor in load_checkpoint(ckpt)["ema"].items()}
    np.savez(tmp_path / "pickled.npz", **own | {"layers.0.bias": np.array([print], dtype=object)})
    np.savez(tmp_path / "more.npz", **own, more=np.zeros(3))
    np.savez(tmp_path / "nan.npz", **own | {"layers.0.bias": own["layers.0.bias"] * np.nan})
    MLP(2, [3, 2]).save(tmp_path / "tanh.npz")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez_compressed(tmp_path / "large.npz", **own | {"layers.0.bias": np.zeros(10**7)})
    cases = {
        "pickled": "it holds no plain arrays", "large": "and the weights of this model take", "more": "(more differs)",
        "nan": "NaN or infinite",
        "tanh": "its layers are tanh, linear, those of the checkpoint silu", "text": "cannot be read as weights",
        "absent": "cannot be read as weights",
    }  # fmt: skip
    for name, sentence in cases.items():
        with pytest.raises(UserError) as refused:
            export_to("x.npz", f"weights={tmp_path / name}.npz")
        assert sentence in str(refused.value) and "\n" not in str(refused.value)
    for words, sentence in (
        (["n=3"], "n= says nothing of form=weights"),
        (["out=x.pt"], "must end in .npz or .safetensors"),
    ):
        with pytest.raises(UserError, match=sentence):
            export_to("x.npz", *words)
    with pytest.raises(UserError, match="weights= says nothing of form=flow"):
        export.export([f"ckpt={ckpt}", "out=x.npz", "weights=y.npz"])
    with pytest.raises(UserError, match="NumPy has no bfloat16, which w is"):
        write_export(tmp_path / "x.npz", load_checkpoint(ckpt) | {"ema": {"w": torch.ones(2, dtype=torch.bfloat16)}})
    assert not [*tmp_path.glob("x.*")]


def test_a_file_of_arrays_that_is_no_checkpoint_is_one_sentence(flow, small_run, tmp_path):
    flow[1]("whole.npz")
    held = dict(np.load(tmp_path / "whole.npz"))
    np.savez(tmp_path / "foreign.npz", x=np.zeros((3, 2)))
    np.savez(tmp_path / "pickled.npz", **held | {"layers.0.bias": np.array([print], dtype=object)})
    np.savez_compressed(tmp_path / "compressed.npz", **held)
    np.savez(tmp_path / "edited.npz", **held | {"layers.0.bias": held["layers.0.bias"] + 1})
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-200])
    cases = {
        "foreign": "holds no weights with their configuration; write them by `python scripts/export.py",
        "pickled": "cannot be read as a checkpoint", "cut": "cannot be read as a checkpoint",
        "compressed": "would unpack to more than it holds", "edited": "is damaged",
    }  # fmt: skip
    for name, sentence in cases.items():
        with pytest.raises(UserError) as refused:
            small_run("y", f"init_from={tmp_path / name}.npz")
        assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "outputs").exists()
