"""Files of data sets: where they belong, whether they are whole, and fetching them where the source allows."""

import hashlib
import shutil
import urllib.request
from pathlib import Path

from common.errors import UserError
from common.files import replacing


def unfit(file: Path, why: str) -> UserError:
    """Return the error about a file of a data set that is damaged, or another one."""
    return UserError(f"{file} is not in the official format: {why}; fetch it again")


def require_bare(name: str) -> None:
    """Raise UserError for a path in place of a name: a configuration may be anyone's, and leads nowhere else."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"{name!r} is to name a file or folder in dataloaders.root, and is a path; give its bare name")


def require_whole(file: Path, md5: str | None, remedy: str) -> None:
    """Raise UserError when the file's MD5 sum, a sign of damage, not of malice, is not the one published (None: any)."""
    if md5 is None:
        return
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise UserError(f"{file} is damaged, incomplete or another file: its MD5 sum is {found}, not {md5}; {remedy}")


def fetch(url: str, file: Path, md5: str | None, remedy: str) -> None:
    """Download to `file`, which appears only once it is whole. UserError when it cannot be had, with the remedy."""
    if not url.startswith(("https://", "http://")):
        raise UserError(f"dataloaders.url={url} is no web address; {remedy}")
    print(f"fetching {url}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, replacing(file) as target:
            shutil.copyfileobj(response, target, 2**20)
            target.flush()
            require_whole(Path(target.name), md5, remedy)
    except OSError as error:  # urllib's errors are of this kind
        raise UserError(f"{url} cannot be fetched ({error}); {remedy}") from error
