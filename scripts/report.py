#!/usr/bin/env python
"""One self-contained HTML page about one run or several: what was run, how it went, what came of it, what to try next.

    python scripts/report.py first_flow
    python scripts/report.py seeds_seed=0 seeds_seed=1 out=seeds.html price=2.5

Words: run names; out (outputs/reports/<names>.html), output_dir (outputs here, else the repository's), price (of an hour of
the device, in your currency; adds the cost). The page needs no network, reads on a phone, in dark mode and on paper.
"""

from __future__ import annotations

import hashlib
import io
import re
import shlex
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from matplotlib import rc_context

from common.command_line import check_ends, front, outputs
from common.errors import UserError
from common.files import write_atomically
from common.ranges import NotNegative
from configuration.compose import compose_config, resolved, twice_as_long
from configuration.nodes import flat
from configuration.settings import known_settings, unusable
from evaluation.pictures import new_figure
from run_files.metrics_file import BESIDE, COPIES
from scripts.run_record import Figure, RunRecord, record_of
from scripts.runs import number, rows_of, rows_that_differ, state
from visualizers.curves import BAND, MILESTONES, draw_metric, draw_milestones, metrics_of, series

if TYPE_CHECKING:
    from evaluation.milestones import Milestones

NEIGHBOURS = "samples of {} that lie nearest to training images, each beside the five nearest"
PICTURES = 4  # samples over time: the first, the last and what lies between at even spacing
UNINTERESTING = ("command", "overrides", "changed", "run_name", "output_dir", "resume", "overwrite", "show", "log")
SHOWN_CHOICES = ("choices.show", "choices.log")
LONGEST = 100  # letters of the names of runs in the name of a file
SHORT = 200  # optimizer steps in which hardly any network has learned its data
FAR_ERROR = 3.0  # times the solver's own flow-map error that a network's may be before it is named
FAR = 3.0  # standard deviations of its floor that a score may lie above one without an upper end, to differ from real
NUMBER = re.compile(r"[-+±]? ?[\d.,]+(e[-+]?\d+)?( ± [\d.e+-]+)?( \w+)?")  # perhaps with its error or unit


@dataclass(frozen=True)
class Settings:
    """The command line, run names aside."""

    out: Path | None = None
    output_dir: Path | None = None
    price: NotNegative | None = None


def breakable(text: str) -> Markup:
    """Return HTML of a text whose names may go on in a new line after their parts; numbers stay whole."""
    return Markup(re.sub(r"(?<=[A-Za-z])([/_.=])(?=\w)", r"\1<wbr>", str(escape(text))).replace("± ", "±&nbsp;"))


def curve_figures(runs: list[RunRecord]) -> list[Figure]:
    """Return a figure for the training loss and for each score the runs logged."""
    by_name = {run.name: run.rows for run in runs}
    figures = []
    for metric in dict.fromkeys(name for run in runs for name in metrics_of(run.rows)):
        drawing = new_figure(300, "", "", 420)
        axes = drawing.subplots()
        draw_metric(axes, metric, by_name)
        for milestones in held_against(runs):
            draw_milestones(axes, milestones.scores.get(metric, []))
        if len(runs) > 1:
            axes.legend(fontsize=8, frameon=False)
        drawing.subplots_adjust(left=0.15, right=0.97, bottom=0.16, top=0.9)
        file = io.BytesIO()
        with rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
            drawing.savefig(file, format="svg", metadata={"Date": None})
        ends = [f"{name} ends at {number(float(series(rows, metric)[-1, 1]))}" for name, rows in by_name.items()
                if len(series(rows, metric))]  # fmt: skip
        alt = f"{metric} over optimizer steps: {', '.join(ends)}"
        figures.append(Figure("svg+xml", file.getvalue(), alt, "; ".join(ends)))
    return figures


def held_against(runs: list[RunRecord]) -> list[Milestones]:
    """Return the milestones of the runs' recipes, each once."""
    from evaluation.milestones import milestones_for  # slow

    found = [milestones_for(run.config)[0] for run in runs]
    return [one for i, one in enumerate(found) if one is not None and one not in found[:i]]


def drawn_figures(run: RunRecord, visualizer: str) -> list[Figure]:
    """Return the picture that visualizers/<visualizer>.py draws of the last scores, where they have its numbers."""
    found = import_module(f"visualizers.{visualizer}").picture_of_scores(run.name, run.scores)
    if found is None:
        return []
    drawing, alt, caption = found
    file = io.BytesIO()
    drawing.savefig(file, format="png")
    return [Figure("png", file.getvalue(), alt, caption)]


def sample_figures(run: RunRecord) -> list[Figure]:
    """Return some of the run's own pictures, in order of time."""
    found = run.figures("samples", "samples of {} beside real data")
    places = {round((len(found) - 1) * i / (PICTURES - 1)) for i in range(PICTURES)}
    return [found[place] for place in sorted(places)] if found else []


