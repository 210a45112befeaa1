"""What the small scripts share: words to settings, and the process boundary."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from training.errors import UserError
from training.files import DISK_ERRORS, disk_sentence, outlive_readers

ROOT = Path(__file__).resolve().parents[1]


def outputs() -> Path:
    """Where runs, checkpoints and pictures are looked for: outputs/ of the working folder, else the repository's."""
    return Path("outputs") if Path("outputs").is_dir() else ROOT / "outputs"


def unknown(word: str, keys: Iterable[str]) -> str:
    """That a key=value word has no known key."""
    return f"unknown key in {word!r}; the keys are {', '.join(keys)}"


def split(words: list[str], settings: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The settings with what key=value words say of them, and all other words."""
    pairs = [(word, word.partition("=")) for word in words]
    said = {key: value for _, (key, equals, value) in pairs if equals and key in settings}
    return settings | said, [word for word, (key, equals, _) in pairs if not (equals and key in settings)]


def front(words: list[str], doc: str | None, carry_out: Callable[[list[str]], object]) -> int:
    """Carry out a command line and print what comes of it; the exit status. A user's mistake is one sentence."""
    if "--help" in words or "-h" in words:
        print(doc)
        return 0
    outlive_readers()
    try:
        print(carry_out(words))
    except UserError as error:
        sentence = str(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        sentence = f"{disk_sentence(error)}; make room there, or choose another place (most often by out=)"
    else:
        return 0
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    return 1
