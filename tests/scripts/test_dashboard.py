"""trackio's dashboard in a real browser: what a run logs is what its pages show."""

import html
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import launcher
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
Look = Callable[..., str]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Look]:
    """look(path, **query) gives a page's text (or, with dom=True, its HTML) after two runs, one of them resumed."""
    folder = tmp_path_factory.mktemp("dashboard")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "GRADIO_SERVER_PORT": str(port)}
    small = [
        f"output_dir={folder}", f"log.file={folder / 'LOG.md'}", "device=cpu", "evaluation=generator",
        "evaluation.samples=32", "evaluation.final_samples=32",
        "dataloaders.epoch_size=256", "batch_size=64", "log_every=1", "solver.steps=2",
        "model.width=16", "trackio.project=shown",
        "evaluation.metrics={energy_distance: {_target_: evaluation.metrics.energy_distance.EnergyDistance}}",
    ]  # fmt: skip
    runs = [["run_name=alpha", "epochs=1", *small], ["run_name=beta", "epochs=1", "optimizer.lr=0.00123", *small],
            ["run_name=beta", "resume=true", "epochs=2", f"output_dir={folder}"]]  # fmt: skip
    code = f"import launcher\nfor words in {runs!r}:\n    launcher.run(*words)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    command = [sys.executable, ROOT / "launcher.py", "--dashboard", "trackio.project=shown"]
    server = subprocess.Popen(command, env=environment | {"BROWSER": "true"}, stdout=subprocess.PIPE, text=True)
    told = server.stdout
    assert told is not None
    address = ""
    while not address and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", told.readline())
        address = found[0] if found else ""
    while server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=60).close()
            break
        except OSError:
            time.sleep(0.2)

    def look(path: str, dom: bool = False, **query: str) -> str:
        words = "&".join(f"{key}={value}" for key, value in {"project": "shown", **query}.items())
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,3000",
        ]
        target = f"{address}/{path}?{words}"
        command = [str(CHROMIUM), *flags, "--virtual-time-budget=20000", "--dump-dom", target]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
        text = re.sub(r"<(script|style)\b.*?</\1>", " ", shown, flags=re.DOTALL)
        return shown if dom else re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text)))

    yield look
    server.terminate()
    server.wait(600)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_metrics_page_has_a_plot_for_each_metric_and_both_runs(pages: Look) -> None:
    text = pages("")
    assert "alpha" in text and "beta" in text and "Runs (2)" in text
    places = [text.index(f"{section} (") for section in ("eval", "train", "charts")]
    assert places == sorted(places)
    for metric in ("energy_distance", "loss", "grad_norm", "lr"):
        assert re.search(rf"\b{metric}\b", text), metric


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_resumed_run_is_one_line_of_the_table(pages: Look) -> None:
    rows = re.findall(r"(alpha|beta) (\d+) (\d+)", pages("runs"))
    assert [(name, int(last)) for name, _, last in sorted(rows)] == [("alpha", 4), ("beta", 8)]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_media_page_shows_the_pictures(pages: Look) -> None:
    shown = pages("media", dom=True)
    assert "Images (3)" in re.sub(r"<[^>]*>", "", shown)
    assert len(re.findall(r"<img[^>]*src=\"[^\"]*\.png", shown)) >= 3


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_runs_page_has_its_settings(pages: Look) -> None:
    text = pages("run", selected_run="beta")
    assert "0.00123" in text and "kmeans" in text and "FlowMatchingLoss" in text


@pytest.mark.slow
def test_a_tracker_without_a_dashboard_says_where_to_look() -> None:
    with pytest.raises(UserError, match="tensorboard --logdir"):
        launcher.dashboard(["tracker=tensorboard"])
