import fcntl
import threading
import time
from contextlib import contextmanager

import pytest

from launch.run_folder import RunFolder
from launch.run_state import age, is_locked, state_of
from model.problems import BadInput
from tests.launch.folders import ELSEWHERE, NOW, OPEN, ago, records, write_run
from train.preflight import locked
from train.records import METRICS, SUMMARY
from train.started import LOCK, STARTED

STEPS = records(100)
SAID = {"event": "failed", "cause": "was ended by SIGKILL", "rank": 3, "host": "node7", "step": 90}
ENDED = {"ended": {"time": ago(5), "reason": None}}


@contextmanager
def held(folder, how=fcntl.LOCK_EX):
    with open(folder / LOCK) as file:
        fcntl.flock(file, how)
        yield


def judged(folder, **run):
    return said(write_run(folder, **run))


def said(folder):
    state = state_of(RunFolder(folder), NOW)
    return f"{state}, {state.why}" if state.why else str(state)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"lines": STEPS, "started": OPEN}, "running"),
        ({"lines": STEPS, "started": OPEN, "changed": 600}, "running, no step for 10 min"),
        ({"lines": records(100, seconds=500.0), "started": OPEN, "changed": 600}, "running"),
        ({"lines": STEPS, "started": {"time": ago(30)}}, "starting, preparing for 30 s"),
        ({"lines": STEPS, "started": {**OPEN, "resumed": 100, "time": ago(30)}}, "starting, before its first step for"),
        ({"lines": STEPS, "started": {**OPEN, "resumed": 99, "time": ago(30)}}, "running"),
        ({"started": OPEN}, "starting, before its first step for 60 min"),
        # what is left of the start before
        ({"lines": STEPS, "started": {"time": ago(5)}, "summary": {"complete": False}}, "starting, preparing"),
        ({"lines": STEPS, "started": OPEN, "events": [{**SAID, "time": ago(7200), "not_restarted": "x"}]}, "running"),
        ({"lines": STEPS}, "running"),  # from before starts were noted
        # the summary is there, and the process has not ended yet
        ({"lines": STEPS, "started": OPEN, "summary": {"complete": True}}, "complete"),
    ],
)
def test_a_run_whose_folder_is_locked_is_under_way(run, expected, tmp_path):
    write_run(tmp_path, **run)
    with held(tmp_path):
        assert said(tmp_path).startswith(expected)
        assert state_of(RunFolder(tmp_path), NOW).certain


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"lines": STEPS, "started": {**OPEN, **ENDED}, "summary": {"complete": True}}, "complete"),
        ({"lines": STEPS, "summary": {"complete": True, "missing_records": 3}}, "complete, 3 records are missing"),
        ({"lines": STEPS, "started": {**OPEN, **ENDED}, "summary": {"complete": False}}, "stopped"),
        ({"lines": STEPS, "summary": {"diverged": True, "reason": "the loss is NaN"}}, "diverged, the loss is NaN"),
        (
            {"lines": STEPS, "started": {**OPEN, "ended": {"time": ago(9), "reason": "OSError: no space"}}},
            "failed, OSError: no space",
        ),
        (
            {"lines": STEPS, "started": OPEN},
            "failed, process 4194305 on here is gone without a word, as one that was killed",
        ),
        (
            {
                "lines": STEPS,
                "started": OPEN,
                "events": [{**SAID, "time": ago(9), "not_restarted": "no"}],
            },
            "failed, rank 3 on node7 was ended by SIGKILL, step 90; not started again: no",
        ),
        (
            {"lines": STEPS, "started": OPEN, "events": [{**SAID, "time": ago(9), "restart_in_seconds": 30.0}]},
            "restarting, in 21 s, after: rank 3 on node7 was ended by SIGKILL, step 90",
        ),
        (
            {"lines": STEPS, "started": OPEN, "events": [{**SAID, "time": ago(9), "restart_in_seconds": 1.0}]},
            "restarting, now, after: rank 3 on node7",
        ),
        (
            {"lines": STEPS, "started": OPEN, "events": [{**SAID, "time": ago(901), "restart_in_seconds": 1.0}]},
            "failed?, rank 3 on node7 was ended by SIGKILL, step 90; it was to be started again 15 min ago",
        ),
        # an earlier failure, from which it had recovered
        (
            {"lines": STEPS, "started": OPEN, "events": [{**SAID, "time": ago(4000), "not_restarted": "x"}]},
            "failed, process 4194305",
        ),
    ],
)
def test_one_that_is_over_says_why(run, expected, tmp_path):
    assert judged(tmp_path, **run).startswith(expected)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"lines": STEPS, "started": {**ELSEWHERE, **OPEN}}, "running?, on node7"),
        ({"lines": STEPS, "started": {**ELSEWHERE, **OPEN}, "changed": 720}, "silent?, for 12 min on node7"),
        (
            {"lines": records(100, seconds=100.0), "started": {**ELSEWHERE, **OPEN}, "changed": 720},
            "running?, on node7",
        ),
        ({"started": {**ELSEWHERE, "time": ago(30)}}, "starting?, on node7"),
        ({"lines": STEPS}, "running?"),
        ({"lines": STEPS, "changed": 5 * 86400}, "silent?, for 5 d"),
        ({}, "no step"),
        ({"lines": STEPS, "started": {**ELSEWHERE, **OPEN, **ENDED}}, "failed"),  # it has said so itself
        ({"lines": STEPS, "changed": -30, "started": {**ELSEWHERE, **OPEN}}, "running?"),  # a clock that is ahead
    ],
)
def test_what_cannot_be_known_has_a_question_mark(run, expected, tmp_path):
    assert judged(tmp_path, **run).startswith(expected)


