"""Files of data sets: where they belong, whether they are whole, and fetching them where the source allows."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from common.errors import UserError

BLOCK = 2**20


def md5_of(file: Path) -> str:
    """Return the MD5 sum of a file, as data sets publish it: it tells damage, not malice."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def require_bare(name: str) -> None:
    """Raise UserError for the name of a file or folder that is a path: a configuration may be anyone's, and leads nowhere
    else.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"{name!r} is to name a file or folder in dataloaders.root, and is a path; give its bare name")


def require_whole(file: Path, md5: str | None, remedy: str) -> None:
    """Raise UserError when the file's MD5 sum is not the one published (None: not looked at)."""
    found = md5_of(file) if md5 else md5
    if found != md5:
        raise UserError(f"{file} is damaged, incomplete or another file: its MD5 sum is {found}, not {md5}; {remedy}")


def fetch(url: str, file: Path, md5: str | None, remedy: str) -> None:
    """Download to `file`, which appears only once it is whole. UserError when it cannot be had, with the remedy."""
    if not url.startswith(("https://", "http://")):
        raise UserError(f"dataloaders.url={url} is no web address; {remedy}")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    print(f"fetching {url}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, partial.open("wb") as target:
            while block := response.read(BLOCK):
                target.write(block)
        require_whole(partial, md5, remedy)
        partial.replace(file)
    except (OSError, urllib.error.URLError) as error:
        raise UserError(f"{url} cannot be fetched ({error}); {remedy}") from error
    finally:
        partial.unlink(missing_ok=True)
