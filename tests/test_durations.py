"""A run that is ordered and shortened by what runs have measured."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import durations
from tests.durations import FOLDER, far_off, remember, remembered, shortest

NAMES = [str(path.relative_to(FOLDER)) for path in sorted(FOLDER.glob("model/test_*.py"))]


def test_the_shortest_files_are_chosen_up_to_the_time_there_is():
    seconds = {"a": 3.0, "b": 0.5, "c": 40.0, "d": 1.0}
    assert shortest(seconds, 4.5) == {"a", "b", "d"}
    assert shortest(seconds, 4.4) == {"b", "d"}
    assert shortest(seconds, 0.0) == set() and shortest(seconds, 1e9) == {*seconds}


def test_what_is_measured_stands_beside_what_was_and_files_that_are_gone_are_forgotten(tmp_path):
    file = tmp_path / "durations.json"
    one, two, three = NAMES[:3]
    assert remembered(file) == {}
    file.write_text(json.dumps({one: 5.0, two: 7.0, "model/test_of_old.py": 9.0}))
    remember({two: 1.234, three: 60.0}, file)
    assert list(json.loads(file.read_text()).items()) == [(three, 60.0), (one, 5.0), (two, 1.2)]


def test_files_that_have_come_to_take_far_longer_are_named():
    assert far_off({"a": 19.0, "b": 41.0, "c": 12.0, "d": 9.0}, {"a": 10.0, "b": 20.0}) == [
        "b took 41 s, 20 s is written down",
        "c took 12 s, nothing is written down",
    ]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A project of three files of tests with this plugin, each of which says that it runs."""
    project = tmp_path_factory.mktemp("project")
    (project / "tests" / "more").mkdir(parents=True)
    shutil.copy(durations.__file__, project / "tests" / "durations.py")
    lines = (FOLDER / "conftest.py").read_text().splitlines(keepends=True)
    hooks = "".join(lines[lines.index("def pytest_addoption(parser):\n") :]).partition("\n\n\ndef pytest_collection_")[
        0
    ]
    (project / "tests" / "conftest.py").write_text(f"from tests.durations import Durations\n\n\n{hooks}\n")
    for name in ("test_long", "test_short", "more/test_new"):
        text = f"def test_it():\n    print('ran {name}')\n"
        (project / "tests" / f"{name}.py").write_text(text)
    written = {"test_long.py": 500.0, "test_short.py": 1.0}
    (project / "tests" / "durations.json").write_text(json.dumps(written))

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-s", "--import-mode=importlib", *arguments]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        ended = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        return ended.stdout, [line[4:] for line in ended.stdout.replace(".", "\n").splitlines() if line[:4] == "ran "]

    return project, run


def test_the_longest_runs_first(suite):
    _, run = suite
    assert run()[1] == ["test_long", "more/test_new", "test_short"]


def test_a_short_run_leaves_the_longest_out_and_says_so(suite):
    _, run = suite
    said, ran = run("--fast")
    assert ran == ["more/test_new", "test_short"]
    assert "fast: 2 files; the 1 that take longest are left out" in said


def test_durations_are_written_down_where_nothing_failed(suite):
    project, run = suite
    file = project / "tests" / "durations.json"
    failing = project / "tests" / "test_failing.py"
    failing.write_text("def test_it():\n    assert False\n")
    before = file.read_text()
    assert "is left as it was" in run("--remember-durations")[0] and file.read_text() == before
    failing.unlink()
    said, ran = run("--remember-durations")
    assert "3 files, 0 s, are written down" in said and len(ran) == 3
    assert json.loads(file.read_text()) == {"more/test_new.py": 0.0, "test_long.py": 0.0, "test_short.py": 0.0}
    assert run("--fast")[1] == ["more/test_new", "test_long", "test_short"]
