"""One run in several processes: the same gradients, weights and samples as in one, own noise for each, and one end for all.

The processes are real. Most assertions share one job of two: this file, run as a program, is one of its ranks.
"""

import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher
from backends.submission import prepare
from backends.workers import run_distributed
from common.distributed import Ballot, first_non_none, rank, world
from common.errors import UserError
from dataloaders.base_dataloaders import EpochPlan
from losses.objective import FlowBatch
from run_files.checkpoint import load_checkpoint
from tests.forked import Forked
from train import carry_out
from training import loop
from training.assemble import assemble
from training.loop import after_step, epoch_groups, train_step
from training.run import Callback, Run, Stop

PLAIN = ["trackio.enabled=false", "device=cpu", "callbacks=none", "output_dir=."]
SMALL = [
    *PLAIN, "evaluation=loss_only", "evaluation.samples=64", "evaluation.final_samples=64",
    "model.width=16", "model.depth=2", "solver.steps=4",
]  # fmt: skip
LOSSES = {
    "flow matching": ["loss=mse"],
    "MeanFlow, forward mode": ["loss=meanflow", "loss.jvp=func", "loss/weighting=adaptive"],
    "MeanFlow, differences": ["loss=meanflow", "loss.jvp=finite_difference"],
    "improved MeanFlow": ["loss=improved_meanflow", "loss.time_sampler.ratio=0.5"],
    "shortcut, with a teacher": ["loss=shortcut", "loss.time_sampler.ratio=0.25"],
    "with labels": ["loss=meanflow", "conditional=true"],
    "compiled": ["loss=meanflow", "compile=true"],
}
RESNET = ["model=resnet18", "model.width=4", "dataloaders=digits", "loss=cross_entropy", "evaluation=classifier"]
pytestmark = [pytest.mark.slow, pytest.mark.process]
ERROR_FILE_ENV = "what every rank finds is said once"


class StopAt(Callback):
    """A vote of rank 0, the only one with callbacks, that behaves as a signal does after the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def step_end(self, run: Run) -> None:
        if run.state.step == self.step:
            run.asked = Stop("stopped by SIGTERM", signal=signal.SIGTERM)


def assembled(*words: str) -> Run:
    return assemble(prepare(["run_name=x", *SMALL, f"devices={world()}", *words]))


def own_rows(batch: FlowBatch, intervals: int) -> FlowBatch:
    """This rank's rows of a batch drawn for all, its part of those with r < t first."""
    rows = torch.arange(len(batch))
    mine = torch.cat([rows[:intervals][rank() :: world()], rows[intervals:][rank() :: world()]])
    return replace(batch, **{name: value[mine] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)})


def trained(words: list[str]) -> dict[str, torch.Tensor]:
    """Gradient of the first step, then weights, average and mean loss after four, each of two batches of 32 rows.

    One process is never compiled.
    """
    if world() == 1:
        words = [word for word in words if word != "compile=true"]
    run = assembled("batch_size=32", "gradient_accumulation_steps=2", "log_every=1000", "grad_clip=0.5", *words)
    parameters = list(run.state.objective.network.parameters())
    start = [p.detach().clone() for p in parameters]
    run.state.optimizer = torch.optim.SGD([{"params": parameters, "lr": 0.05, "initial_lr": 0.05}])
    generator, found = torch.Generator().manual_seed(1), {}
    for step in range(4):
        group = []
        for _ in range(2):
            x1, label = next(run.dataset.epoch(EpochPlan(32, generator, generator)))
            batch = run.state.objective.batch(run.source, x1, label, generator, 0.0)
            group.append(own_rows(batch, run.state.objective.time_sampler.interval_rows(32)))
        values = train_step(run, group)
        run.state.window.add(values)
        if step == 0:
            rate = run.state.optimizer.param_groups[0]["lr"]
            clipped = torch.cat([(b - p.detach()).flatten() / rate for b, p in zip(start, parameters, strict=True)])
            found["gradient"] = clipped * max(1.0, float(values["grad_norm"]) / 0.5)
    run.state.window.all_reduce_mean()
    found |= {f"mean {name}": total / 4 for name, total in run.state.window.sums.items()}
    found |= {f"network.{k}": v for k, v in run.state.objective.network.state_dict().items()}
    return found | {f"ema.{k}": v for k, v in run.state.ema_objective.network.state_dict().items()}


