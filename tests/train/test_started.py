import json
import os

import pytest

from model.problems import BadInput
from train import started
from train.events import RESTART
from train.started import STARTED, noted, read


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (None, None),
        (SystemExit(), None),
        (SystemExit(0), None),
        (SystemExit(3), "exit code 3"),
        (BadInput(["resume=x: damaged; y would work", "another"]), "resume=x: damaged; y would work"),
        (RuntimeError("out of memory\nand more"), "RuntimeError: out of memory"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
    ],
)
def test_a_start_is_noted_and_how_it_ends(raised, reason, tmp_path, monkeypatch):
    monkeypatch.setenv(RESTART, "2")
    try:
        with noted(tmp_path):
            note = read(tmp_path)
            assert (note["pid"], note["restart"], note["ended"]) == (os.getpid(), 2, None)
            assert note["boot"] == started.boot() and note["host"] and note["time"]
            started.complete(tmp_path, steps=100, layout={"pp": 2}, device="cpu")
            assert read(tmp_path) == {**note, "steps": 100, "layout": {"pp": 2}, "device": "cpu"}
            if raised is not None:
                raise raised
    except BaseException as error:
        assert error is raised  # which nothing here swallows
    assert read(tmp_path)["ended"]["reason"] == reason and read(tmp_path)["steps"] == 100
    assert [path.name for path in tmp_path.iterdir()] == [STARTED]


def test_a_disk_that_takes_no_note_costs_nothing_but_that(tmp_path, caplog):
    (tmp_path / f"{STARTED}.tmp").mkdir()  # whatever it is that cannot be written
    with noted(tmp_path):
        started.complete(tmp_path, steps=100)
    assert caplog.text.count("could not be written") == 2 and not (tmp_path / STARTED).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"7"])
def test_a_note_that_is_damaged_is_none_and_is_written_again_in_the_end(content, tmp_path):
    with noted(tmp_path):
        (tmp_path / STARTED).write_bytes(content)
        assert read(tmp_path) is None
        started.complete(tmp_path, steps=100)  # of which no half would be kept
        assert (tmp_path / STARTED).read_bytes() == content
    assert json.loads((tmp_path / STARTED).read_text())["ended"]["reason"] is None
