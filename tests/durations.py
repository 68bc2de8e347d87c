"""How long each file of tests took, measured by runs of the tests themselves: it orders a run and selects a short one.

``--remember-durations`` writes what a run has measured into `FILE`, beside what is there for files that did not run.
The longest files then run first, since pytest-xdist gives a file to one worker, and the last one decides. ``--fast``
runs the shortest files, as many as fit `FAST_SECONDS`, whatever they are called and wherever they lie. A file that is
not in there yet counts `UNKNOWN_SECONDS`. A run ends by saying which of its files take far longer than is written down.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
FILE = FOLDER / "durations.json"
FAST_SECONDS = 170
"""The seconds of all tests of a short run, as three workers on two cores take them: these are through in little more
than a minute, and half a one is for what a run begins with."""
UNKNOWN_SECONDS = 10.0
OFF_BY_SECONDS, OFF_BY_FACTOR = 10, 2
"""How much longer than is written down a file takes before that is said."""


def remembered(file: Path = FILE) -> dict[str, float]:
    """The seconds of each file that is there still, by its path below tests/."""
    found = json.loads(file.read_text()) if file.exists() else {}
    return {name: seconds for name, seconds in found.items() if (FOLDER / name).exists()}


def remember(measured: dict[str, float], file: Path = FILE) -> None:
    """Write them beside those of the files that were not measured, the longest first."""
    whole = {**remembered(file), **{name: round(seconds, 1) for name, seconds in measured.items()}}
    ordered = sorted(whole.items(), key=lambda item: (-item[1], item[0]))
    file.write_text(json.dumps(dict(ordered), indent=1) + "\n")


def shortest(seconds: dict[str, float], most: float) -> set[str]:
    """The files that take no longer than `most` together, taken from the shortest on."""
    chosen, total = set(), 0.0
    for name, took in sorted(seconds.items(), key=lambda item: (item[1], item[0])):
        total += took
        if total > most:
            break
        chosen.add(name)
    return chosen


def far_off(measured: dict[str, float], written: dict[str, float]) -> list[str]:
    """Which files took longer than is written down, in words, the longest first. Part of a file may be all that ran."""
    said = []
    for name, took in sorted(measured.items(), key=lambda item: -item[1]):
        was = written.get(name, 0.0)
        if took > was + OFF_BY_SECONDS and took > OFF_BY_FACTOR * was:
            said.append(f"{name} took {took:.0f} s, {f'{was:.0f} s' if name in written else 'nothing'} is written down")
    return said


class Durations:
    """The pytest plugin: what the tests of this run took, and which files it consists of."""

    def __init__(self, config: pytest.Config) -> None:
        self.written = remembered()
        self.measured: Counter[str] = Counter()
        self.failed = False
        self.fast = config.getoption("--fast")
        files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("test_*.py")}
        known = {name: self.written.get(name, UNKNOWN_SECONDS) for name in files}
        self.chosen = shortest(known, FAST_SECONDS) if self.fast else files
        self.left_out = len(files) - len(self.chosen)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave the files of a short run alone."""
        if collection_path.name.startswith("test_") and name_of(collection_path) not in self.chosen:
            return True
        return None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Put the longest files first."""
        items.sort(key=lambda item: -self.written.get(name_of(item.path), UNKNOWN_SECONDS))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Sum up; with pytest-xdist the reports of all workers come by here."""
        self.measured[name_of(FOLDER.parent / report.nodeid.partition("::")[0])] += report.duration
        self.failed = self.failed or report.failed

    def pytest_terminal_summary(self, terminalreporter, config: pytest.Config) -> None:
        """Write the durations down where that is asked for; else say what was left out and which are off."""
        if self.fast:
            left = self.left_out
            terminalreporter.write_line(f"fast: {len(self.chosen)} files; the {left} that take longest are left out")
        if config.getoption("--remember-durations"):
            if self.failed:
                terminalreporter.write_line(f"{FILE.name} is left as it was: a test failed, and may not have ended")
                return
            remember(self.measured)
            total = sum(self.measured.values())
            terminalreporter.write_line(f"{FILE.name}: {len(self.measured)} files, {total:.0f} s, are written down")
        else:
            for line in far_off(self.measured, self.written):
                terminalreporter.write_line(f"{line} (--remember-durations writes what a run takes)")


def name_of(path: Path) -> str:
    """A file's path below tests/, or the whole path of one elsewhere."""
    return str(path.relative_to(FOLDER)) if path.is_relative_to(FOLDER) else str(path)
