import json
import os
import subprocess
import sys
import time

import pytest

from tests.ranks import ROOT
from train.data.claims import PATIENCE, Claims


class Clock:
    now = 1e6

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def participant(folder, clock, elsewhere=False) -> Claims:
    """One that counts only when told to; `elsewhere` hides on which machine its process is."""
    made = Claims(folder, clock, beat=None).__enter__()
    if elsewhere:
        move_away(folder, made)
    return made


def move_away(folder, one: Claims) -> None:
    alive = folder / "alive" / one._own
    shown = json.loads(alive.read_text())
    alive.write_text(json.dumps({**shown, "where": "another machine"}))


def test_a_shard_is_one_participants(tmp_path, clock):
    first, second = participant(tmp_path, clock), participant(tmp_path, clock)
    assert first.take("000000") and not second.take("000000") and not first.take("000000")
    assert second.take("000001")
    clock.now += 10 * PATIENCE
    assert not first.take_over("000000")  # its own
    first.done("000000")
    for one in (first, second):
        one.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["000000"]  # what was not finished is free again
    assert not list((tmp_path / "alive").iterdir())
    (tmp_path / "claims" / "000001").write_text(second._own)
    assert participant(tmp_path, clock).take_over("000001")  # of one that has left


@pytest.mark.parametrize("skew", [-1e9, 1e9])
def test_a_count_that_stands_still_is_death_whatever_the_clocks_say(tmp_path, clock, skew):
    holder, other = participant(tmp_path, clock, elsewhere=True), participant(tmp_path, clock)
    assert holder.take("000000")
    for path in (*tmp_path.glob("*/*"), *tmp_path.glob("*")):  # files of a machine whose clock is years away
        os.utime(path, (time.time() + skew, time.time() + skew))
    for _ in range(20):  # slow, and alive
        assert not other.take_over("000000")
        clock.now += PATIENCE - 1
        holder.count()
        move_away(tmp_path, holder)
    assert not other.take_over("000000")
    clock.now += PATIENCE - 1
    assert not other.take_over("000000")
    clock.now += 1
    assert other.take_over("000000")
    third = participant(tmp_path, clock)
    clock.now += 10 * PATIENCE
    assert not third.take_over("000000")  # whose process is here, and was not watched before


def test_a_claim_without_a_name_is_watched_as_well(tmp_path, clock):
    """A participant that was killed between making the file and writing to it."""
    other = participant(tmp_path, clock)
    (tmp_path / "claims" / "000000").touch()
    assert not other.take_over("000000")
    clock.now += PATIENCE
    assert other.take_over("000000")


def test_a_process_that_was_killed_here_is_dead_at_once(tmp_path, clock):
    code = f"""
import sys, time
from pathlib import Path
from train.data.claims import Claims
with Claims(Path({str(tmp_path)!r})) as claims:
    print(claims.take("000000"), flush=True)
    time.sleep(60)
"""
    held = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert held.stdout.readline() == "True\n"
    other = participant(tmp_path, clock)
    assert not other.take_over("000000")
    held.kill()
    held.wait()
    assert other.take_over("000000")


def test_of_many_one_takes_over(tmp_path, clock):
    holder = participant(tmp_path, clock, elsewhere=True)
    holder.take("000000")
    others = [participant(tmp_path, clock) for _ in range(5)]
    assert not any(other.take_over("000000") for other in others)
    clock.now += PATIENCE
    assert [other.take_over("000000") for other in others] == [True, False, False, False, False]
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["000000"]


def test_a_participant_counts_by_itself(tmp_path):
    with Claims(tmp_path, beat=0.01) as one:
        alive, seen = tmp_path / "alive" / one._own, set()
        deadline = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add(alive.read_text())
        assert len(seen) >= 3
        alive.unlink()  # the corpus was finished: nothing is made anew
        time.sleep(0.05)
        assert not alive.exists()
