"""Run the notebooks of notebooks/ and keep what they show in them.

python dev/notebooks.py                  # all of them, about a minute on two cores
python dev/notebooks.py first_flow       # one of them
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import ROOT, front
from common.files import write_atomically
from configuration.nodes import check_known

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def executed(path: Path, place: Path) -> Any:
    """Return a notebook with what its cells show, run with `place` as working folder; without the lines of progress.

    Raises nbclient.exceptions.CellExecutionError where a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(place)}}).execute()
    notebook.metadata = nbformat.from_dict(KERNEL)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [shown for shown in cell.outputs if shown.get("name") != "stderr"]
    return notebook


def carry_out(words: list[str]) -> str:
    """Run the notebooks that are named, or all. UserError for a name that none has."""
    import nbformat

    known = {path.stem: path for path in NOTEBOOKS}
    for word in words:
        check_known("notebook", word, list(known))
    for name in words or known:
        with tempfile.TemporaryDirectory() as place:
            write_atomically(known[name], nbformat.writes(executed(known[name], Path(place))) + "\n")
        print(f"{known[name].relative_to(ROOT)}: {known[name].stat().st_size / 1000:.0f} kB", flush=True)
    return "done"


def main(words: list[str]) -> int:
    return front(words, __doc__, carry_out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
