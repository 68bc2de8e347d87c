"""What a rank writes is what others read; what is being written is not read; a rank that waits says where it is."""

import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from parallel import heartbeat
from parallel.heartbeat import STACKS, Heart, Phase, file_of, read, stacks_of
from parallel.schedules import Action, Pass

ACTION = Action(Pass.B, 3, 17)


@pytest.fixture
def heart(tmp_path):
    made = Heart()
    made.share(str(tmp_path), 2)
    return made


def last(tmp_path):
    return read(file_of(tmp_path, 2))


def test_a_rank_says_which_pass_it_is_in_and_whom_it_waits_for(heart, tmp_path):
    assert (last(tmp_path).phase, last(tmp_path).step, last(tmp_path).pid) == (Phase.START, 0, os.getpid())
    heart.begin_step(8)
    heart.next_pass(ACTION, 5)
    assert last(tmp_path).phase is Phase.DATA  # a pass begins once its input is there
    heart.waits_for(Phase.RECEIVE, Action(Pass.B, 4, 17), 6, 11)
    found = last(tmp_path)
    assert (found.peer, found.awaited, found.index, str(found)) == (
        *(6, 11, 5),
        "waiting for rank 6's result of B stage 4 micro-batch 17, step 8",
    )
    heart.in_pass()
    found = last(tmp_path)
    assert str(found) == "B stage 3 micro-batch 17, step 8" and (found.index, found.rank, found.beats) == (5, 2, 4)
    with heart.in_collective:
        assert last(tmp_path).in_collective and last(tmp_path).collectives == 1
    with suppress(KeyError), heart.in_collective:
        raise KeyError
    assert not last(tmp_path).in_collective and last(tmp_path).collectives == 2
    heart.begin_evaluation()
    assert last(tmp_path).evaluating == 1
    heart.begin_step(9)
    assert (last(tmp_path).evaluating, last(tmp_path).index) == (0, 0)


def test_what_is_only_half_written_is_not_read(heart, tmp_path, monkeypatch):
    heart.at(Phase.AGREE)
    heart.memory[0] += 1  # the first count is of another beat than the last
    assert last(tmp_path) is None
    heart.memory[0] -= 1
    assert last(tmp_path).phase is Phase.AGREE


def test_every_heartbeat_that_is_read_while_they_are_given_is_whole(heart, tmp_path):
    """Each beat has its own number in every field."""
    end = time.monotonic() + 0.5

    def give():
        number = 0
        while time.monotonic() < end:
            number += 1
            heart._step = number
            heart.next_pass(Action(Pass.F, number, number), number)
            heart.in_pass()

    giving = threading.Thread(target=give)
    giving.start()
    seen = set()
    while giving.is_alive():
        if (found := last(tmp_path)) and found.phase is Phase.PASS:
            assert found.step == found.stage == found.micro_batch == found.index
            seen.add(found.step)
    assert len(seen) > 5


def test_without_a_folder_nothing_is_written(tmp_path):
    alone = Heart()
    alone.share(None, 0)
    alone.share(str(tmp_path / "not there"), 0)
    alone.at(Phase.END)
    alone.fail("nobody hears")
    assert not list(tmp_path.iterdir()) and read(file_of(tmp_path, 0)) is None


def test_a_rank_that_waits_in_c_writes_its_stacks_on_a_signal(heart, tmp_path):
    ready, go = os.pipe()
    child = os.fork()
    if not child:
        heart.share(str(tmp_path), 3)
        os.write(go, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, STACKS)
    deadline = time.monotonic() + 10
    while "in test_a_rank_that_waits" not in stacks_of(tmp_path, 3).read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert "in test_a_rank_that_waits" in stacks_of(tmp_path, 3).read_text()


def test_of_what_a_rank_fails_with_the_first_is_kept(heart, tmp_path):
    heart.fail("the cause")
    heart.fail("what came of it")
    assert "the cause" in heartbeat.failure_of(tmp_path, 2).read_text()
