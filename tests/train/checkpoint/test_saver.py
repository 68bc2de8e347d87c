"""When the settings ask for a save."""

import threading
from types import SimpleNamespace

import pytest

from conf.train_settings import CheckpointConfig
from train.checkpoint import saver
from train.checkpoint.saver import Saver


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(saver.dist, "get_rank", lambda: 0)
    return now


def made(folder, **settings):
    return Saver(None, folder, CheckpointConfig(**settings), {}, folder / "tokenizer.json", None)


def test_by_steps(clock, tmp_path):
    asked = made(tmp_path, every_steps=5, every_minutes=None)
    assert [step for step in range(1, 16) if asked.due(step)] == [5, 10, 15]


def test_by_minutes_since_the_last_and_not_while_one_is_written(clock, tmp_path):
    asked = made(tmp_path, every_minutes=2)
    clock[0] += 119
    assert not asked.due(1)
    clock[0] += 2
    assert asked.due(2)
    asked._thread = threading.Thread(target=(written := threading.Event()).wait, daemon=True)
    asked._thread.start()
    assert not asked.due(3)
    written.set()
    asked._thread.join()
    assert asked.due(4)


def test_by_neither(clock, tmp_path):
    clock[0] += 1e6
    assert not any(made(tmp_path, every_minutes=None).due(step) for step in range(1, 10))
    assert not any(made(tmp_path, enabled=False, every_steps=1).due(step) for step in range(1, 10))
