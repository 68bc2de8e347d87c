"""Where a device is, by the events of the passes that its host has launched, is what the rank's heartbeat says."""

import threading
from types import SimpleNamespace

import pytest

from parallel import device_progress
from parallel.device_progress import num_ended, say
from parallel.heartbeat import Heart, Phase, file_of, read
from parallel.layout import Layout
from parallel.schedules import Placement, Schedule, orders
from parallel.simulation import programs
from parallel.waits import judge

PLACEMENT, M = Placement(2), 4
PROGRAMS = programs(orders(Schedule("1f1b"), PLACEMENT, M), PLACEMENT)


class Event:
    """One of a device that has done its first so many things."""

    def __init__(self, number, device):
        self.number, self.device = number, device

    def query(self):
        return self.number < self.device.done


def launched(rank, passes, done):
    """A pipeline whose host has launched so many passes, of which the device has done so many begins and ends."""
    device = SimpleNamespace(done=done)
    actions = PROGRAMS[rank].actions[:passes]
    marks = [(action, Event(2 * i, device), Event(2 * i + 1, device)) for i, action in enumerate(actions)]
    return SimpleNamespace(under_way=(marks, PROGRAMS[rank], (3, 0)), placement=PLACEMENT, rank=rank, ranks=[0, 1])


@pytest.fixture
def hearts(tmp_path):
    made = [Heart(), Heart()]
    for rank, heart in enumerate(made):
        heart.share(str(tmp_path), rank)
        heart.begin_step(3)
        heart.at(Phase.UPDATE)  # both hosts wait for their devices
    return made


def beats(tmp_path):
    return {rank: read(file_of(tmp_path, rank)) for rank in range(2)}


def test_the_thread_that_asks_a_gpu_is_on_that_gpu(monkeypatch):
    told, asked = [], threading.Event()
    monkeypatch.setattr(device_progress, "EVERY", 0.01)
    monkeypatch.setattr(device_progress, "say", lambda pipeline, heart: told.append("asked") or asked.set())
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: told.append((threading.current_thread().name, device)))
    pipeline = Event(0, None)  # anything that can be gone
    device_progress.follow(pipeline, Heart())
    assert asked.wait(30)
    del pipeline
    assert told[:2] == [("device-progress", 3), "asked"]


@pytest.mark.parametrize("done", range(9))
def test_the_passes_that_have_ended_are_counted(done):
    marks, *_ = launched(0, 4, done).under_way
    assert num_ended(marks) == done // 2


def test_hosts_that_wait_for_their_devices_tell_which_of_those_does_not_go_on(hearts, tmp_path):
    all_of_them = len(PROGRAMS[0].actions)
    say(launched(0, all_of_them, 4), hearts[0])  # two passes forward have ended; the first backward one needs rank 1
    say(launched(1, all_of_them, 3), hearts[1])  # in the backward pass of the first micro-batch
    found = beats(tmp_path)
    assert str(found[1]) == "B stage 1 micro-batch 0 on its device, step 3" and found[1].on_device
    assert str(found[0]) == "waiting for rank 1's result of B stage 1 micro-batch 0 on its device, step 3"
    verdict = judge(found, Layout(1, 2, 1), {})
    assert verdict.culprits == (1,) and verdict.certain
    say(launched(0, all_of_them, 5), hearts[0])  # what it has waited for is there, and the pass has begun
    assert str(beats(tmp_path)[0]) == "B stage 0 micro-batch 0 on its device, step 3"


def test_a_device_that_says_the_same_again_gives_no_sign_and_one_that_goes_on_does(hearts, tmp_path):
    say(launched(1, 8, 3), hearts[1])
    first = beats(tmp_path)[1].beats
    say(launched(1, 8, 3), hearts[1])
    assert beats(tmp_path)[1].beats == first
    say(launched(1, 8, 4), hearts[1])
    assert beats(tmp_path)[1].beats == first + 1


def test_where_the_host_is_counts_once_its_device_has_caught_up_or_it_is_elsewhere(hearts, tmp_path):
    hearts[1].next_pass(PROGRAMS[1].actions[2], 2)
    hearts[1].in_pass()
    say(launched(1, 2, 4), hearts[1])  # both that were launched have ended
    assert not beats(tmp_path)[1].on_device and beats(tmp_path)[1].index == 2
    say(launched(1, 8, 16), hearts[1])
    assert beats(tmp_path)[1].phase is Phase.AGREE  # all passes have; the sum over all ranks is what follows
    hearts[1].at(Phase.REPORT)
    assert beats(tmp_path)[1].phase is Phase.REPORT
    hearts[1].begin_step(4)
    assert beats(tmp_path)[1].step == 4 and not beats(tmp_path)[1].on_device