def test_the_lock_tells_of_other_hosts_too(tmp_path):
    write_run(tmp_path, lines=STEPS, started={**ELSEWHERE, **OPEN}, changed=5000)
    with held(tmp_path):
        assert said(tmp_path) == "running, no step for 83 min"
    assert said(tmp_path).startswith("silent?")


def test_a_look_at_the_lock_holds_nobody_up(tmp_path):
    write_run(tmp_path)
    with held(tmp_path, fcntl.LOCK_SH):  # others that look
        assert is_locked(tmp_path) is False
        with pytest.raises(BadInput, match="another process is training"), locked(tmp_path):
            pass
    began = threading.Event()

    def look():
        with held(tmp_path, fcntl.LOCK_SH):
            began.set()
            time.sleep(0.05)

    looking = threading.Thread(target=look)
    looking.start()
    began.wait()
    with locked(tmp_path):
        assert is_locked(tmp_path) is True
    looking.join()
    (tmp_path / LOCK).unlink()
    assert is_locked(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"complete": true'])
def test_damaged_files_are_said_and_are_no_errors(content, tmp_path):
    write_run(tmp_path, lines=STEPS)
    for name in (STARTED, SUMMARY):
        (tmp_path / name).write_bytes(content)
    run = RunFolder(tmp_path)
    assert str(state_of(run, NOW)) == "running?"
    assert {fault.split(":")[0] for fault in run.faults} == {STARTED, SUMMARY}


def test_a_note_with_anything_in_it_is_no_error(tmp_path):
    for value in (None, 7, "x", [], {}, {"reason": 7}):
        note = dict.fromkeys(("time", "host", "boot", "pid", "ended", "steps", "resumed", "tokens"), value)
        write_run(tmp_path, lines=STEPS, started=note)
        (tmp_path / "events.jsonl").write_text('{"event": "failed"}\n7\n{"event"\n')
        assert said(tmp_path)


def test_ages_are_said_roughly():
    assert [age(seconds) for seconds in (-1, 119, 120, 7199, 7200, 172_799, 172_800)] == [
        *("0 s", "119 s", "2 min", "120 min", "2 h", "48 h", "2 d"),
    ]


def test_a_folder_that_is_gone_meanwhile_has_nothing_in_it(tmp_path):
    run = RunFolder(tmp_path / "gone")
    assert str(state_of(run, NOW)) == "no step" and run.last is None and not run.config and not run.checkpoints
    assert not (tmp_path / METRICS).exists()
