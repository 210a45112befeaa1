#!/usr/bin/env python
"""How near the stated error of a part of the training rows is to the true one, where the sum over all is known.

    python dev/subsample_check.py                    # 180 of the 1,438 digits: seconds
    python dev/subsample_check.py rows=22 parts=50

Words: rows (of a part), parts (random ones that a mean is over). The exact flow of the training rows, v_emp, is compared at
states made of held-out rows: that of half of a part with the part's, which is what evaluations state of data on disk
(oracle/empirical_excess_loss_subsample), and the part's with that of all. Root mean squares, as shares of v_emp.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from common.command_line import front
from common.ranges import Count, Range
from common.seeds import generator_for
from configuration.settings import read_settings
from dataloaders.digits import Digits
from evaluation.empirical_flow import EmpiricalFlow
from evaluation.metrics.empirical import States, change_by_half
from losses.paths import LinearPath
from run_files.result import markdown

EACH = 128  # states of each of the 8 times


def compared(count: int, parts: int, each: int = EACH) -> tuple[Tensor, Tensor]:
    """Return the stated and the true error of `count` random digits at 8 times (8,), as shares, over so many parts."""
    data, path, generator = Digits(), LinearPath(), generator_for(0, "subsample_check")
    rows, unseen = data.training_part(2000)[0], data.held_out(2000, generator)[0]
    x1 = unseen[torch.randint(len(unseen), (8 * each,), generator=generator)]
    t = ((torch.arange(8) + 0.5) / 8).repeat_interleave(each)
    z = path.state(torch.randn(x1.shape, generator=generator), x1, t.reshape(-1, 1, 1, 1))
    squared = lambda v: v.double().square().reshape(8, -1).mean(1)  # noqa: E731
    whole, stated, true = EmpiricalFlow(rows, 1.0, path)(z, t), torch.zeros(8).double(), torch.zeros(8).double()
    for _ in range(parts):
        part = EmpiricalFlow(rows[torch.randperm(len(rows), generator=generator)[:count]], 1.0, path)
        own = part(z, t)
        stated += change_by_half(part, States(t, x1, None, z, t, None, z, z), own)[0]
        true += squared(own - whole)
    return (stated / parts / squared(whole)).sqrt(), (true / parts / squared(whole)).sqrt()


@dataclass(frozen=True)
class Settings:
    """The command line."""

    rows: Annotated[int, Range(2, most=1438)] = 180
    parts: Count = 20


def carry_out(words: list[str]) -> str:
    """Carry out the command; returns the table."""
    settings, _ = read_settings(words, Settings)
    errors = zip(("stated", "true"), compared(settings.rows, settings.parts), strict=True)
    table = [[f"{settings.rows}, {name}", *(f"{share:.2f}" for share in error.tolist())] for name, error in errors]
    return markdown(("rows", *(f"t = {(k + 0.5) / 8:.2f}" for k in range(8))), table)


if __name__ == "__main__":
    sys.exit(front(sys.argv[1:], __doc__, carry_out))
