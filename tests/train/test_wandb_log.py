"""W&B told in a thread of its own: of its client the real one, offline, and one whose process the tests hold up."""

import json
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
import wandb

from tests.launch.wandb_parts import history_and_config
from tests.ranks import ROOT
from tests.shapes import preset
from train import wandb_log
from train.records import METRICS
from train.wandb_file import records
from train.wandb_log import WandbLog


class Slow:
    """A run whose process takes nothing until it goes on."""

    url, dir, starting_step = None, "wandb/run-abc/files", 0

    def __init__(self):
        self.goes_on, self.logged, self.summary = threading.Event(), [], {}

    def define_metric(self, name, **how):
        pass

    def log(self, values, step=None, commit=True):
        self.goes_on.wait(30.0)
        self.logged.append(step or next(iter(values)))

    def alert(self, title, text, level):
        self.log({title: text})

    def finish(self):
        self.log({"finish": 1})


@pytest.fixture
def slow(monkeypatch, tmp_path):
    """A log whose W&B does not answer, with room for three things, and what it says."""
    run, said, now = Slow(), [], [0.0]
    monkeypatch.setattr(wandb, "init", lambda **given: run)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    monkeypatch.setattr(wandb_log, "ROOM", 3)
    config = preset("tiny", "wandb.mode=online", "wandb.finish_seconds=20")
    log = WandbLog(config, tmp_path, {}, lambda text, level: said.append(text), lambda: now[0])
    assert log.wait(20.0)

    def record(step):
        with open(tmp_path / METRICS, "a") as file:
            file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
        log.log({"step": step, "loss": 1.0})

    def held_up():
        record(1)
        while log._calls.waiting:
            time.sleep(0.001)

    run.held_up = held_up
    return log, run, record, said, now


def test_what_finds_no_room_is_given_later_in_order(slow):
    log, run, record, said, _ = slow
    for step in range(1, 21):
        record(step)
    assert not run.logged
    run.goes_on.set()
    assert log.wait(20.0)
    record(21)
    log.finish({})
    assert run.logged == [*range(1, 22), "finish"] and not said


def test_what_finds_no_room_at_the_end_is_given_then(slow):
    log, run, record, _, _ = slow
    run.held_up()
    for number in range(3):
        log.alert(f"alert {number}", "", "WARN")
    for step in range(2, 6):
        record(step)
    threading.Timer(0.2, run.goes_on.set).start()
    log.finish({})
    assert run.logged == [1, "alert 0", "alert 1", "alert 2", *range(2, 6), "finish"]


def test_alerts_and_tables_that_find_no_room_are_counted(slow):
    log, run, _, said, _ = slow
    run.held_up()
    for number in range(6):
        log.alert(f"alert {number}", "", "WARN")
    threading.Timer(0.2, run.goes_on.set).start()
    log.finish({})
    assert run.logged == [1, "alert 0", "alert 1", "alert 2", "finish"]
    assert said == ["W&B lacks 3 pictures, tables or alerts, which it did not take"]


def test_that_it_takes_nothing_is_said_once_and_that_it_does_again(slow):
    log, run, _, _, now = slow
    run.held_up()
    assert log.news() is None
    now[0] = 61.0
    assert log.news() == "W&B has taken nothing for 60 s; training goes on, and metrics.jsonl has what W&B misses"
    assert log.news() is None
    run.goes_on.set()
    assert log.wait(20.0)
    assert log.news() == "W&B takes records again, and gets those that it misses" and log.news() is None


FAILS = """
import logging, sys, psutil
from pathlib import Path
from tests.shapes import preset
from train.tracking import Tracker

config = preset("tiny", "wandb.mode=offline", "wandb.finish_seconds=2")
tracker = Tracker(config, Path(sys.argv[1]), steps=500, facts={})
figures = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "seconds": 1.0, "tokens_per_second": 1.0}
tracker.step({"step": 1, "tokens": 8, **figures})
assert tracker.wandb.wait(20.0)
(core,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
core.suspend()
for step in range(2, 402):  # its socket has room for 150
    tracker.step({"step": step, "tokens": 8 * step, **figures, "wait_seconds": [0.1] * 30})
print(core.pid)
raise SystemExit("as the test asks")
"""


def test_steps_are_taken_and_python_ends_though_wandbs_process_is_stopped(tmp_path):
    # W&B's process of another test would serve this one too.
    own = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    command = [sys.executable, "-c", FAILS, tmp_path]
    ran = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and "as the test asks" in ran.stderr, ran.stderr
    assert "W&B does not answer, and its process is ended; metrics.jsonl has what it misses" in ran.stderr
    assert not psutil.pid_exists(int(ran.stdout))


def test_wandbs_files_have_axes_grouped_names_tables_and_the_summary(tmp_path):
    config = preset("tiny", "wandb.mode=offline", "alerts.command='curl https://example.org/secret'")
    log = WandbLog(config, tmp_path, {}, lambda text, level: None)
    for step in (1, 2, 3):
        log.log({"step": step, "tokens": 8 * step, "loss": 1.0, "memory_gib": [1.0, 2.0]})
        if step == 1:
            log.table("samples", ["prompt"], [["a"]])
    log.table("samples", ["prompt"], [["b"]])
    log.finish({"complete": True})
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # W&B's process may still be writing when its client says that the run has ended
    while not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    history, logged_config = history_and_config(path)
    assert [(row.get("step"), row.get("memory/stage1"), "samples" in str(sorted(row))) for row in history] == [
        *[(1, 2.0, False), (2, 2.0, True), (3, 2.0, False), (None, None, True)]
    ]
    metrics = {
        record.metric.name or record.metric.glob_name: record.metric.step_metric
        for record in records(path)
        if record.WhichOneof("record_type") == "metric"
    }
    assert metrics["tokens"] == "" and metrics["train/*"] == metrics["pipeline/*"] == metrics["memory/*"] == "tokens"
    assert logged_config["alerts"]["command"] == "curl …" and "secret" not in json.dumps(logged_config)
