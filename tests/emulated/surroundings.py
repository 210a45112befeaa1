"""What surrounds the step on a device: steps left out, batches on their way, layouts, saves, and whose turn it is."""

import fcntl
import io
import os
import tempfile
import threading
import time
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.emulated import device
from tests.emulated.comparisons import (
    IMAGES,
    KIND,
    PLACE,
    POINTS,
    SMALL_MODELS,
    TINY,
    TRAINING,
    assembled,
    config_of,
    iter_groups,
    on_the_cpu,
    same_scores,
    steps,
)

CNN = [*IMAGES, "model=cnn", *SMALL_MODELS["cnn"]]
PHOTOS = [
    "dataloaders=photos", "dataloaders.crops=128", "dataloaders.held_out_crops=64", "batch_size=8", "model=unet_small",
    *SMALL_MODELS["unet_small"], "dataloaders.augment=0.5", "dataloaders.flip=true", "dataloaders.crop_padding=2",
]  # fmt: skip
STREAMED = ["dataloaders.size=16", "model=cnn", *SMALL_MODELS["cnn"], "batch_size=8", *TRAINING, "max_steps=3"]


def left_out(*words: str) -> str:
    """A step that is not finite, third of six, leaves no trace on the device, as it leaves none on the CPU."""
    config = config_of(*POINTS, *TRAINING, "on_nan=skip", *words)

    def broken_third(where: str) -> list[float]:
        from training.loop import after_step, train_step

        run, losses = assembled(config, where), []
        for group in iter_groups(run):
            group[0].unified_input *= torch.nan if run.state.step == 2 else 1.0
            values = train_step(run, group)
            losses.append(values["loss"].nan_to_num(7.0).item())
            after_step(run, values)
            if run.state.step == 6:
                return [*losses, run.state.skipped.item(), run.state.window.means()["loss"]]
        return losses

    ours, theirs = broken_third(KIND), on_the_cpu(["left out", config], lambda: broken_third("cpu"))
    agree = torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4)
    return "" if agree and ours[2] == 7 and ours[-2] == 1 else f"on the device {ours}, on the CPU {theirs}"


@cache
def pictures() -> Path:
    """Return a folder of small ones."""
    from PIL import Image

    folder = PLACE / "pictures"
    for i in range(40):
        file = folder / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (6 * i, 90, 255 - 6 * i)).save(file)
    return folder


def streamed() -> str:
    """Pictures from disk, read ahead by a worker process."""
    return same_scores("dataloaders=image_folder", f"dataloaders.root={pictures()}", *STREAMED, "num_workers=1")


def read_by_this_process() -> str:
    """The same pictures come as on the CPU, each while the one before is used."""
    config = config_of("dataloaders=image_folder", f"dataloaders.root={pictures()}", *STREAMED)

    def sums(where: str) -> list[float]:
        return [group[0].raw_target.sum().item() for group in iter_groups(assembled(config, where))]

    ours, theirs = sums(KIND), sums("cpu")
    agree = torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4)
    return "" if agree and len(ours) == 5 else f"on the device {ours}, on the CPU {theirs}"


def layouts() -> str:
    """On CUDA all of a U-Net's step is channels last, and what is saved does not show it; elsewhere nothing is."""
    run = assembled(config_of(*PHOTOS, *TRAINING), KIND)
    for _ in steps(run, 1):
        pass
    state, last = run.state, torch.channels_last
    weight = state.objective.network.stem.weight
    laid = [weight, state.ema_objective.network.stem.weight, *optimizer_values(run, weight)]
    if {t.is_contiguous(memory_format=last) for t in laid} != {KIND == "cuda"}:
        return f"strides {[t.stride() for t in laid]}"
    going_back = assembled(config_of(*PHOTOS, *TRAINING), "cpu")
    going_back.state.load_state_dict(state.state_dict())
    weight = going_back.state.objective.network.stem.weight
    bad = [t.stride() for t in (weight, *optimizer_values(going_back, weight)) if not t.is_contiguous()]
    return f"on the CPU {bad}" if bad else norms_without_copies()


def optimizer_values(run: Any, weight: torch.Tensor) -> list[torch.Tensor]:
    return [value for value in run.state.optimizer.state[weight].values() if value.shape == weight.shape]


def norms_without_copies() -> str:
    """Normalising groups changes no layout."""
    from models.layers import group_norm

    x = torch.randn(2, 16, 4, 4).to(device.NAME).contiguous(memory_format=torch.channels_last)
    with device.WAITED.traced():
        y = group_norm(x, 2)
    return "" if y.stride() == x.stride() and not device.WAITED.copies else f"{y.stride()}, {device.WAITED.copies} copies"


def tuned_shapes() -> str:
    """Kernels are tried for whole batches and for evaluations, not for the small last batch of an epoch."""
    import launcher

    device.RULES.tuned.clear()
    words = [*CNN, *TRAINING, "limit_data=43", "max_steps=6", f"device={KIND}", f"output_dir={PLACE / 'tuned'}"]
    launcher.run(*TINY, *words)
    rows = device.RULES.tuned
    return "" if KIND != "cuda" or (16 in rows and 11 not in rows) else f"tuned for {sorted(rows)} rows"


def pinned_saves() -> str:
    """Saves leave the device side by side: the host waits once for all of their tensors."""
    from run_files.checkpoint_folder import frozen

    payload = {name: torch.randn(3, 2).to(device.NAME) for name in "abc"} | {"n": [torch.arange(4).to(device.NAME)]}
    with device.WAITED.traced():
        kept = frozen(payload)
        waits = sum(device.WAITED.causes.values())
    equal = all(torch.equal(kept[name], payload[name].cpu()) for name in "abc") and kept["n"][0].tolist() == [0, 1, 2, 3]
    return "" if equal and waits == (1 if KIND == "cuda" else 4) else f"{waits} waits, equal: {equal}"


def waits_its_turn() -> str:
    """A run with wait=true begins when another one on MPS has ended."""
    import launcher

    words = [*POINTS, *TRAINING, "max_steps=1", f"device={KIND}", f"output_dir={PLACE / 'turn'}", "wait=true"]
    with Path(tempfile.gettempdir(), f"denoising-zoo-mps-{os.getuid()}.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with redirect_stdout(io.StringIO()) as text:
            threading.Thread(target=end_once_it_waits, args=(other, text), daemon=True).start()
            launcher.run(*TINY, *words)
    return "" if "waiting: another run" in text.getvalue() else text.getvalue()


def end_once_it_waits(other: Any, text: io.StringIO) -> None:
    while "waiting: another run uses this GPU" not in text.getvalue():
        time.sleep(0.02)
    other.close()
