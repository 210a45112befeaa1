#!/usr/bin/env python
"""One self-contained HTML page about one run or several: what was run, how it went, what came of it, what to try next.

    python scripts/report.py first_flow
    python scripts/report.py seeds_seed=0 seeds_seed=1 out=seeds.html price=2.5

Words: run names; out (outputs/reports/<names>.html), output_dir (outputs here, else the repository's), price (of an hour of
the device, in your currency; adds the cost). The page needs no network, reads on a phone, in dark mode and on paper.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import shlex
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import front, outputs, split, unknown
from common.errors import UserError
from common.files import write_atomically
from run_files.run_folder import RunFolder
from scripts.runs import find_run, flat, number, overrides, read_config, rows_that_differ, state
from visualizers.curves import BAND

if TYPE_CHECKING:
    from collections.abc import Iterable

PICTURES = 4  # samples over time: the first, the last and what lies between at even spacing
UNINTERESTING = ("command", "overrides", "changed", "run_name", "output_dir", "resume", "overwrite", "show", "log")
SHOWN_CHOICES = ("choices.show", "choices.log")
LONGEST = 100  # letters of the names of runs in the name of a file
NO_SCORES = ("_floor", "_floor_sd", "_floor_q99", "_se", "_train", "/seconds")  # ends of what stands beside a score
SHORT = 200  # optimizer steps in which hardly any network has learned its data
FAR_ERROR = 3.0  # times the solver's own flow-map error that a network's may be before it is named
FAR = 3.0  # standard deviations of its floor that a score may lie above one without an upper end, to be told from real
STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1b1b; --quiet: #55585c; --paper: #ffffff; --line: #c9ccd0; --card: #f4f5f7; --link: #0b57a4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --quiet: #b4b8bd; --paper: #16181b; --line: #44484d; --card: #212428; --link: #8ec2ff }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.6rem; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line) }
p.quiet, figcaption, caption { color: var(--quiet); text-align: left }
a { color: var(--link) }
pre { background: var(--card); padding: .75rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin-top: 1rem } .wide:focus { outline: 2px solid var(--link) }
table { border-collapse: collapse }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left;
  vertical-align: top; font-variant-numeric: tabular-nums } th[scope=row] { min-width: 9rem } td { min-width: 4rem }
.hint { display: none; color: var(--quiet); margin: 1rem 0 -.75rem }
@media screen and (max-width: 40rem) { .hint { display: block } }
td { overflow-wrap: normal; word-break: keep-all } .number { white-space: nowrap }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)) }
figure { margin: 0 } figure img { width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line) }
@media print {
  :root { color-scheme: light; --ink: #000000; --quiet: #333333; --paper: #ffffff; --card: #ffffff; --line: #999999 }
  body { max-width: none; font-size: 10pt } figure, table, pre { break-inside: avoid } .wide { overflow: visible } }
"""


@dataclass
class Told:
    """What is known of one run."""

    folder: RunFolder
    status: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def scores(self) -> dict[str, float | None]:
        return self.status.get("scores", {})

    def pictures(self, kind: str) -> list[tuple[Path, int]]:
        """Of that kind, samples or neighbours, with their steps and in their order."""
        return [(path, step) for name, path, step in self.folder.pictures() if name == kind]

    @property
    def command(self) -> str:
        return str(self.config.get("command", "python launcher.py " + " ".join(overrides(self.folder).split("\n"))))


def told(output_dir: Path, name: str) -> Told:
    folder = find_run(output_dir, name)
    return Told(folder, folder.status.read(), read_config(folder), folder.metrics.read())


