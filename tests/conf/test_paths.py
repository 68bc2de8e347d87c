"""Paths and names that cannot be, and what a path stands for."""

import pwd
import re
from pathlib import Path

import pytest

from conf.paths import checked, expanded, name_problems, path_problems
from model.problems import BadInput
from tests.ranks import ROOT


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_home_is_a_home_and_all_else_stays(home):
    assert expanded("~/runs/") == home / "runs" and expanded("~") == home
    for text in ("./~", "a/~/b", "a~", "../b", "/c//d"):
        assert expanded(text) == Path(text)
    assert expanded("~root/x") == Path(pwd.getpwnam("root").pw_dir, "x")
    assert checked("--out", "~/x") == home / "x"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "names no file"),
        ("   ", "names no file"),
        ("a\0b", "NUL"),
        ("~nobody-here/x", "no user nobody-here is known here; ~/x, ./~nobody-here/x"),
        ("~nobody-here", "no user nobody-here"),
        ("a/" + "b" * 256 + "/c", "256 bytes, and a file's name at most 255"),
        ("é" * 128, "256 bytes"),
        ("a/" * 2048, "4,096 bytes, and a path has at most 4,095"),
    ],
)
def test_a_path_that_no_file_can_have_is_said_with_what_would_work(given, said):
    (problem,) = path_problems("data.path", given)
    assert problem.startswith("data.path=") and said in problem and problem.endswith("would work")
    assert "\0" not in problem and len(problem) < 400
    with pytest.raises(BadInput):
        checked("data.path", given)


@pytest.mark.parametrize("given", ["a", "../a", "-a", ".a", " a", "a b", "é/", "b" * 255, "a/" * 2047, "*.jsonl", "~"])
def test_a_path_that_a_file_can_have_is_not_refused(given, home):
    assert path_problems("data.path", given) == []


@pytest.mark.parametrize(
    ("given", "said", "works"),
    [
        ("", "is empty", "trial"),
        ("  ", "is empty", "trial"),
        ("../../evil", "has a / in it and begins with .", "evil"),
        ("/", "has a / in it", "trial"),
        ("sweep/1", "has a / in it", "sweep-1"),
        ("..", "begins with .", "trial"),
        (".hidden", "begins with .", "hidden"),
        ("-rf", "begins with -", "rf"),
        ("a ", "begins or ends with a space", "a"),
        ("a\nb", "has characters in it that cannot be seen", "a-b"),
        ("a\0b", "has characters in it that cannot be seen", "a-b"),
        ("é" * 128, "has 256 bytes", "é" * 60),
    ],
)
def test_a_name_that_is_not_one_folder_is_said_with_one_that_is(given, said, works):
    (problem,) = name_problems("name", given)
    assert said in problem and f"; name={works} would work" in problem
    assert name_problems("name", works) == []
    assert ("hydra.run.dir=" in problem) == ("/" in given)


@pytest.mark.parametrize("given", ["tiny-stdlib-574187f", "a b", "é", "x" * 255, "~a", "a.b=c"])
def test_a_name_that_is_one_folder_is_not_refused(given):
    assert name_problems("name", given) == []


def test_no_other_file_says_what_a_home_is():
    rooms = [ROOT / name for name in ("model", "parallel", "conf", "train", "launch", "deepnarrow")]
    each = (path for room in rooms for path in room.rglob("*.py"))
    found = {path for path in each if re.search(r"expanduser|Path\.home", path.read_text("utf-8"))}
    assert found == {ROOT / "conf" / "paths.py"}