def score_rows(run: RunRecord) -> list[list[str]]:
    """Name, value, standard error, noise floor, distance from the floor, of every score."""
    rows = []
    for name, value in run.scores.items():
        if value is None or name.endswith(BESIDE):
            continue
        error, floor, sd = (run.scores.get(f"{name}{suffix}") for suffix in ("_se", "_floor", "_floor_sd"))
        shown = floors([run], name)
        far = "" if floor is None or not sd else f"{(value - floor) / sd:+.1f} sd"
        rare = run.scores.get(f"{name}_p")
        far += "" if rare is None else f", p = {rare:.2g}"
        upper, lower = (run.scores.get(f"{name}_floor_{end}") for end in ("q99", "q01"))
        far += "" if upper is None else f", {'above' if value > upper else 'not above'} it"
        far += "" if lower is None else f", {'below' if value < lower else 'not below'} it"
        rows.append([name, number(value), "" if error is None else f"± {number(error)}", shown, far])
    return rows


def floors(runs: list[RunRecord], name: str) -> str:
    """Return what real data score against real: of runs on different data, each of them."""
    found = [(run.scores.get(f"{name}_floor"), run.scores.get(f"{name}_floor_sd")) for run in runs]
    known = [number(floor) + ("" if sd is None else f" ± {number(sd)}") for floor, sd in found if floor is not None]
    own = [value for run in runs if (value := run.scores.get(f"{name}_train")) is not None]
    return ", ".join(dict.fromkeys([*known, *(f"training set {number(value)}" for value in own)]))


def fact_rows(run: RunRecord, price: float | None) -> list[list[str]]:
    """Return what was run, where, and for how long."""
    from evaluation.milestones import standing  # slow

    status, choices = run.status, run.config.get("choices", {})
    hours = status.get("seconds", 0.0) / 3600
    rows = [
        ["state", state(run.folder, status) + (f": {status['why']}" if status.get("why") else "")],
        ["steps", f"{status.get('step', 0):,} (epoch {status.get('epoch', 0)})"],
        ["time in the loop", f"{status.get('seconds', 0.0):,.0f} s"],
        ["hardware", ", ".join(str(status[key]) for key in ("device", "host") if status.get(key))],
        ["started, last written", f"{status.get('started', '-')}, {status.get('updated', '-')}"],
        ["seed", str(run.config.get("seed", "-"))],
        ["parts", ", ".join(f"{group}={choice}" for group, choice in choices.items() if choice)],
    ]
    if words := standing(run.config, run.rows, run.made):
        rows.append(["milestones", words])
    return rows + ([] if price is None else [["cost", f"{hours * price:.2f} ({hours:.2f} hours at {price:g})"]])


def difference_rows(run: RunRecord) -> list[list[str]]:
    """Return settings that differ from those of the same run without its overrides."""
    base = resolved(compose_config([f"run_name={run.name}"]))
    columns = [flat(base), flat(run.config)]
    return telling(rows_that_differ(columns, str, ()), "choices")


def telling(rows: list[list[str]], *more: str) -> list[list[str]]:
    """Return the rows of settings that say something of the training; one that is null here and missing there does not."""
    kept = [row for row in rows if row[0].split(".")[0] not in (*UNINTERESTING, *more) and row[0] not in SHOWN_CHOICES]
    return [row for row in kept if not set(row[1:]) <= {"None", "-"}]


def go_on(run: RunRecord) -> str:
    """Return the command that trains a finished run for as long again."""
    place = str(run.config["output_dir"])
    folder = "" if place == "outputs" else f" output_dir={shlex.quote(place)}"
    return f"python launcher.py run_name={run.name} resume=true {twice_as_long(run.config)}{folder}"


