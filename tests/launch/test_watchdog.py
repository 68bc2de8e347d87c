"""When a run does not move, by a clock that is the test's, and what is said of it."""

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch import stacks, watchdog
from launch.stacks import innermost
from launch.watchdog import Watchdog, described, exit_code_of, heartbeats_folder, process_state, remove_heartbeats
from parallel import heartbeat
from parallel.heartbeat import Heart, Phase
from parallel.layout import Layout
from parallel.schedules import Action, Pass


class Ranks:
    """Two ranks of a pipeline, whose processes are this one; the clock goes on by hand."""

    def __init__(self, folder, stall_seconds=None):
        self.hearts = [Heart(), Heart()]
        for rank, heart in enumerate(self.hearts):
            heart.share(str(folder), rank)
        self.now = 1000.0
        self.dog = Watchdog(folder, Layout(1, 2, 1), stall_seconds, lambda: self.now)

    def step(self, number, seconds=1.0):
        for heart in self.hearts:
            heart.begin_step(number)
        return self.after(seconds)

    def after(self, seconds):
        """What the watchdog says in that time, looking every second."""
        said = None
        while seconds > 0 and said is None:
            self.now += min(1.0, seconds)
            seconds -= 1.0
            said = self.dog.look()
        return said

    def held_up(self):
        """Rank 0 waits for rank 1, which is in a pass."""
        self.hearts[1].next_pass(Action(Pass.B, 1, 3), 4)
        self.hearts[1].in_pass()
        self.hearts[0].next_pass(Action(Pass.B, 0, 3), 6)
        self.hearts[0].waits_for(Phase.RECEIVE, Action(Pass.B, 1, 3), 1, 4)


@pytest.fixture
def ranks(tmp_path):
    return Ranks(tmp_path)


def test_the_limit_follows_from_the_steps_and_no_rank_has_to_be_told(ranks):
    assert ranks.dog.limit == watchdog.BEFORE_STEPS
    for number in range(1, 6):
        ranks.step(number, 20.0)
    assert ranks.dog.limit == pytest.approx(5 * 20, rel=0.1)
    for number in range(6, 60):
        ranks.step(number)
    assert ranks.dog.limit == watchdog.LEAST


def test_a_run_that_does_not_move_is_told_with_who_is_waited_for(ranks):
    for number in range(1, 6):
        ranks.step(number)
    ranks.held_up()
    assert ranks.after(29) is None
    stall = ranks.after(5)
    assert stall.verdict.culprits == (1,) and stall.seconds >= 30 == stall.limit
    said = "\n".join(described(stall))
    assert f"the others wait for rank 1 (process {os.getpid()}), which is here: B stage 1 micro-batch 3, step 5" in said
    assert "rank 0: waiting for rank 1's result of B stage 1 micro-batch 3, step 5; it waits for rank 1" in said


def test_one_beat_of_one_rank_is_enough_and_collectives_count(ranks):
    for number in range(1, 6):
        ranks.step(number)
    for _ in range(5):
        assert ranks.after(20) is None
        with ranks.hearts[1].in_collective:
            assert ranks.after(20) is None
    assert ranks.after(31) is not None


@pytest.mark.parametrize("phase", [Phase.LOAD, Phase.KEEP, Phase.SAVE, Phase.END])
def test_what_takes_long_by_its_nature_may(phase, ranks):
    for number in range(1, 6):
        ranks.step(number)
    ranks.hearts[0].at(phase)
    ranks.hearts[0].at(phase)
    assert ranks.after(600) is None
    ranks.hearts[0].at(Phase.RECORD)
    assert ranks.after(40) is not None


def test_a_watchdog_that_was_stopped_itself_waits_anew(ranks):
    for number in range(1, 6):
        ranks.step(number)
    ranks.now += 4000  # a machine that slept, or a job that was suspended
    assert ranks.dog.look() is None
    assert ranks.after(29) is None and ranks.after(5) is not None