def table(header: list[str], rows: Iterable[list[str]], caption: str) -> str:
    """Return a table that scrolls by itself where the page is narrower; first cells are headings of their rows."""
    head = "".join(f'<th scope="col">{breakable(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{breakable(name)}</th>' + "".join(cell_of(cell) for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    told = f"<caption>{escape(caption)}</caption>"
    scroll = '<p class="hint">Scroll the table sideways for more columns.</p>' if len(header) > 2 else ""
    scroll += f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}">'
    return f"{scroll}<table>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def cell_of(text: str) -> str:
    """Return a cell; one that is a number, perhaps with its error or unit, keeps to a line."""
    numeric = re.fullmatch(r"[-+±]? ?[\d.,]+(e[-+]?\d+)?( ± [\d.e+-]+)?( \w+)?", text)
    return f'<td class="number">{breakable(text)}</td>' if numeric else f"<td>{breakable(text)}</td>"


def breakable(text: str) -> str:
    """Return HTML of a text whose names may go on in a new line after their parts; numbers stay whole."""
    return re.sub(r"(?<=[A-Za-z])([/_.=])(?=\w)", r"\1<wbr>", escape(text)).replace("± ", "±&nbsp;")


def figure(kind: str, content: bytes, alt: str, caption: str) -> str:
    data = base64.b64encode(content).decode()
    image = f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def curve_figures(runs: list[Told]) -> list[str]:
    """Return a figure for the training loss and for each score the runs logged."""
    from matplotlib import rc_context

    from evaluation.pictures import new_figure
    from visualizers.curves import draw_metric, metrics_of, series

    by_name = {run.name: run.rows for run in runs}
    figures = []
    for metric in dict.fromkeys(name for run in runs for name in metrics_of(run.rows)):
        drawing = new_figure(300, "", "", 420)
        axes = drawing.subplots()
        draw_metric(axes, metric, by_name)
        if len(runs) > 1:
            axes.legend(fontsize=8, frameon=False)
        drawing.subplots_adjust(left=0.15, right=0.97, bottom=0.16, top=0.9)
        file = io.BytesIO()
        with rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
            drawing.savefig(file, format="svg", metadata={"Date": None})
        ends = [f"{name} ends at {number(float(series(rows, metric)[-1, 1]))}" for name, rows in by_name.items()
                if len(series(rows, metric))]  # fmt: skip
        alt = f"{metric} over optimizer steps: {', '.join(ends)}"
        figures.append(figure("svg+xml", file.getvalue(), alt, "; ".join(ends)))
    return figures


def sample_figures(run: Told) -> list[str]:
    """Some of the run's own pictures, in order of time."""
    pictures = run.pictures("samples")
    last = len(pictures) - 1
    chosen = sorted({round(last * i / (PICTURES - 1)) for i in range(PICTURES)}) if pictures else []
    return [picture_figure(run, *pictures[i], "samples of {} beside real data") for i in chosen]


def neighbour_figures(run: Told) -> list[str]:
    """Return the newest picture of samples beside the training images nearest to them, or none."""
    alt = "samples of {} that lie nearest to training images, each beside the five nearest"
    return [picture_figure(run, *newest, alt) for newest in run.pictures("neighbours")[-1:]]


def picture_figure(run: Told, path: Path, step: int, alt: str) -> str:
    return figure(
        "png", run.folder.read_picture(path), f"{alt.format(run.name)}, at step {step}", f"{run.name}, step {step:,}"
    )


def score_rows(run: Told) -> list[list[str]]:
    """Name, value, standard error, noise floor, distance from the floor, of every score."""
    rows = []
    for name, value in run.scores.items():
        if value is None or name.endswith(NO_SCORES):
            continue
        error, floor, sd = (run.scores.get(f"{name}{suffix}") for suffix in ("_se", "_floor", "_floor_sd"))
        shown = floors([run], name)
        far = "" if floor is None or not sd else f"{(value - floor) / sd:+.1f} sd"
        upper = run.scores.get(f"{name}_floor_q99")
        far += "" if upper is None else f", {'above' if value > upper else 'not above'} it"
        rows.append([name, number(value), "" if error is None else f"± {number(error)}", shown, far])
    return rows


def floors(runs: list[Told], name: str) -> str:
    """Return what real data score against real: of runs on different data, each of them."""
    found = [(run.scores.get(f"{name}_floor"), run.scores.get(f"{name}_floor_sd")) for run in runs]
    known = [number(floor) + ("" if sd is None else f" ± {number(sd)}") for floor, sd in found if floor is not None]
    own = [value for run in runs if (value := run.scores.get(f"{name}_train")) is not None]
    return ", ".join(dict.fromkeys([*known, *(f"training set {number(value)}" for value in own)]))


def fact_rows(run: Told, price: float | None) -> list[list[str]]:
    """Return what was run, where, and for how long."""
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
    return rows + ([] if price is None else [["cost", f"{hours * price:.2f} ({hours:.2f} hours at {price:g})"]])


def difference_rows(run: Told) -> list[list[str]]:
    """Return settings that differ from those of the same run without its overrides."""
    from configuration.compose import compose_config, resolved

    base = resolved(compose_config([f"run_name={run.name}"]))
    columns = [flat(base), flat(run.config)]
    return telling(rows_that_differ(columns, str, ()), "choices")


def telling(rows: list[list[str]], *more: str) -> list[list[str]]:
    """Return the rows of settings that say something of the training; a setting that one run lacks and another leaves empty
    does not.
    """
    kept = [row for row in rows if row[0].split(".")[0] not in (*UNINTERESTING, *more) and row[0] not in SHOWN_CHOICES]
    return [row for row in kept if not set(row[1:]) <= {"None", "-"}]


def go_on(run: Told) -> str:
    """Return the command that trains a finished run for as long again."""
    from configuration.compose import twice_as_long

    place = run.config["output_dir"]
    folder = "" if place == "outputs" else f" output_dir={shlex.quote(place)}"
    return f"python launcher.py run_name={run.name} resume=true {twice_as_long(run.config)}{folder}"


def advice(run: Told) -> list[str]:
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
    ratio = scores.get("eval/nearest_distance_ratio")
    if ratio is not None and ratio < 0.8:
        found.append(
            "Samples are closer to the training data than held-out data is: model.dropout, a shorter run, more data."
        )
    losses = [row["eval/loss"] for row in run.rows if row.get("eval/loss") is not None]
    if one is None and len(losses) > 2 and losses[-1] > 1.05 * min(losses):  # a learned map's loss moves with its targets
        found.append("eval/loss has risen from its best, which is saved as <run_name>_best.pt; patience=5 stops there.")
    if run.config and state(run.folder, run.status) == "finished" and "rain longer" in " ".join(found):
        found.append(f"To go on to twice the length: {go_on(run)}")
    return found or ["Nothing stands out; the next seed tells how much of this is luck."]


def page(runs: list[Told], price: float | None) -> str:
    """Return the whole document."""
    title = ", ".join(run.name for run in runs)
    parts = [f"<h1>{escape(title)}</h1>"]
    if len(runs) > 1:
        columns = [flat(run.config) for run in runs]
        rows = telling(rows_that_differ(columns, str, ()))
        parts.append("<h2>What differs</h2>")
        parts.append(table(["setting", *(run.name for run in runs)], rows, "Settings that are not the same in all runs"))
        names = [name for name in dict.fromkeys(n for run in runs for n in run.scores) if not name.endswith(NO_SCORES)]
        shown = [
            [name, *(number(run.scores[name]) if name in run.scores else "-" for run in runs), floors(runs, name)]
            for name in names
        ]
        parts.append("<h2>Scores side by side</h2>")
        parts.append(table(["score", *(run.name for run in runs), "noise floor"], shown, "Last scores of each run"))
    for run in runs:
        parts.append(f"<h2>{escape(run.name)}</h2><pre><code>{escape(run.command)}</code></pre>")
        parts.append(table(["fact", "value"], fact_rows(run, price), "What was run, where, for how long"))
        copying = "Is it copying? Samples nearest to training images, beside those"
        for heading, pictures in (("Samples over time", sample_figures(run)), (copying, neighbour_figures(run))):
            parts.append(f'<h3>{heading}</h3><div class="cards pictures">{"".join(pictures)}</div>' if pictures else "")
        expected = (run.config.get("log") or {}).get("expect")
        parts.append("<h3>Scores</h3>")
        parts.append(f"<p>Expected before the run: <strong>{escape(str(expected))}</strong></p>" if expected else "")
        scores = score_rows(run)
        header = ["score", "value", "standard error", "noise floor", "above the floor by"]
        parts.append(
            table(header, scores, "Scores; floor: real data against real data") if scores else "<p>No scores yet.</p>"
        )
        parts.append("<h3>What to try next</h3><ul>" + "".join(f"<li>{escape(line)}</li>" for line in advice(run)) + "</ul>")
        parts.append("<details><summary>Settings that differ from the defaults</summary>")
        parts.append(table(["setting", "default", "here"], difference_rows(run), "Settings") + "</details>")
    parts += ["<h2>Curves</h2>", f'<div class="cards">{"".join(curve_figures(runs))}</div>']
    parts.append(f'<p class="quiet">{escape(BAND)}</p>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def file_name(runs: list[Told]) -> str:
    """Return all names, or where those are long the first and a hash of all: other runs get another file."""
    names = "_".join(run.name for run in runs)
    digest = hashlib.sha256("\n".join(run.name for run in runs).encode()).hexdigest()[:8]
    return names if len(names) <= LONGEST else f"{runs[0].name[:LONGEST]}_and_{len(runs) - 1}_{digest}"


def report(words: list[str]) -> Path:
    """Carry out the command; returns the file written."""
    settings, names = split(words, {"out": "", "output_dir": str(outputs()), "price": ""})
    if not names:
        raise UserError(
            "name a run, such as `python scripts/report.py first_flow`; `python scripts/runs.py list` shows them"
        )
    try:
        price = float(settings["price"]) if settings["price"] else None
    except ValueError as error:
        raise UserError(f"price takes a number, not {settings['price']!r}") from error
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"price takes a number of at least 0, not {settings['price']!r}")
    output_dir = Path(settings["output_dir"])
    for name in names:
        if "=" in name and not (output_dir / "runs" / name).is_dir():
            raise UserError(unknown(name, settings) + "; and no run has that name")
    runs = [told(output_dir, name) for name in dict.fromkeys(names)]
    path = Path(settings["out"]) if settings["out"] else output_dir / "reports" / f"{file_name(runs)}.html"
    if path.suffix != ".html":
        raise UserError(f"out={path} must end in .html")
    write_atomically(path, page(runs, price).replace(str(Path.home()), "~"))
    return path


def main(words: list[str]) -> int:
    return front(words, __doc__, report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
