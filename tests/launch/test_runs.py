import json
import os
import re
import time
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from launch import runs
from launch.cli import main
from launch.run_folder import found_below
from launch.runs import PIPE_WIDTH, list_runs, quantity, shown
from launch.tables import rendered
from tests.launch.folders import ELSEWHERE, HERE, NOW, OPEN, ago, records, write_run
from train.records import METRICS

ENDED = {**OPEN, "ended": {"time": ago(5), "reason": None}}
SUMMARY = {"complete": True, "steps": 1000, "val_loss": 2.5, "tokens_per_second": 480.0}


def table(listed, folder, width=PIPE_WIDTH, most=None):
    return rendered(shown(listed, [folder], width, most), width=width)


@pytest.fixture
def folder(tmp_path):
    write_run(
        tmp_path / "runs" / "ended", records(1000), ENDED, SUMMARY, changed=900, checkpoints={"step-00001000": 890}
    )
    lines = records(400, mfu=0.42, tokens_per_second=500.0)
    lines[199]["val_loss"] = 2.9
    write_run(
        tmp_path / "runs" / "deep" / "under-way",
        lines,
        {**ELSEWHERE, **OPEN},
        changed=10,
        checkpoints={"step-00000100": 1210, "step-00000300": 400, "step-00000350.damaged": 300},
        events=[{"event": "failed", "time": ago(7200), "restart_in_seconds": 1.0}, {"event": "recovered"}],
    )
    write_run(tmp_path / "runs" / "killed", records(10), {**OPEN, "time": ago(500)}, changed=450)
    return tmp_path / "runs"


def test_what_a_run_has_done_and_will_is_listed(folder):
    ended, killed, under_way = sorted(list_runs([folder], NOW), key=lambda one: one.name)
    assert (under_way.step, under_way.steps, under_way.tokens, under_way.whole_tokens) == (400, 1000, 4e5, 1e6)
    assert under_way.loss == records(400)[-1]["loss"] and under_way.val_loss == 2.9
    assert under_way.tokens_per_second == pytest.approx(500) and under_way.mfu == pytest.approx(0.42)
    # 300 steps from the oldest checkpoint of this start to the last record, in 1200 s: validations are in it
    assert under_way.seconds_left == pytest.approx(600 * 1200 / 300)
    assert (under_way.checkpoint, under_way.checkpoint_age, under_way.restarts) == (300, 400, 1)
    assert (ended.seconds_left, ended.tokens_per_second, ended.val_loss, ended.restarts) == (None, 480.0, 2.5, 0)
    assert killed.state.condition.value == "failed" and killed.seconds_left is None and killed.checkpoint is None


def test_without_a_checkpoint_the_pace_is_that_of_the_last_steps(tmp_path):
    write_run(tmp_path / "a", records(400), {**ELSEWHERE, **OPEN})
    write_run(tmp_path / "b", records(400), {**ELSEWHERE, **OPEN}, checkpoints={"step-00000395": 500})  # too near
    write_run(tmp_path / "c", records(400), {**ELSEWHERE, **OPEN}, checkpoints={"step-00000100": 4000})  # earlier start
    assert [one.seconds_left for one in list_runs([tmp_path], NOW)] == [pytest.approx(600 * 2.0)] * 3


def test_a_batch_that_grows_is_told_by_tokens(tmp_path):
    lines = records(400)
    for one in lines[200:]:  # 4 times as many tokens in a step
        one["tokens"] = 200_000 + (one["step"] - 200) * 4000
    write_run(tmp_path, lines, {**ELSEWHERE, **OPEN, "tokens": 2_000_000})
    (listed,) = list_runs([tmp_path], NOW)
    assert listed.seconds_left == pytest.approx(1_000_000 / 4000 * 2.0)


def test_what_is_under_way_stands_last(folder):
    assert [one.name for one in list_runs([folder], NOW)] == ["ended", "killed", "under-way"]


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path):
    for path in ("x/a/run", "x/b/run", "y/b/run", "y/other"):
        write_run(tmp_path / path, records(1))
    found = found_below([tmp_path])
    assert sorted(runs.distinct_names(found).values()) == ["a/run", "other", "x/b/run", "y/b/run"]
    assert [*runs.distinct_names([found[0], found[0]]).values()] == ["run"]


def test_runs_are_found_at_any_depth_and_nothing_is_looked_for_in_them(tmp_path):
    write_run(tmp_path / "a" / "b" / "run", records(1), checkpoints={"step-00000001": 1})
    write_run(tmp_path / "a" / "b" / "run" / "earlier" / "1", records(1))
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / ".hidden").mkdir()
    write_run(tmp_path / "a" / ".hidden" / "run", records(1))
    assert found_below([tmp_path, tmp_path]) == [tmp_path / "a" / "b" / "run"]
    assert found_below([tmp_path / "a" / "b" / "run"]) == [tmp_path / "a" / "b" / "run"]


