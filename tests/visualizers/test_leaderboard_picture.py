"""The leaderboard's picture: numbers read off the tables, and the one in docs/ drawn from the tables of today."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.leaderboard_table import START, STOP, Row, full_text
from visualizers import leaderboard

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "EXPERIMENT_LOG.md"


def scored(*values: float, fifty: float) -> Row:
    floor = {f"eval/energy_distance{n}_floor{sd}": 0.0004 for n in ("", "_1nfe") for sd in ("", "_sd")}
    one = [{"eval/energy_distance_1nfe": v, "eval/energy_distance": fifty, "eval/nfe": 50.0} | floor for v in values]
    return Row(one, planned=len(values))


def written(path: Path) -> Path:
    """A log with two data sets; one objective failed on the second."""
    good, bad = scored(0.02, 0.04, fifty=-0.0003), scored(0.5, fifty=0.1)
    results = {"kmeans": {"bad": bad, "good": good}, "moons": {"bad": Row([], 1, failed=1), "good": scored(0.2, fifty=0.0)}}
    path.write_text(f"# Log\n\n{START}\n{full_text(results, 'told')}\n{STOP}\n| no | table |\n")
    return path


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    kmeans, moons = leaderboard.read_tables(written(tmp_path / "L.md"))
    assert (kmeans.name, moons.name) == ("kmeans", "moons") and kmeans.floor == (0.0004, 0.0004)
    assert kmeans.scores[1] == {"good": (0.03, 0.014), "bad": (0.5, 0.0)} and kmeans.scores[50]["good"] == (-0.0003, 0.0)
    assert moons.scores[1] == {"good": (0.2, 0.0)}
    assert leaderboard.by_rank([kmeans, moons]) == ["good", "bad"]


def test_the_points_stand_where_the_scores_say(tmp_path: Path) -> None:
    tables = leaderboard.read_tables(written(tmp_path / "L.md"))
    panel = leaderboard.picture(tables).axes[0]
    markers = {line.get_marker(): line.get_xydata() for line in panel.lines if line.get_marker() in ("o", "D")}
    assert np.allclose(sorted(markers["o"].tolist()), [[0.03, 0], [0.5, 1]])
    assert np.allclose(sorted(markers["D"].tolist()), [[-0.0003, 0], [0.1, 1]])
    low, high = panel.patches[0].get_extents().transformed(panel.transData.inverted()).intervalx
    assert np.allclose([low, high], [0.0004 - 3 * 0.0004, 0.0004 + 3 * 0.0004])


def test_the_picture_of_the_readme_shows_the_tables_of_today() -> None:
    shown = Image.open(ROOT / "docs" / "leaderboard.png")
    assert shown.info["Source"] == leaderboard.digest(leaderboard.read_tables(LOG)), (
        "the tables have changed: python visualizers/leaderboard.py out=docs/leaderboard.png"
    )


@pytest.mark.parametrize(
    "words, sentence",
    [(["log=nowhere.md"], "holds no leaderboard with scores"), (["out=x.pdf"], "must end in .png"),
     (["kmeans"], "cannot use 'kmeans'")],
)  # fmt: skip
def test_a_mistake_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaderboard.main(words) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
