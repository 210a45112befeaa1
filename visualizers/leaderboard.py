#!/usr/bin/env python
"""The leaderboard as a picture: energy distance of every objective on every data set, in one evaluation and by the solver.

    python visualizers/leaderboard.py                        # outputs/pictures/leaderboard.png
    python visualizers/leaderboard.py out=docs/leaderboard.png

Words: log (the file whose tables are drawn, EXPERIMENT_LOG.md; scripts/leaderboard.py writes them), out (a .png). Bars are
the spread over seeds that the tables give; the band is the floor's mean and three of its standard deviations to either side,
from which no score can be told. The axis is linear up to 0.001 and logarithmic beyond. Objectives stand in the order of
their mean rank in one evaluation.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common.command_line import ROOT, check_ends, front
from common.errors import UserError
from configuration.settings import read_settings
from evaluation.leaderboard_table import ENERGY, SHORT, START, STOP
from evaluation.pictures import GENERATED_COLOR, INK, REAL_COLOR, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINEAR = 1e-3  # energy distance up to which the axis is linear
AXIS = "energy distance, linear up to .001 and logarithmic beyond; bars: spread over seeds, as in its tables"
BAND = 3.0  # standard deviations of the floor
NUMBER = re.compile(r"(-?\d+\.?\d*)(?: ± (\d+\.?\d*))?")


@dataclass(frozen=True)
class Settings:
    """The command line."""

    log: Path = ROOT / "EXPERIMENT_LOG.md"
    out: Path = ROOT / "outputs/pictures/leaderboard.png"


@dataclass
class Table:
    """One data set. floor: its mean and standard deviation. scores[evaluations][objective]: mean and spread."""

    name: str
    floor: tuple[float, float]
    scores: dict[int, dict[str, tuple[float, float]]]


def read_tables(path: Path) -> list[Table]:
    """Return every data set's energy distances, as scripts/leaderboard.py wrote them. UserError where there are none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    written = text.partition(START)[2].partition(STOP)[0]
    tables = [read_table(*part.split("\n", 1)) for part in written.split("\n### ")[1:]]
    if not tables or not any(scores for table in tables for scores in table.scores.values()):
        raise UserError(f"{path} holds no leaderboard with scores; `python scripts/leaderboard.py` trains and writes one")
    return tables


def read_table(name: str, body: str) -> Table:
    """Return a Markdown table under its heading; cells that hold no number are left out."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("|")]
    header, floor, *lines = rows[0], *rows[2:]
    found = {place: re.fullmatch(rf"{SHORT[ENERGY]}, (\d+)", title) for place, title in enumerate(header)}
    counts = {int(match[1]): place for place, match in found.items() if match}
    named = lambda place: ((line[0].partition(" (")[0], read_cell(line[place])) for line in lines)  # noqa: E731
    scores = {count: {name: cell for name, cell in named(place) if cell} for count, place in counts.items()}
    return Table(name.strip(), read_cell(floor[counts[1]]) or (0.0, 0.0), scores)


def read_cell(cell: str) -> tuple[float, float] | None:
    """Return the mean of a cell and its spread, 0 where none is given."""
    match = NUMBER.search(cell)
    return (float(match[1]), float(match[2] or 0.0)) if match else None


def digest(tables: list[Table]) -> str:
    """Return what distinguishes the numbers of one leaderboard from another's; the picture carries it."""
    return hashlib.sha256(repr(tables).encode()).hexdigest()


def by_rank(tables: list[Table]) -> list[str]:
    """Return objectives by their mean rank in one evaluation over the data sets, the best first."""
    ranks: dict[str, list[int]] = {}
    for table in tables:
        for rank, (objective, _) in enumerate(sorted(table.scores[1].items(), key=lambda item: item[1][0])):
            ranks.setdefault(objective, []).append(rank)
    return sorted(ranks, key=lambda objective: float(np.mean(ranks[objective])))


def draw_table(axes: Axes, table: Table, objectives: list[str], most: int) -> None:
    """Draw a line of each objective: from its score in one evaluation to that by the solver."""
    mean, sd = table.floor
    axes.axvspan(mean - BAND * sd, mean + BAND * sd, color="#d0d0d0", linewidth=0, zorder=0)
    for place, objective in enumerate(objectives):
        ends = [table.scores[count][objective] for count in (1, most) if objective in table.scores[count]]
        axes.plot([value for value, _ in ends], [place] * len(ends), color="#999999", linewidth=1, zorder=1)
    for count, color, marker in ((most, GENERATED_COLOR, "D"), (1, REAL_COLOR, "o")):
        known = {objective: cell for objective, cell in table.scores[count].items() if objective in objectives}
        axes.errorbar(
            [value for value, _ in known.values()], [objectives.index(objective) for objective in known],
            xerr=[error for _, error in known.values()], fmt=marker, color=color, ecolor=color, markersize=5.5,
            elinewidth=1.5, markerfacecolor=color if count == 1 else "white", markeredgewidth=1.3,
            label=f"{count} evaluation{'s' * (count > 1)}",
        )  # fmt: skip
    axes.set_xscale("symlog", linthresh=LINEAR)
    axes.set_xlim(-1e-3, 2.5)
    axes.set_xticks([0, 1e-3, 1e-2, 0.1, 1], ["0", ".001", ".01", ".1", "1"])
    axes.minorticks_off()
    axes.set_title(table.name, color=INK, fontsize=11, pad=5)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)


def picture(tables: list[Table]) -> Figure:
    """Return a panel for each data set, the objectives below one another."""
    from matplotlib.patches import Patch

    objectives, most = by_rank(tables), max(tables[0].scores)
    left = max(163, 14 + 9 * max(map(len, objectives)))  # pixels for their names
    height, width = 145 + 30 * len(objectives), left + 12 + 153 * len(tables)
    figure = new_figure(height, "energy distance to the data (left is better)", "", width)
    panels = figure.subplots(1, len(tables), sharex=True, sharey=True, squeeze=False)[0]
    for panel, table in zip(panels, tables, strict=True):
        draw_table(panel, table, objectives, most)
    figure.text(0.5, 8 / height, AXIS, ha="center", va="bottom", color=INK, fontsize=9)
    panels[0].set_yticks(range(len(objectives)), objectives, fontsize=10)
    panels[0].set_ylim(len(objectives) - 0.4, -0.6)
    keys = panels[0].get_legend_handles_labels()[0]
    band = Patch(color="#d0d0d0", label="real data against real, ± 3 standard deviations")
    figure.legend(handles=[*reversed(keys), band], loc="upper center", bbox_to_anchor=(0.5, 1 - 24 / height), ncols=3,
                  fontsize=10, frameon=False, labelcolor=INK)  # fmt: skip
    figure.subplots_adjust(left=left / width, right=1 - 12 / width, bottom=50 / height, top=1 - 82 / height, wspace=0.07)
    return figure


def draw(words: list[str]) -> Path:
    """Carry out the command; returns the file written."""
    settings, _ = read_settings(words, Settings)
    check_ends("out", settings.out, ".png")
    tables = read_tables(settings.log)
    save_figure(picture(tables), settings.out, Source=digest(tables))
    return settings.out


def main(words: list[str]) -> int:
    return front(words, __doc__, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