def drawn() -> dict[str, torch.Tensor]:
    """What two steps draw on this rank, the state of dropout's generator among it."""
    run = assembled("batch_size=50", "dataloaders.epoch_size=100")
    groups = []
    for group in epoch_groups(run):
        groups.append({**vars(group[0]), "dropout": torch.rand(4)})
    return {k: torch.cat([g[k] for g in groups]) for k in ("raw_source", "raw_target", "r", "dropout")}


def judged(*words: str) -> dict[str, Any]:
    """Values on this rank, samples on the first: of 2,500, so of two whole chunks and a part."""
    run = assembled("evaluation.samples=2500", *words)
    return {"values": run.evaluate(final=False), "samples": run.evaluation and run.evaluation.generation.samples}


def skipped() -> dict[str, Any]:
    """A step in which one batch, of rank 1 where there are two, is not finite."""
    run = assembled("batch_size=50", "on_nan=skip")
    group = next(epoch_groups(run))
    before = [p.detach().clone() for p in run.state.objective.network.parameters()]
    if rank() == world() - 1:
        group[0].unified_input[0] = float("nan")
    values = train_step(run, group)
    same = all(torch.equal(b, p) for b, p in zip(before, run.state.objective.network.parameters(), strict=True))
    after_step(run, values)
    return {"skipped": int(run.state.skipped), "same": same, "counted": run.state.window.count}


def broadcasts() -> dict[str, Any]:
    """Whether a step makes buffers those of rank 0, and whether they are: of a perceptron, and where norms count batches."""
    found = {}
    for name, words in {"mlp": [], "resnet18": RESNET}.items():
        run = assemble(prepare(["run_name=x", *PLAIN, f"devices={world()}", "batch_size=8", *words]))
        buffers = [b for b in run.state.objective.buffers() if b.is_floating_point()]
        with torch.no_grad():
            buffers[-1].add_(rank())
        train_step(run, next(epoch_groups(run)))
        found[name] = (run.forward.forward_sync_buffers, float(buffers[-1].sum()))
    return found


def ragged() -> int:
    """Two runs whose epochs end in a batch of one row: undisturbed, and stopped by rank 0 within an epoch and resumed.

    Returns the step at which it was stopped.
    """
    words = [*SMALL, f"devices={world()}", "batch_size=50", "dataloaders.epoch_size=101", "epochs=3", "model.dropout=0.2"]
    carry_out(prepare(["run_name=whole", *words]))
    try:
        carry_out(prepare(["run_name=parts", *words, f"+callbacks.stop={{_target_: {__name__}.StopAt, step: 4}}"]))
    except SystemExit as stop:
        assert stop.code == 143
    stopped_at = load_checkpoint(Path("ckpts/mlp/parts_last.pt"))["step"]
    carry_out(prepare(["run_name=parts", "resume=true", "callbacks=none", "output_dir=.", f"trust={__name__}"]))
    return stopped_at


