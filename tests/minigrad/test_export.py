"""A flow exported to .npz and sampled in NumPy is the flow that torch samples."""

import numpy as np
import pytest

from minigrad import sample
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
    digits = shared_run(
        "digits", "dataloaders=digits", "model=cnn", "model.width=8", "dataloaders.epoch_size=1438", "max_steps=1"
    )
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
    for name in ("other.npz", "one.npy", "text.npz", "pickled.npz", "absent.npz"):
        with pytest.raises(sample.UserError, match="cannot be read as an exported flow"):
            sample.carry_out([str(tmp_path / name)])
    with pytest.raises(sample.UserError, match="give one exported file"):
        sample.carry_out(["a.npz", "n=many"])
