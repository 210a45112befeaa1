"""sharding=full on two processes: the gradients, saves and scores of DDP, from half of the memory on each.

The processes are real, and share one job: this file, run as a program, is one of its ranks.
"""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from backends.submission import prepare
from backends.workers import run_distributed
from common.distributed import rank, world
from common.errors import UserError
from run_files.checkpoint import load_checkpoint
from tests.forked import Forked
from train import carry_out
from training.assemble import assemble
from training.loop import epoch_groups, train_step
from training.sharding import gathered, local, plain

SMALL = [
    "trackio.enabled=false", "device=cpu", "callbacks=none", "output_dir=.", "evaluation=loss_only", "evaluation.samples=4",
    "evaluation.final_samples=8", "solver.steps=1", "dataloaders=digits", "dataloaders.epoch_size=1438", "batch_size=6",
    "model=dit_s", "model.hidden_size=48", "model.heads=2", "model.patch_size=4", "model.depth=12", "schedule=constant",
]  # fmt: skip
LOSSES = {
    "flow matching": ["loss=mse"],
    "MeanFlow, forward mode": ["loss=meanflow", "loss.jvp=func"],
    "MeanFlow, differences": ["loss=meanflow", "loss.jvp=finite_difference"],
    "activations computed again": ["loss=mse", "checkpoint_activations=true"],
}
REFUSED = [
    "model=cnn compile=true",
    "model=cnn on_nan=skip",
    "model=cnn loss=shortcut",
    "model=resnet18 loss=cross_entropy evaluation=classifier",
]
pytestmark = [pytest.mark.slow, pytest.mark.process]


class Recording(torch.optim.SGD):
    """Keeps the gradients of a step, whole, and takes none."""

    def step(self, closure: Any = None) -> None:
        self.seen = [plain(weight.grad).clone() for group in self.param_groups for weight in group["params"]]


def gradients(*words: str) -> dict[str, Any]:
    """The gradients of a first step, and the largest share of the weights that this rank has held at once."""
    run = assemble(prepare(["run_name=x", *SMALL, f"devices={world()}", "grad_clip=null", *words]))
    network = run.state.objective.network
    parts = [part._get_fsdp_state()._fsdp_param_group for part in network.modules() if isinstance(part, FSDPModule)]
    held: list[int] = []

    def count(*_: Any) -> None:
        whole = [one._unsharded_param.numel() for part in parts if part.is_unsharded for one in part.fsdp_params]
        held.append(sum(whole))

    own = sum(weight.numel() for weight in local(network.parameters()))
    with torch.no_grad():
        for weight in local(network.parameters()):  # whose zeros hide the gradients of others
            weight.add_(0.02)
    for module in network.modules():
        module.register_forward_hook(count)
        module.register_full_backward_pre_hook(count)
    run.state.optimizer = Recording([{"params": list(network.parameters()), "lr": 0.1, "initial_lr": 0.1}])
    train_step(run, next(epoch_groups(run)))
    return {"gradients": run.state.optimizer.seen, "held": (own + max(held)) / network.parameter_count()}


def part(place: Path) -> None:
    """What one rank of the job does."""
    found: dict[str, Any] = {name: [gradients(*words), gradients(*words, "sharding=full")] for name, words in LOSSES.items()}
    for name, sharding in (("full", "full"), ("ddp", "none")):
        words = [*SMALL, "devices=2", f"sharding={sharding}"]
        carry_out(prepare([f"run_name={name}", *words, "max_steps=3"]))
        carry_out(prepare([f"run_name=one_{name}", *words, "max_steps=8", "resume=true"]))
    for words in REFUSED:
        try:
            assemble(prepare(["run_name=x", *SMALL[:10], "devices=2", "batch_size=8", "sharding=full", *words.split()]))
        except UserError as error:
            found[words] = str(error)
    torch.save(found, place / f"rank{rank()}.pt")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a job of two ranks, in which runs of one process lie, and what each rank found."""
    place, before = tmp_path_factory.mktemp("job"), Path.cwd()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.chdir(place)
    try:
        for name in ("one_full", "one_ddp"):
            carry_out(prepare([f"run_name={name}", *SMALL, "max_steps=3"]))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        ranks = [Forked(__file__, cwd=place, env=os.environ | shared | {"RANK": str(number)}) for number in range(2)]
        said = [process.communicate(timeout=300)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], said
        for name in ("full", "ddp"):
            carry_out(prepare([f"run_name={name}", *SMALL, "max_steps=8", "resume=true", "sharding=none", "devices=1"]))
    finally:
        os.chdir(before)
    return place, [torch.load(place / f"rank{number}.pt", weights_only=False) for number in range(2)]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_ddp_and_no_rank_holds_all_weights(job, loss):
    for ddp, full in [found[loss] for found in job[1]]:
        assert max(float(g.abs().max()) for g in ddp["gradients"]) > 0.01
        for one, other in zip(ddp["gradients"], full["gradients"], strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-6)
        assert ddp["held"] == 1 and full["held"] <= 0.6  # half, what is in no block, and one block of twelve


def tensors(path: Path) -> dict[str, Tensor]:
    payload = load_checkpoint(path)
    slots = {f"{i} {k}": v for i, of in payload["optimizer"]["state"].items() for k, v in of.items()}
    return {f"network {k}": v for k, v in payload["network"].items()} | payload["ema"] | slots


@pytest.mark.parametrize("name", ["{}", "one_{}"], ids=["saved on 2, resumed on 1", "saved on 1, resumed on 2"])
def test_a_save_goes_on_on_another_number_of_devices(job, name):
    one, other = (tensors(job[0] / "ckpts" / "dit_s" / f"{name.format(kind)}_last.pt") for kind in ("ddp", "full"))
    assert one.keys() == other.keys() and len(one) > 100
    for key, value in one.items():
        assert type(other[key]) is Tensor and torch.allclose(value, other[key], rtol=0, atol=1e-6), key


def test_what_does_not_go_with_it_is_a_sentence(job):
    for words in REFUSED:
        assert "sharding=full does not go with" in job[1][0][words]


def test_one_process_shares_nothing_out():
    run = assemble(prepare(["run_name=x", *SMALL, "sharding=full"]))
    assert not isinstance(run.state.objective.network, FSDPModule)
    with gathered(run.state.objective.network):
        assert all(type(weight) is torch.nn.Parameter for weight in run.state.objective.network.parameters())


if __name__ == "__main__":
    run_distributed(lambda: part(Path.cwd()))
