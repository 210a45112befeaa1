"""EXPERIMENT_LOG.md: one section per experiment, part written by the run, part by people.

What a run writes stands between two HTML comments and only that is ever replaced; every other word of the file is
people's and is kept. Several runs may write at once: each change takes a lock, reads, changes its own part and replaces
the file in one step.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from common.errors import UserError
from common.files import end_of, locked, write_atomically

TITLE = """# Experiment log

One section per experiment: what was expected before, what came during, what was found after. Runs write between the
HTML comments; everything else is written by people and left alone.
"""
SECTION = """
## {name}

### Before

{before}

### During

{during}

### After

{after}

Observations:

Issues:

Next steps:

### Configuration changes

{changes}
"""
PARTS = ("before", "during", "after", "changes")
WRITTEN = re.compile(r"^<!-- (\S+): (\w+), written by the run -->\n.*?^<!-- \1: end of \2 -->$", re.MULTILINE | re.DOTALL)
CHANGES_HEADER = "| date | key | old | new | reason |\n|---|---|---|---|---|"


class ExperimentLog:
    """The experiment log in the file `path`: the repository's, or a run's own log.md."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(
        self, run_name: str, command: str, config_summary: str, expect: str = "", source: str = "", reason: str = ""
    ) -> None:
        """Open the run's section, or open it again where one of that name stands (people's words in it are kept).

        command: the line that repeats the run; config_summary: Markdown, what is trained on what; expect: the outcome stated
        before the run; source: where the hyper-parameters come from; reason: why the run is made.
        """
        facts = {"Started": date.today().isoformat(), "Expected outcome": expect, "Hyper-parameters from": source}
        lines = [f"- {fact}: {text}" for fact, text in (facts | {"Reason": reason}).items() if text]
        before = "\n".join([*lines, "", "```", command, "```", "", config_summary])
        with self.section(run_name) as section:
            section.replace("before", before)
            section.replace("during", "")
            section.replace("after", "")

    def add_result(self, run_name: str, line: str) -> None:
        """Add one line to what came during the run."""
        with self.section(run_name) as section:
            section.append("during", f"- {line}")

    def drop_results_after(self, run_name: str, step: int) -> None:
        """Take out the lines of later steps: a run that goes on from `step` comes to them again."""
        with self.section(run_name) as section:
            lines = section.read("during").splitlines()
            steps = [re.match(r"- epoch \d+, step (\d+):", line) for line in lines]
            kept = [line for line, found in zip(lines, steps, strict=True) if not found or int(found[1]) <= step]
            section.replace("during", "\n".join(kept))

    def finish(self, run_name: str, table: str) -> None:
        """Set the final numbers: a Markdown table or any text."""
        with self.section(run_name) as section:
            section.replace("after", table)

    def add_change(self, run_name: str, key: str, old: object, new: object, reason: str = "") -> None:
        """Add a row to the configuration changes: a resumed run's `key` went from `old` to `new`."""
        cells = [date.today().isoformat(), f"`{key}`", f"`{old}`", f"`{new}`", reason or "not stated"]
        row = "| " + " | ".join(re.sub(r"\s*\n\s*", " ", cell).replace("|", "\\|") for cell in cells) + " |"
        with self.section(run_name) as section:
            section.append("changes", row if section.read("changes") else f"{CHANGES_HEADER}\n{row}")

    def add_note(self, run_name: str, line: str) -> None:
        """Add a person's line under Observations of a section. UserError when there is no such section."""
        text, name = self.read(), re.escape(run_name)
        written = rf"^<!-- {name}: \w+, written by the run -->$"
        if not all(re.search(line, text, re.MULTILINE) for line in (rf"^## {name}[ \t]*$", written)):
            raise UserError(f"{self.path} has no section of a run {run_name}; a run with log.expect=... writes one")
        with self.section(run_name) as section:
            section.note(line)

    @contextmanager
    def section(self, run_name: str) -> Iterator["Section"]:
        """Give the run's section for one change, made where it is missing, under the lock of the file."""
        path = end_of(self.path)
        with locked(path):
            section = Section(self.read() or TITLE, run_name)
            yield section
            write_atomically(path, section.text)

    def read(self) -> str:
        """Return the whole text, empty where there is none. UserError for what is no text file of UTF-8."""
        try:
            return end_of(self.path).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not text in UTF-8; save it as UTF-8, or give another log.file") from error


class Section:
    """The whole text of a log, of which only the machine-written parts of one run's section are changed."""

    def __init__(self, text: str, run_name: str) -> None:
        self.text = text
        self.name = run_name
        if self.heading() is None:
            parts = {part: self.marked(part, "") for part in PARTS}
            self.text = text.rstrip("\n") + "\n" + SECTION.format(name=run_name, **parts)

    def heading(self) -> re.Match[str] | None:
        """Return the section's own; what looks like one among a run's words is not."""
        return re.compile(rf"^## {re.escape(self.name)}[ \t]*$", re.MULTILINE).search(self.words())

    def words(self) -> str:
        """Return the text with blanks for what runs wrote between their comments: the same places, people's words alone."""
        return WRITTEN.sub(lambda part: re.sub(r"[^\n]", " ", part[0]), self.text)

    def read(self, part: str) -> str:
        """Return what the machine wrote in that part, empty where the part or its comments are gone."""
        found = self.pattern(part).search(self.text)
        return found["body"].strip("\n") if found else ""

    def replace(self, part: str, body: str) -> None:
        """Write that part; where people removed its comments it comes back at the end of the section."""
        marked = self.marked(part, body.replace("<!--", "&lt;!--"))
        if self.pattern(part).search(self.text):
            self.text = self.pattern(part).sub(lambda _: marked, self.text, count=1)
        else:
            before, after = self.text[: self.end()].rstrip(), self.text[self.end() :]
            self.text = f"{before}\n\n{marked}\n" + f"\n{after}" * bool(after)

    def append(self, part: str, line: str) -> None:
        """Add a line to that part."""
        self.replace(part, f"{self.read(part)}\n{line}".strip("\n"))

    def note(self, line: str) -> None:
        """Add a person's line after what stands under Observations, or at the section's end where that word is gone."""
        heading = self.heading()
        assert heading is not None
        words = re.compile(r"^Observations:.*(?:\n(?!\s*$|#|<!--|\w+( \w+)?:).*)*", re.MULTILINE)
        found = words.search(self.text, heading.end(), self.end())
        place = found.end() if found else self.end()
        before = self.text[:place] if found else self.text[:place].rstrip() + "\n"
        self.text = f"{before}\n- {' '.join(line.split())}{self.text[place:] if found else chr(10) * 2 + self.text[place:]}"

    def end(self) -> int:
        """Return where the section stops: before the next heading of its level, or at the end of the text."""
        heading = self.heading()
        assert heading is not None
        following = re.compile(r"^(?=## )", re.MULTILINE).search(self.words(), heading.end())
        return following.start() if following else len(self.text)

    def marked(self, part: str, body: str) -> str:
        """Return the body between the comments of that part."""
        return "\n".join(filter(None, (self.comments(part)[0], body, self.comments(part)[1])))

    def pattern(self, part: str) -> re.Pattern[str]:
        start, stop = (re.escape(comment) for comment in self.comments(part))
        return re.compile(rf"^{start}\n(?P<body>.*?)^{stop}$", re.MULTILINE | re.DOTALL)

    def comments(self, part: str) -> tuple[str, str]:
        return f"<!-- {self.name}: {part}, written by the run -->", f"<!-- {self.name}: end of {part} -->"
