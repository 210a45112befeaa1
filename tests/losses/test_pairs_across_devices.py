"""Optimal transport over the batch of several processes, which are real: the pairs of one process with the same rows."""

from datetime import timedelta
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backends.submission import prepare
from common import distributed
from common.distributed import all_draw
from losses.couplings import MinibatchOTCoupling
from tests.forked import SERVER
from training.assemble import assemble
from training.loop import epoch_groups

SHARES = {"uneven": (3, 2), "a rank without a row": (4, 0), "priced, in groups": (90, 80)}
SETTINGS = {"uneven": {}, "a rank without a row": {}, "priced, in groups": {"group": 130, "label_weight": 0.5}}


def rows_of(case: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, data and labels of a rank; where it has none, the row of zeros that training fills it up with."""
    count = SHARES[case][rank]
    generator = torch.Generator().manual_seed(10 * rank + len(case))
    x0, x1 = torch.randn(2, max(count, 1), 1, 2, generator=generator)
    return x0, (x1 + 1) * (count > 0), torch.arange(max(count, 1)) % 3


def work(rank: int, place: Path) -> None:
    """Pair on one rank of two: outside training on rank 0 alone, which must not wait for the other."""
    store = dist.FileStore(str(place / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = {}
    for case, counts in SHARES.items():
        coupling, rows = MinibatchOTCoupling(**SETTINGS[case], across_devices=True), rows_of(case, rank)
        if rank == 0:
            found[f"{case}, alone"] = coupling.pair(*rows, torch.Generator())
        with all_draw(counts[rank]):
            found[case] = coupling.pair(*rows, torch.Generator())
    torch.save(found, place / f"{rank}.pt")
    dist.barrier()


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_pair_as_one_does_with_the_same_rows(tmp_path):
    processes = [SERVER.Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, counts in SHARES.items():
        given = [[part[:count] for part in rows_of(case, rank)] for rank, count in enumerate(counts)]
        x0, x1, label = (torch.cat(parts) for parts in zip(*given, strict=True))
        expected = MinibatchOTCoupling(**SETTINGS[case]).pair(x0, x1, label, torch.Generator())
        mine = [[part[:count] for part in found[rank][case]] for rank, count in enumerate(counts)]
        for one, parts in zip(expected, zip(*mine, strict=True), strict=True):
            assert torch.equal(one, torch.cat(parts))
        alone = MinibatchOTCoupling(**SETTINGS[case]).pair(*rows_of(case, 0), torch.Generator())
        assert all(torch.equal(a, b) for a, b in zip(alone, found[0][f"{case}, alone"], strict=True))
        if len(x0) < 9:
            cost = (x0.flatten(1)[:, None] - x1.flatten(1)[None]).square().sum(-1)
            least = min(sum(cost[row, column] for row, column in enumerate(order)) for order in permutations(range(len(x0))))
            assert (expected[0] - expected[1]).square().sum() == pytest.approx(float(least), rel=1e-5)
    filled_up = found[1]["a rank without a row"]
    assert all(torch.equal(a, b) for a, b in zip(filled_up, rows_of("a rank without a row", 1), strict=True))


def test_only_batches_of_training_wait_for_other_ranks(tmp_path, monkeypatch):
    """Where they are drawn; the trial of the parts, before them, and evaluations are not."""
    seen = []
    monkeypatch.setattr(
        MinibatchOTCoupling, "pair", lambda self, x0, x1, label, _: seen.append(distributed.own_share) or (x0, x1, label)
    )
    words = ["run_name=x", "loss/coupling=minibatch_ot", "batch_size=32", "dataloaders.epoch_size=40", "model.width=8",
             "trackio.enabled=false", "device=cpu", f"output_dir={tmp_path}", "callbacks=none"]  # fmt: skip
    run = assemble(prepare(words))
    x1 = torch.zeros(5, 2)
    run.state.objective.batch(run.source, x1, None, torch.Generator(), 0.0)
    list(epoch_groups(run))
    run.state.objective.batch(run.source, x1, None, torch.Generator(), 0.0)
    assert seen == [None, 32, 8, None]