def part(place: Path) -> None:
    """What one rank of the job does; the last is a mistake that all ranks find."""
    torch.compile = partial(torch.compile, backend="aot_eager", fullgraph=True)
    found: dict[str, Any] = {name: trained(words) for name, words in LOSSES.items()}
    found |= {"drawn": drawn(), "judged": judged(), "adaptive": judged("solver=dopri5"), "skipped": skipped()}
    ballot = Ballot()
    found["ballot"] = [
        ballot.cast(rank() == 1),
        ballot.cast(False),
        ballot.cast(rank() == 0),
        ballot.close(),
        ballot.close(),
    ]
    found["broadcasts"] = broadcasts()
    found["agreed"] = [first_non_none("second" if rank() else None), first_non_none(None), first_non_none(f"rank {rank()}")]
    found["stopped_at"] = ragged()
    torch.save(found, place / f"rank{rank()}.pt")
    raise UserError(ERROR_FILE_ENV)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]], str]]:
    """The folder of a job of two ranks, what each found, and what they said on stderr."""
    place = tmp_path_factory.mktemp("job")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [Forked(__file__, cwd=place, env=os.environ | shared | {"RANK": str(number)}) for number in range(2)]
    said = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1] and (place / "rank1.pt").is_file(), "\n".join(said)
    yield place, [torch.load(place / f"rank{number}.pt", weights_only=False) for number in range(2)], "".join(said)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_and_weights_are_those_of_one_process(job, loss, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone, (first, second) = trained(LOSSES[loss]), (found[loss] for found in job[1])
    assert alone.keys() == first.keys() and alone["gradient"].norm() > 0.01
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(first[name], second[name]), name


def test_no_rank_draws_what_another_draws(job):
    for name, first in job[1][0]["drawn"].items():
        both = torch.cat([first, job[1][1]["drawn"][name]])
        assert len(first) == (8 if name == "dropout" else 50)
        assert len(torch.unique(both, dim=0)) == len(both), name


def test_going_on_with_another_number_of_devices_repeats_no_random_number(tmp_path, monkeypatch):
    """The numbers of the seeds: of two ranks for steps 0 to 9, then of one for 10 to 19."""
    words = [*SMALL, "run_name=x", f"output_dir={tmp_path}", "batch_size=128", "dataloaders.epoch_size=12800"]
    run, real, numbers = assemble(prepare(words)), loop.stream_seed, []
    monkeypatch.setattr(loop, "stream_seed", lambda seed, name, index: (numbers.append(index), real(seed, name, index))[1])
    for number, count, first in ((0, 2, 0), (1, 2, 0), (0, 1, 10)):
        run.rank, run.world, run.state.step = number, count, first
        assert len(list(islice(epoch_groups(run), 10))) == 10
    assert len(numbers) == 30 == len(set(numbers))


def test_a_resumed_runs_own_batch_is_what_its_devices_share(tmp_path):
    """Not that of its recipe, 1,024 rows, which three could not share."""
    words = ["run_name=x", f"output_dir={tmp_path}"]
    launcher.run(*SMALL, *words, "batch_size=96", "max_steps=1")
    assert prepare([*words, "resume=true", "devices=3", "max_steps=2"])["batch_size"] == 96
    with pytest.raises(UserError, match="batch_size=96 rows cannot be shared evenly by devices=5"):
        prepare([*words, "resume=true", "devices=5", "max_steps=2"])


@pytest.mark.parametrize(("name", "words"), [("judged", []), ("adaptive", ["solver=dopri5"])])
def test_evaluation_samples_are_those_of_one_process(job, name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone, (first, second) = judged(*words), (found[name] for found in job[1])
    assert torch.equal(first["samples"], alone["samples"]) and len(torch.unique(first["samples"], dim=0)) == 2500
    assert second["samples"] is None
    assert first["values"] == second["values"] == alone["values"]


def test_a_batch_that_breaks_one_rank_is_left_out_by_all(job):
    assert job[1][0]["skipped"] == job[1][1]["skipped"] == {"skipped": 1, "same": True, "counted": 0}


def test_ranks_agree_on_what_one_of_them_says(job):
    assert job[1][0]["agreed"] == job[1][1]["agreed"] == ["second", None, "rank 0"]


def test_a_rank_that_asks_is_heard_by_all_one_step_later(job):
    for found in job[1]:
        assert found["ballot"] == [False, True, False, True, False] and found["stopped_at"] == 5


def test_only_buffers_that_change_are_those_of_the_first_rank(job):
    first, second = (found["broadcasts"] for found in job[1])
    assert first["resnet18"][0] and abs(first["resnet18"][1] - second["resnet18"][1]) < 1  # by what each rank's rows add
    assert not first["mlp"][0] and abs(first["mlp"][1] - second["mlp"][1]) > 1


def test_epochs_end_raggedly_and_a_stopped_run_goes_on_bit_for_bit(job):
    place = job[0]
    whole, parts = (load_checkpoint(place / f"ckpts/mlp/{name}_last.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 9
    for kind in ("network", "ema"):
        assert whole[kind].keys() == parts[kind].keys()
        assert all(value.isfinite().all() and torch.equal(value, parts[kind][name]) for name, value in whole[kind].items())
    one, two = ([json.loads(line) for line in (place / f"runs/{name}/metrics.jsonl").open()] for name in ("whole", "parts"))
    for row, same in zip(one, two, strict=True):
        names = [name for name in row if name in ("step", "train/loss", "train/grad_norm", "eval/loss")]
        assert [row[name] for name in names] == pytest.approx([same[name] for name in names], rel=1e-6)


def test_a_mistake_that_all_find_is_said_once(job):
    assert job[2].count(ERROR_FILE_ENV) == 1 and "Traceback" not in job[2]


if __name__ == "__main__":
    run_distributed(lambda: part(Path.cwd()))
