"""Calls in a thread of their own, which these tests hold up as they like."""

import threading

import pytest

from train.background import Background


@pytest.fixture
def held():
    """A background whose first call lasts until the event is set."""
    background, go = Background("test", room=2), threading.Event()
    begun = threading.Event()
    background.call(lambda: (begun.set(), go.wait(20.0)))
    assert begun.wait(20.0)
    yield background, go
    go.set()


def test_calls_are_made_in_order_and_none_is_waited_for(held):
    background, go = held
    made = []
    assert [background.call(lambda number=number: made.append(number)) for number in range(3)] == [True, True, False]
    assert background.call(lambda: made.append("must"), must=True)
    assert not made and background.waiting == 3 and not background.wait(0.01)
    go.set()
    assert background.wait(20.0) and made == [0, 1, "must"]


def test_calls_that_have_not_begun_can_be_forgotten(held):
    background, go = held
    made = []
    background.call(lambda: made.append(1))
    assert background.clear() == 1
    go.set()
    assert background.wait(20.0) and not made


def test_how_long_the_call_under_way_has_lasted_is_known():
    now, go, begun = [5.0], threading.Event(), threading.Event()
    background = Background("test", room=2, clock=lambda: now[0])
    background.call(lambda: (begun.set(), go.wait(20.0)))
    assert begun.wait(20.0)
    now[0] = 65.0
    assert background.busy_seconds == 60.0
    go.set()
    assert background.wait(20.0) and background.busy_seconds == 0.0


def test_a_call_that_fails_is_logged_and_the_next_is_made(caplog):
    background, made = Background("test", room=2), []
    background.call(lambda: 1 / 0)
    background.call(lambda: made.append(1))
    assert background.wait(20.0) and made == [1] and "division by zero" in caplog.text
