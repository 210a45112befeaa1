"""The HTML report: what it says, that it needs no network, and that a browser shows it on a phone, in both schemes."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common.errors import UserError
from run_files.experiment_log import ExperimentLog
from run_files.run_folder import RunFolder
from scripts import log, report

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python launcher.py run_name=first note='<b>&'"


class Outline(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def config_of(name: str, max_steps: int | None = None) -> str:
    """What every run's config.yaml says."""
    return f"run_name: {name}\noutput_dir: outputs\nepochs: 7\nmax_steps: {json.dumps(max_steps)}\n"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two finished runs with scores and pictures."""
    for name, lr, distance in (("first", 0.001, 0.05), ("second", 0.002, 0.0001)):
        folder = RunFolder(tmp_path / "runs" / name)
        folder.write_config(config_of(name) + f"seed: 3\ncommand: {json.dumps(COMMAND)}\noptimizer: {{lr: {lr}}}\n", [])
        for step in (10, 20, 30):
            folder.metrics.append(step, 1, step / 2, {"train/loss": 5 / step})
            folder.metrics.append(step, 1, step / 2, {"eval/energy_distance": distance, "eval/loss": 1.0 + step})
        scores = {
            "eval/energy_distance": distance,
            "eval/energy_distance_floor": 0.0001,
            "eval/energy_distance_floor_sd": 0.001,
        }
        scores |= {"oracle/flow_map_error": 0.3, "oracle/flow_map_error_se": 0.01, "oracle/flow_map_error_exact_field": 0.2}
        folder.status.write("finished", 30, 1, 7200.0, scores, device="cpu (test, 1 threads)")
        (folder.path / "samples").mkdir()
        for step in range(6):
            Image.new("RGB", (8, 8), "red").save(folder.path / "samples" / f"step_{step:08d}.png")
    return tmp_path


def outline(path: Path) -> Outline:
    parsed = Outline()
    parsed.feed(path.read_text(encoding="utf-8"))
    return parsed


def test_it_tells_what_was_run_and_what_came_of_it(output: Path) -> None:
    path = report.report(["first", f"output_dir={output}", "price=2.5"])
    assert path == output / "reports" / "first.html"
    page = outline(path)
    for words in (
        COMMAND,
        "7,200 s",
        "cpu (test, 1 threads)",
        "5.00 (2.00 hours at 2.5)",
        "±\N{NO-BREAK SPACE}0.01",
        "+49.9 sd",
        "train/loss",
    ):
        assert words in page.text or escape(words) in path.read_text(), words
    assert "train longer" in page.text and "solver=rk4" in page.text and "has risen from its best" in page.text
    assert "<b>&" not in path.read_text()  # what a run is called cannot write HTML


def test_it_is_one_file_that_asks_for_nothing(output: Path) -> None:
    text = report.report(["first", "second", f"output_dir={output}"]).read_text()
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"|url\(([^)]*)\)", text)
    assert addresses and all((src or url).startswith("data:") for src, url in addresses)
    assert "<script" not in text and "@import" not in text


def test_pictures_have_words_and_decode(output: Path) -> None:
    page = outline(report.report(["first", f"output_dir={output}"]))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(len(image["alt"] or "") > 10 for image in images)
    pngs = [image for image in images if "image/png" in (image["src"] or "")]
    assert [re.search(r"step (\d)", image["alt"] or "")[1] for image in pngs] == ["0", "2", "3", "5"]  # type: ignore[index]
    Image.open(io.BytesIO(base64.b64decode((pngs[0]["src"] or "").partition(",")[2]))).verify()


def test_the_error_budget_is_a_table_and_a_picture(output: Path) -> None:
    folder = RunFolder(output / "runs" / "second")
    parts = {"budget_field": 0.31, "budget_solver": 0.05, "budget_total": 0.3, "budget_field_share": 1.04}
    scores = {f"oracle/{name}": value for name, value in (parts | {"budget_solver_share": -0.04}).items()}
    scores |= {f"oracle/{name}_t{k}": 0.1 for name in ("velocity_error", "flow_map_error") for k in range(8)}
    folder.status.write("finished", 30, 1, 7200.0, scores, device="cpu")
    page = outline(report.report(["first", "second", f"output_dir={output}"]))
    assert page.text.count("what was learned wrongly") == 1 and "104%" in page.text and "-4%" in page.text
    described = [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img"]
    assert any("field 0.31, solver 0.05" in words and "of second" in words for words in described)


def test_the_newest_picture_of_neighbours_stands_by_itself(output: Path) -> None:
    for step, color in ((0, "red"), (5, "blue")):
        Image.new("RGB", (8, 8), color).save(output / f"runs/first/samples/step_{step:08d}_neighbours.png")
    page = outline(report.report(["first", f"output_dir={output}"]))
    pngs = [attributes for tag, attributes in page.tags if tag == "img" and "image/png" in (attributes["src"] or "")]
    assert [re.search(r"step (\d)", image["alt"] or "")[1] for image in pngs] == ["0", "2", "3", "5", "5"]  # type: ignore[index]
    shown = Image.open(io.BytesIO(base64.b64decode((pngs[-1]["src"] or "").partition(",")[2])))
    assert shown.getpixel((0, 0)) == (0, 0, 255) and "nearest to training images" in (pngs[-1]["alt"] or "")
    assert page.text.index("Samples over time") < page.text.index("Is it copying?")


def test_what_was_expected_stands_above_what_came(output: Path) -> None:
    config = output / "runs/first/config.yaml"
    config.write_text(config.read_text() + "log: {expect: under 0.002, reason: null}\nguidance: null\n")
    path = report.report(["first", "second", f"output_dir={output}"])
    page = outline(path)
    assert path.name == "first_second.html"
    differs = page.text[page.text.index("What differs") : page.text.index("Scores side by side")]
    assert "log.expect" not in differs and "guidance" not in differs and "optimizer.lr" in differs
    assert page.text.index("Expected before the run: under 0.002") < page.text.rindex("eval/energy_distance")


def test_numbers_keep_to_a_line() -> None:
    for text in ("2.211e-05", "0.0001 ± 0.0004", "+49.9 sd", "-0.02", "± 0.01"):
        assert report.NUMBER.fullmatch(text), text
    assert not report.NUMBER.fullmatch("cpu (test)")


def test_several_runs_stand_side_by_side(output: Path) -> None:
    page = outline(report.report(["first", "second", f"output_dir={output}"]))
    assert page.text.index("What differs") < page.text.index("optimizer.lr") < page.text.index("Scores side by side")
    assert "cannot tell these samples from real ones" in page.text  # of the second
    headings = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert headings[0] == "h1" and headings.count("h1") == 1
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.1)."""
    levels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [level / 12.92 if level <= 0.03928 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_in_every_scheme() -> None:
    schemes = re.findall(r"(--ink:[^}]*)", (ROOT / "scripts/report.html").read_text())
    assert len(schemes) == 3  # light, dark, paper
    colors: dict[str, str] = {}
    for scheme in schemes:
        colors |= dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        for text in ("ink", "quiet", "link") if scheme is not schemes[2] else ("ink", "quiet"):
            for ground in ("paper", "card"):
                high, low = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground, colors)