@pytest.mark.parametrize("width", [30, 50, 80, 100, 140, 10_000])
def test_columns_are_left_out_where_they_do_not_fit(width, folder):
    text = table(list_runs([folder], NOW), folder, width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    (headings,) = (line for line in text.splitlines() if line.strip().startswith("run "))
    names = ["run", "state", "step", "loss", "ETA", "val loss", "tokens", "tokens/s", "MFU", "checkpoint (age)"]
    names.append("restarts")
    kept = [name for name in names if re.search(rf"(^|\s){re.escape(name)}(\s|$)", headings)]
    assert kept == names[: len(kept)] and kept[:2] == ["run", "state"]  # the least needed go first
    flowing = " ".join(text.split())
    gone = ", ".join(reversed(names[len(kept) :]))
    assert f"not shown, for want of room: {gone} (--json has all)" in flowing or not gone
    assert "3 runs: 1 complete, 1 failed, 1 running?" in flowing


def test_a_pipe_gets_plain_lines_that_nothing_cuts(folder, capsys):
    assert main(["runs", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "1,000/1,000" in said and "killed: failed, process 4194305 on here" in said


def test_json_has_everything(folder, capsys):
    assert main(["runs", str(folder), "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["ended"]["state"] == "complete" and found["ended"]["certain"] and found["ended"]["val_loss"] == 2.5
    assert found["killed"]["path"] == str(folder / "killed") and "gone without a word" in found["killed"]["why"]
    assert found["under-way"]["step"] == 400 and found["under-way"]["wandb"] == {}


def test_two_hundred_runs(tmp_path):
    for number in range(200):
        state = {"summary": SUMMARY} if number % 2 else {"started": {**ELSEWHERE, **OPEN}}
        write_run(tmp_path / f"run-{number:03}", records(3), changed=10 + number / 2, **state)
    listed = list_runs([tmp_path], NOW)
    assert "200 runs: 100 complete, 100 running?" in table(listed, tmp_path)
    text = table(listed, tmp_path, 80, most=5)
    assert "200 runs, of which the last 5 are shown" in " ".join(text.split()) and text.count("running?") >= 5
    assert [one.name for one in listed[-2:]] == ["run-002", "run-000"]  # the latest above the prompt


def test_of_long_files_the_ends_are_read_and_of_checkpoints_nothing(tmp_path, monkeypatch):
    write_run(tmp_path / "run", records(3000, memory_gib=[1.0] * 64), {**ELSEWHERE, **OPEN})
    big = (tmp_path / "run" / METRICS).read_bytes()
    (tmp_path / "run" / METRICS).write_bytes(big * 20)
    os.utime(tmp_path / "run" / METRICS, (NOW, NOW))
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json").mkdir()  # whoever opens it fails
    read = []

    def pread(handle, *given):
        part = os_pread(handle, *given)
        if os.readlink(f"/proc/self/fd/{handle}").startswith(str(tmp_path)):  # another thread's are not counted
            read.append(part)
        return part

    monkeypatch.setattr(os, "pread", pread)
    (listed,) = list_runs([tmp_path], NOW)
    assert listed.step == 3000 and not listed.faults
    assert 0 < sum(map(len, read)) < 2**21 < len(big) * 20 / 10


os_pread = os.pread


@pytest.mark.parametrize(
    ("content", "step", "faults"),
    [
        (b"", None, []),
        (b'{"step": 1, "loss"', None, []),  # not ended yet
        (b'{"step": 1, "loss": 2.5, "tokens": 3, "seconds": 1}\n{"step": 2, "lo', 1, []),
        (b'{"step": 1, "loss": null, "nonfinite": ["loss"]}\n', 1, []),
        (b'{"step": 1}\n\x00\x00\n[1]\nnull\n{"step": 4}\n', 4, ["metrics.jsonl: some of its lines are no records"]),
        (b'{"step": "x", "loss": "y", "tokens": [], "seconds": {}, "mfu": null, "val_loss": true}\n', None, []),
        (b"\xff" * 300_000, None, []),
        (b'{"step": 1, "tokens": 3, "seconds": 1}\n{"step": 2, "tokens": 6, "seconds": 1}\n{"tokens": 9}\n', None, []),
    ],
)
def test_whatever_a_file_of_records_holds_there_is_a_row(content, step, faults, tmp_path, capsys):
    write_run(tmp_path / "run", started={**HERE, **OPEN})
    (tmp_path / "run" / METRICS).write_bytes(content)
    (listed,) = list_runs([tmp_path], NOW)
    assert (listed.step, listed.faults) == (step, faults)
    assert all(fault in table([listed], tmp_path) for fault in faults)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))


def test_a_note_with_anything_in_it_has_a_row(tmp_path):
    for value in (None, 7, "x", [], {}, True):
        note = dict.fromkeys(("time", "host", "boot", "pid", "ended", "steps", "resumed", "tokens"), value)
        write_run(tmp_path / "run", records(30), note, dict.fromkeys(SUMMARY, value) | {"wandb": value})
        (listed,) = list_runs([tmp_path], NOW)
        assert listed.step == 30 and table([listed], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder; a folder that holds runs would work"),
        (["file"], "file: no such folder, but a file; its folder would work"),
        (["--watch"], "--watch: the output is no terminal; watch -n 5 deepnarrow runs, or a terminal, would work"),
        ([".", "--watch=0"], "--watch=0: no time above 0; --watch=5 would work"),
        ([], "runs: no such folder here; a folder with runs in it as an argument would work"),
    ],
)
def test_what_cannot_be_is_said(arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_watching_looks_again_until_it_is_interrupted(folder, monkeypatch, capsys):
    def slept(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt

    waits = []
    monkeypatch.setattr(runs.sys.stdout, "isatty", lambda: True)
    # Of this module alone: other threads of the process sleep as well.
    monkeypatch.setattr(runs, "time", SimpleNamespace(sleep=slept, time=time.time))
    assert main(["runs", str(folder), "--watch", "3"]) == 0
    assert waits == [3.0, 3.0] and "killed" in capsys.readouterr().out


def test_an_empty_folder_has_no_runs(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_quantities_have_three_digits_and_a_letter():
    given = (None, 0, 7, 12.34, 999, 1234, 999_999, 1.5e6, 2e12, 3e15)
    assert [quantity(value) for value in given] == ["", "0", "7", "12.3", "999", "1.23k", "1M", "1.5M", "2T", "3,000T"]
