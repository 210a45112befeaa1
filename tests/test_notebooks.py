"""The notebooks run from start to end, and what they show where nobody runs them is whole and small."""

import re

import nbformat
import pytest

from dev.notebooks import KERNEL, NOTEBOOKS, executed

PATHS = re.compile(r"(?<![\w.~-])/(?:tmp|root|home|work|opt|usr|var|Users|mnt)/")
MOST_BYTES = 150_000
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def kinds(notebook) -> list[set[str]]:
    """What the cells show: text, pictures, errors."""
    return [{shown.output_type for shown in cell.get("outputs", [])} for cell in notebook.cells]


@EVERY
def test_a_notebook_is_readable_without_running_it(path):
    notebook, text = nbformat.read(path, as_version=4), path.read_text(encoding="utf-8")
    nbformat.validate(notebook)
    assert len(text.encode()) < MOST_BYTES and not PATHS.search(text) and "stderr" not in text
    assert notebook.metadata == KERNEL
    run = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert run == list(range(1, len(run) + 1)), "not run from top to bottom; python dev/notebooks.py does"
    assert all("error" not in shown for shown in kinds(notebook)) and text.count('"image/png"') >= 1


@pytest.mark.notebook
@EVERY
def test_a_notebook_runs_and_shows_what_is_kept_of_it(path, tmp_path):
    assert kinds(executed(path, tmp_path)) == kinds(nbformat.read(path, as_version=4))
    assert (tmp_path / "outputs" / "runs").is_dir()


def test_there_are_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["first_flow", "one_step", "your_own_data_and_loss"]