def advice(run: RunRecord) -> list[str]:
    """Return what the numbers suggest, most urgent first."""
    scores, name, steps = run.scores, run.name, run.status.get("step", 0)
    found = []
    if state(run.folder, run.status) in ("interrupted", "failed", "lost"):
        found.append(f"It did not finish: python launcher.py run_name={name} resume=true goes on.")
    elif state(run.folder, run.status) == "finished" and steps < SHORT:
        found.append(f"It ended after {steps:,} optimizer steps, too few for its scores to say much: train longer.")
    value, floor, sd = (scores.get(f"eval/energy_distance{suffix}") for suffix in ("", "_floor", "_floor_sd"))
    if value is not None and floor is not None and sd:
        upper = scores.get("eval/energy_distance_floor_q99")  # older runs have none
        if value > (floor + FAR * sd if upper is None else upper):
            found.append(
                f"The energy distance is {(value - floor) / sd:.0f} standard deviations above its floor: train longer, "
                f"then try another optimizer.lr or a larger model."
            )
        else:
            found.append(
                "The energy distance cannot tell these samples from real ones; ask more samples of it "
                "(evaluation.final_samples) or look at the other scores."
            )
    error, exact = scores.get("oracle/flow_map_error"), scores.get("oracle/flow_map_error_exact_field")
    if error is not None and exact is not None and exact > 0.5 * error:
        found.append("Most of the flow-map error is the solver's own: more solver.steps, or solver=rk4 or dopri5.")
    elif error is not None and exact is not None and error > FAR_ERROR * exact:
        found.append(
            f"The flow-map error is {error / exact:.1f} times that of the same solver on the exact field: the rest is the "
            "network's. Train longer, then try a larger model."
        )
    one, four = scores.get("eval/energy_distance_1nfe"), scores.get("eval/energy_distance_4nfe")
    if one is not None and four is not None and sd and one - four > FAR * sd:
        found.append("One evaluation is still worse than four: train longer, or with a larger loss.time_sampler.ratio.")
    copying = scores.get("oracle/copying")
    if copying is not None and copying <= COPIES:
        found.append("It copies its training data (oracle/copying): more data, flips, model.dropout, a smaller network.")
    ratio = scores.get("eval/nearest_distance_ratio")
    if ratio is not None and ratio < 0.8:
        found.append("Samples are closer to training data than held-out data is: model.dropout, a shorter run, more data.")
    losses = [row["eval/loss"] for row in run.rows if row.get("eval/loss") is not None]
    if one is None and len(losses) > 2 and losses[-1] > 1.05 * min(losses):  # a learned map's loss moves with its targets
        found.append("eval/loss has risen from its best, which is saved as <run_name>_best.pt; patience=5 stops there.")
    whole = run.config.keys() >= {"output_dir", "max_steps", "epochs"}  # a folder of anyone's may lack them
    if whole and state(run.folder, run.status) == "finished" and "rain longer" in " ".join(found):
        found.append(f"To go on to twice the length: {go_on(run)}")
    return found or ["Nothing stands out; the next seed tells how much of this is luck."]


def section(run: RunRecord, price: float | None) -> dict[str, Any]:
    """Return what the page says of one run."""
    from visualizers.error_budget import table  # slow

    return {
        "name": run.name, "command": run.command, "facts": fact_rows(run, price), "samples": sample_figures(run),
        "neighbours": run.figures("neighbours", NEIGHBOURS)[-1:], "memory": drawn_figures(run, "memorisation"),
        "budget": drawn_figures(run, "error_budget"), "budget_rows": table(run.scores),
        "expected": (run.config.get("log") or {}).get("expect"),
        "scores": score_rows(run), "advice": advice(run), "settings": difference_rows(run),
    }  # fmt: skip


def page(runs: list[RunRecord], price: float | None) -> str:
    """Return the whole document."""
    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=here, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = breakable
    environment.tests["numeric"] = NUMBER.fullmatch
    names = [name for name in dict.fromkeys(n for run in runs for n in run.scores) if not name.endswith(BESIDE)]
    of_runs = rows_of([run.scores for run in runs], number, names)
    side_by_side = [[*row, floors(runs, row[0])] for row in of_runs]
    return environment.get_template("report.html").render(
        title=", ".join(run.name for run in runs), names=[run.name for run in runs],
        differing=telling(rows_that_differ([flat(run.config) for run in runs], str, ())), side_by_side=side_by_side,
        runs=[section(run, price) for run in runs], curves=curve_figures(runs),
        band=BAND + MILESTONES * bool(held_against(runs)),
    )  # fmt: skip


def file_name(runs: list[RunRecord]) -> str:
    """Return all names, or where those are long the first and a hash of all: other runs get another file."""
    names = "_".join(run.name for run in runs)
    digest = hashlib.sha256("\n".join(run.name for run in runs).encode()).hexdigest()[:8]
    return names if len(names) <= LONGEST else f"{runs[0].name[:LONGEST]}_and_{len(runs) - 1}_{digest}"


def report(words: list[str]) -> Path:
    """Carry out the command; returns the file written."""
    settings, names = known_settings(words, Settings)
    if not names:
        raise UserError("name a run, as in `python scripts/report.py first_flow`; `python scripts/runs.py list` shows them")
    output_dir = settings.output_dir or outputs()
    for name in names:
        if "=" in name and not (output_dir / "runs" / name).is_dir():
            raise UserError(unusable(name, Settings) + "; and no run has that name")
    runs = [record_of(output_dir, name) for name in dict.fromkeys(names)]
    path = settings.out or output_dir / "reports" / f"{file_name(runs)}.html"
    check_ends("out", path, ".html")
    write_atomically(path, page(runs, settings.price).replace(str(Path.home()), "~"))
    return path


def main(words: list[str]) -> int:
    return front(words, __doc__, report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
