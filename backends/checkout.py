"""The code of this checkout: what of it a run elsewhere needs, and a copy of that which later edits do not reach."""

import hashlib
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NOT_SENT = ["**/__pycache__", "**/.*"]
# What `digest` computes, for a shell in the folder: bytecode goes first, a link or a device, never copied, changes the sum.
DIGEST_COMMAND = (
    "find . -name __pycache__ -prune -exec rm -rf {} + && "
    "{ find . ! -type d ! -type f; find . -type f -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum; } | sha256sum"
)


def project() -> dict[str, Any]:
    """Return pyproject.toml. UserError where the project is installed without it."""
    path = ROOT / "pyproject.toml"
    if not path.is_file():
        raise UserError(f"a run elsewhere takes the sources along, and {ROOT} has no pyproject.toml; run from a checkout")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def shipped() -> list[str]:
    """Return what is sent of this folder: the project's modules and the folders of its packages."""
    tools = project()["tool"]["setuptools"]
    return sorted({name.partition(".")[0] for name in tools["packages"]}) + [f"{name}.py" for name in tools["py-modules"]]


def code() -> dict[str, Path]:
    """Return the files to freeze by their places below ROOT: what is shipped, and modules of the user's own beside it."""
    found = [path for name in shipped() for path in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])]
    kept = [path.relative_to(ROOT) for path in {*found, *ROOT.glob("*.py")} if path.is_file()]
    hidden = [place for place in kept if any(part.startswith(".") or part == "__pycache__" for part in place.parts)]
    return {place.as_posix(): ROOT / place for place in sorted(set(kept) - set(hidden))}


def digest(files: dict[str, Path]) -> str:
    """Return the SHA-256 sum of files and their places, as DIGEST_COMMAND prints it."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{place}\n" for place, path in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def frozen_place(output_dir: Path, of_code: str) -> Path:
    """Return where the code of this digest is kept."""
    return output_dir.absolute() / "submitted" / of_code[:16]


def freeze(output_dir: Path) -> tuple[Path, str]:
    """Copy the code below output_dir/submitted, one copy for each state of it; returns the copy's folder and digest.

    UserError where a folder of that name holds something else.
    """
    made = frozen_place(output_dir, f".{os.getpid()}.tmp")
    for name, path in code().items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, made / name)
    wanted = digest(files_below(made))
    place = frozen_place(output_dir, wanted)
    if place.exists():
        shutil.rmtree(made)
    else:
        made.rename(place)
    if not is_intact(place, wanted):
        raise UserError(f"{place} was changed since the code was frozen there; remove that folder, and submit again")
    return place, wanted


def is_intact(place: Path, wanted: str) -> bool:
    """Return whether frozen code is there as its digest says."""
    try:
        return digest(files_below(place)) == wanted
    except FileNotFoundError:  # being cleared at this moment
        return False


def files_below(folder: Path) -> dict[str, Path]:
    """Return what lies in a folder by its place there, but for folders and bytecode; a link counts as what it leads to."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if not path.is_dir()}
    return {place.as_posix(): path for place, path in found.items() if "__pycache__" not in place.parts}