def advised(output: Path, name: str, step: int = 2000, max_steps: int | None = None, **scores: float) -> str:
    """What a run that ended at that step with these scores is told to try next."""
    folder = RunFolder(output / "runs" / name)
    folder.write_config(config_of(name, max_steps), [])
    folder.status.write("finished", step, 1, 1.0, {key.replace("__", "/"): value for key, value in scores.items()})
    return " ".join(report.advice(report.record_of(output, name)))


def test_who_is_to_train_longer_gets_the_command_that_does(tmp_path: Path) -> None:
    far = {"eval__energy_distance": 1.0, "eval__energy_distance_floor": 0.0, "eval__energy_distance_floor_sd": 0.1}
    assert "run_name=a resume=true epochs=14" in advised(tmp_path, "a", **far)
    assert "run_name=b resume=true max_steps=1200" in advised(tmp_path, "b", 600, 600, **far)
    assert "epochs" not in advised(tmp_path, "c", 600, 600, **far)


@pytest.mark.parametrize(("upper", "word"), [(0.5, "above"), (1.5, "cannot tell")])
def test_a_score_is_told_from_real_by_the_upper_end_of_its_floor(tmp_path: Path, upper: float, word: str) -> None:
    """Five standard deviations above a floor with a long tail is no more than real data does."""
    scores = {"": 1.0, "_floor": 0.0, "_floor_sd": 0.2, "_floor_q99": upper}
    said = advised(tmp_path, "x", **{f"eval__energy_distance{end}": value for end, value in scores.items()})
    assert word in said
    (row,) = report.score_rows(report.record_of(tmp_path, "x"))
    assert row[-1] == ("+5.0 sd, above it" if upper < 1 else "+5.0 sd, not above it")


