"""Lines on a disk that takes no more, in a folder that goes."""

import logging
import resource
import shutil
from contextlib import contextmanager

import pytest

from train import patient_file
from train.patient_file import PatientFile, patient_logs


@contextmanager
def full(size):
    """No file can be larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_does_not_take_is_written_later_and_said_once_a_minute(tmp_path):
    now = [0.0]
    file = PatientFile(tmp_path / "lines", clock=lambda: now[0])
    said = []
    with full(25):
        for number in range(10):
            now[0] += 15.0
            file.write(f"line {number}")
            said.append(file.news())
        assert file.lacking == 7
        assert (tmp_path / "lines").read_text() == "line 0\nline 1\nline 2\nline"  # cut inside one
    told = [text for text in said if text]
    assert len(told) == 2 and "File too large" in told[0] and "1 lines wait" in told[0] and said[3] == told[0]
    file.write("after")
    assert file.news() == "lines is written again" and file.news() is None
    expected = [*(f"line {number}" for number in range(10)), "after"]
    assert (tmp_path / "lines").read_text().splitlines() == expected and file.close() == 0


def test_what_is_too_much_to_keep_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(patient_file, "KEPT", 20)
    file = PatientFile(tmp_path / "lines")
    with full(0):
        for number in range(5):
            file.write(f"line {number}")
        file.sync()
        assert file.lacking == 5 and file.missing == 3
    assert file.close() == 3 and (tmp_path / "lines").read_text() == "line 0\nline 1\n"


@pytest.mark.parametrize("gone", ["deleted", "moved", "emptied"])
def test_a_file_that_is_gone_is_made_again_with_all_it_held(gone, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lines").write_text("before\n")
    file = PatientFile(folder / "lines")
    file.write("one")
    if gone == "moved":
        folder.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(folder)
    if gone == "emptied":
        folder.mkdir()
    file.write("two")
    file.write("three")
    assert (folder / "lines").read_text() == "before\none\ntwo\nthree\n" and file.remade == 1 and not file.close()


def test_a_folder_that_cannot_be_made_again_is_no_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    file = PatientFile(folder / "lines")
    shutil.rmtree(folder)
    folder.write_text("in the way")
    file.write("one")
    assert "Not a directory" in file.news() or "File exists" in file.error.strerror
    folder.unlink()
    file.write("two")
    assert (folder / "lines").read_text() == "one\ntwo\n"


def test_a_log_on_a_full_disk_has_neither_gap_nor_tracebacks(tmp_path, monkeypatch, capfd):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.FileHandler(tmp_path / "log")])
    monkeypatch.setattr(logging, "raiseExceptions", True)
    assert len(patient_logs()) == 1
    with full(20):
        for number in range(9):
            root.warning("line %d", number)
    root.warning("%d", "no number")  # a mistake of the caller's
    root.warning("after")
    assert (tmp_path / "log").read_text().splitlines() == [*(f"line {number}" for number in range(9)), "after"]
    assert "Traceback" not in capfd.readouterr().err