def test_a_rank_that_is_stopped_is_the_one_even_while_another_saves(ranks, tmp_path, monkeypatch):
    for number in range(1, 6):
        ranks.step(number)
    ranks.hearts[0].at(Phase.SAVE)
    ranks.hearts[1].at(Phase.SAVE)
    states = iter([psutil.STATUS_RUNNING, psutil.STATUS_STOPPED] * 100)
    monkeypatch.setattr(watchdog, "process_state", lambda pid: next(states))
    stall = ranks.after(40)
    assert stall.verdict.culprits == (1,) and "it is stopped (SIGSTOP)" in "\n".join(described(stall))


def test_the_first_to_end_and_its_exit_code_are_kept(tmp_path):
    ended = subprocess.Popen(["sh", "-c", "kill -9 $$"])
    deadline = time.monotonic() + 10
    while process_state(ended.pid) != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert exit_code_of(ended.pid) == -signal.SIGKILL
    assert ended.wait() == -signal.SIGKILL and process_state(ended.pid) is None
    three = subprocess.Popen(["sh", "-c", "exit 3"])
    while process_state(three.pid) != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert exit_code_of(three.pid) == 3
    three.wait()


def test_folders_of_watchdogs_that_are_gone_are_removed_and_no_other():
    ready, go = os.pipe()
    child = os.fork()
    if not child:
        os.write(go, str(heartbeats_folder()).encode())
        time.sleep(60)
        os._exit(0)
    left = Path(os.read(ready, 200).decode())
    own = heartbeats_folder()
    assert left.exists() and own.exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    remove_heartbeats(heartbeats_folder())
    assert not left.exists() and own.exists()
    remove_heartbeats(own)
    assert not own.exists()


@pytest.mark.parametrize("earlier", [None, "of an earlier stall"])
def test_what_nccl_has_recorded_is_waited_for_until_it_is_whole(earlier, tmp_path, monkeypatch):
    """A thread plays NCCL's, which looks at its pipe now and then."""
    folder, stalls = tmp_path / "beats", tmp_path / "run" / "stalls"
    folder.mkdir(), stalls.parent.mkdir()
    dump = stalls / "flight-recorder-rank-0"
    if earlier:
        stalls.mkdir()
        dump.write_text(earlier)
    monkeypatch.setattr(stacks, "WAIT", 30.0)
    os.mkfifo(folder / "nccl-0.pipe")
    pipe = os.open(folder / "nccl-0.pipe", os.O_RDONLY | os.O_NONBLOCK)

    def asked():
        with suppress(BlockingIOError):  # who asks has the pipe open, and has not written yet
            return os.read(pipe, 1)

    def nccl():
        while not asked():
            time.sleep(0.01)
        time.sleep(0.5)
        dump.write_text("the first half, ")
        time.sleep(0.05)
        with open(dump, "a") as file:
            file.write("the second")

    Heart().share(str(folder), 0)
    thread = threading.Thread(target=nccl, daemon=True)
    thread.start()
    beats = {0: heartbeat.read(heartbeat.file_of(folder, 0))}
    found = stacks.collect(beats, folder, [], stalls, native=0)
    assert dump.read_text() == "the first half, the second"
    assert "in test_what_nccl_has_recorded" in found[0]
    thread.join()
    os.close(pipe)


def test_the_innermost_frames_are_those_of_the_thread_that_computes():
    text = (
        'Thread 0x01 (most recent call first):\n  File "/a/other.py", line 3 in wait\n\n'
        'Current thread 0x02 (most recent call first):\n  File "/a/tensor.py", line 88 in _reduce\n'
        '  File "/a/loop.py", line 5 in step\n'
    )
    assert innermost(text) == ["/a/tensor.py:88 in _reduce", "/a/loop.py:5 in step"]
    assert innermost("no stack: the process does not answer\n") == []