def test_short_runs_and_errors_far_above_the_solvers_own_are_named(tmp_path: Path) -> None:
    assert "after 20 optimizer steps" in advised(tmp_path, "short", 20, 20)
    above = advised(tmp_path, "above", oracle__flow_map_error=0.5, oracle__flow_map_error_exact_field=0.04)
    assert "12.5 times" in above and "optimizer steps" not in above
    fine = advised(tmp_path, "fine", oracle__flow_map_error=0.1, oracle__flow_map_error_exact_field=0.04)
    assert fine.startswith("Nothing stands out")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_readable_and_without_scrolling_sideways(width: int, output: Path, tmp_path: Path) -> None:
    text = report.report(["first", "second", f"output_dir={output}"]).read_text()
    script = (
        "const f = document.querySelector('iframe'); f.onload = () => { const d = f.contentDocument;"
        " const broken = [...d.images].filter(i => !i.naturalWidth).length;"
        " const lines = c => { const r = d.createRange(); r.selectNodeContents(c);"
        " return r.getBoundingClientRect().height / 24 };"
        " const cut = [...d.querySelectorAll('td')].filter(c => /^\\S{1,12}$/.test(c.textContent) && lines(c) > 1.5).length;"
        " document.title = [d.documentElement.scrollWidth, broken, d.images.length, cut].join(' ') }"
    )
    frame = (
        f"<iframe style='border:0;width:{width}px;height:900px' srcdoc=\"{escape(text)}\"></iframe><script>{script}</script>"
    )
    (tmp_path / "frame.html").write_text(f"<!doctype html><title>-</title><body>{frame}")
    shown = browse(tmp_path, "--dump-dom", "--virtual-time-budget=5000", (tmp_path / "frame.html").as_uri())
    wide, broken, images, cut = map(int, re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", shown).groups())  # type: ignore[union-attr]
    assert wide <= width and broken == 0 and images >= 10 and cut == 0  # no number goes on in a second line


def browse(folder: Path, *words: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", profile, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


@pytest.mark.parametrize(
    "words, sentence",
    [([], "name a run"), (["frist"], "did you mean first"), (["first", "price=cheap"], "price takes a number"),
     (["first", "price=nan"], "of at least 0"), (["first", "price=-1"], "of at least 0"),
     (["first", "prize=1"], "cannot use 'prize=1'"),
     (["first", "out=report.pdf"], "must end in .html")],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    words: list[str], sentence: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([*words, f"output_dir={output}"]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_notes_go_under_observations_and_leave_all_else_alone(tmp_path: Path) -> None:
    path = tmp_path / "LOG.md"
    for name in ("one", "two"):
        ExperimentLog(path).begin(name, f"python launcher.py run_name={name}", "Configuration: -")
    before = path.read_text()
    assert log.main(["note", "one", "strays  on the\nseparatrix", f"file={path}"]) == 0
    assert log.main(["note", "one", "a second thought", f"file={path}"]) == 0
    after = path.read_text()
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert [line.partition(": ")[2] for line in added] == ["strays on the separatrix", "a second thought"]
    assert [line for line in after.splitlines() if line in before.splitlines()] == before.splitlines()
    observations = after.index("Observations:")
    assert observations < after.index(added[0]) < after.index(added[1]) < after.index("Issues:") < after.index("## two")


def test_a_note_needs_a_section_that_a_run_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "LOG.md"
    path.write_text("# Log\n\n## Plans\n\nObservations:\n")
    assert log.main(["note", "Plans", "words", f"file={path}"]) == 1
    assert "has no section of a run Plans" in capsys.readouterr().err and "words" not in path.read_text()


def test_a_note_on_nothing_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert log.main(["note", "nobody", "words", f"file={tmp_path / 'LOG.md'}"]) == 1
    assert f"there is no file {tmp_path / 'LOG.md'}; file= names the log" in capsys.readouterr().err
    with pytest.raises(UserError, match="say python"):
        log.note(["note", "one"])


@pytest.mark.parametrize("kind", ["a link that leads out", "a pipe", "text"])
def test_a_picture_that_cannot_be_read_is_left_out_with_one_line(output: Path, kind: str, capsys) -> None:
    path = output / "runs/first/samples/step_00000003.png"
    path.unlink()
    if kind == "text":
        path.write_text("no picture")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(output / "runs/second/samples/step_00000003.png")
    assert report.main(["first", f"output_dir={output}"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{output / 'reports/first.html'}\n"
    assert said.err.startswith(f"note: {path} is ") and said.err.endswith("; it is left out of the page\n")
    assert said.err.count("\n") == 1
    pngs = [a for tag, a in outline(output / "reports/first.html").tags if tag == "img" and "image/png" in (a["src"] or "")]
    assert [re.search(r"step (\d)", image["alt"] or "")[1] for image in pngs] == ["0", "1", "4", "5"]  # type: ignore[index]
