"""The fenced blocks of the documentation, the marks before them, and the rule by which printed lines are compared.

A mark is a comment of HTML right before a block, which no reader sees. WHICH are beginnings of commands, with commas
between them, and ``deepnarrow`` left out; without it a mark is of the whole block.

- ``<!-- run -->``, ``<!-- run WHICH: SETTINGS -->``: is run. Settings (``key=value``, ``--option=value``) take the
  place of those of the command, or are added; ``small`` stands for the model and batch of `tests.small`.
- ``<!-- not run WHICH: REASON -->``: is not, and why.
- ``<!-- not compared WHICH: REASON -->``: the lines that the page shows are not those of the run here, and why.
- ``<!-- ends with WHICH: N -->``: its exit code, where that is not 0.
- ``<!-- file: PATH -->``: the block is a file that what follows it finds there.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = ("", "text")
"""Kinds of blocks that hold nothing to run."""
_COMMENT = r"<!--(?:(?!-->).)*-->\n"
_BLOCK = re.compile(
    rf"(?P<marks>(?:^{_COMMENT})*)^(?P<fence>```+)(?P<kind>\w*)\n(?P<text>.*?)^(?P=fence)$", re.M | re.S
)
_MARK = re.compile(r"<!--\s*(run|not run|not compared|ends with|file)\b([^:>]*?)(?::\s(.*?))?\s*-->", re.S)
_NUMBER = re.compile(r"~?[-+]?\d[\d,.]*(?:e[-+]?\d+)?(?:[kMGT]\b)?")
_FINGERPRINT = re.compile(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,}\b")
LEFT_OUT = ("...", "…")
_ENDS = (">", "|", "&&")


@dataclass(frozen=True)
class Mark:
    """A mark: its verb, the beginnings of the commands that it is of, and what it says behind the colon."""

    verb: str
    which: tuple[str, ...]
    said: str

    def is_of(self, command: str) -> bool:
        plain = " ".join(command.removeprefix("deepnarrow ").split())
        return not self.which or any(plain.startswith(one) for one in self.which)


@dataclass(frozen=True)
class Command:
    """A command of a console block, on one line, and the lines that the page shows behind it."""

    text: str
    shown: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line that its fence is on, what its fence says, its text and its marks."""

    page: Path
    line: int
    kind: str
    text: str
    marks: tuple[Mark, ...]

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[Command]:
        found: list[tuple[str, list[str]]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif found:
                found[-1][1].append(line)
        return [Command(text, tuple(shown)) for text, shown in found]

    def said(self, verb: str, command: str = "") -> list[str] | None:
        """What the marks of a verb say of a command, or of the whole block; None where there is no such mark."""
        found = [mark.said for mark in self.marks if mark.verb == verb and (not command or mark.is_of(command))]
        return found or None


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text("utf-8")
    return list(_blocks(page, text))


def _blocks(page: Path, text: str) -> Iterator[Block]:
    for found in _BLOCK.finditer(text):
        marks = [
            Mark(verb, tuple(one.strip() for one in which.split(",") if one.strip()), " ".join(said.split()))
            for verb, which, said in _MARK.findall(found["marks"])
        ]
        line = text.count("\n", 0, found.start("fence")) + 1
        yield Block(page, line, found["kind"], found["text"], tuple(marks))


def prose(page: Path) -> str:
    """A page without its fenced blocks and their marks."""
    return _BLOCK.sub("", page.read_text("utf-8"))


def with_settings(words: list[str], settings: list[str]) -> list[str]:
    """The words of a command with each setting in the place of the command's own, or behind them."""
    made = list(words)
    for setting in settings:
        name = setting.partition("=")[0]
        at = [i for i, word in enumerate(made) if word == name or word.partition("=")[0] == name]
        for i in reversed(at):
            del made[i : i + (2 if made[i] == name else 1)]
        made.insert(min(at, default=len(made)), setting)
    return made


def taken_apart(command: str) -> tuple[list[str], str]:
    """The words of a command, without a shell's comment and what a page leaves out, and its line from a pipe on."""
    words = shlex.split(command, comments=True)
    end = min((at for at, word in enumerate(words) if word in _ENDS), default=len(words))
    rest = " ".join(word if word in _ENDS else shlex.quote(word) for word in words[end:])
    return [word for word in words[:end] if word not in LEFT_OUT], rest


def as_compared(line: str) -> str:
    """A line with each number as 0, and one space where there are several: figures may differ, words may not."""
    return " ".join(_NUMBER.sub("0", _FINGERPRINT.sub("0", line)).split())


def missing_lines(shown: Sequence[str], printed: str) -> list[str]:
    """The first stretch of lines shown that is not printed where it should be; nothing where all are.

    A stretch is printed without other lines in between. Before, between and behind stretches stands any number: ``...``
    parts them, and pages leave out how an output begins and ends without saying so.
    """
    there = [as_compared(line) for line in printed.splitlines() if line.strip()]
    at = 0
    for leaves_out, lines in groupby((line for line in shown if line.strip()), lambda line: line.strip() in LEFT_OUT):
        stretch = list(lines)
        if leaves_out:
            continue
        wanted = [as_compared(line) for line in stretch]
        places = [i for i in range(at, len(there)) if there[i : i + len(wanted)] == wanted]
        if not places:
            return stretch
        at = places[0] + len(wanted)
    return []
