"""No orphan, a true exit code: real runs ended in every way."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from launch import supervise
from tests.ranks import ROOT


def start(overrides, folder):
    """A run without end, once it has taken two steps: the command's process, and all below it."""
    arguments = [*overrides, "parallel.pp=2", "train.total_tokens=1e12", f"hydra.run.dir={folder}", "sample.tokens=0"]
    command = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert command.poll() is None, command.stderr.read()[-3000:]
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.2)
    return command, psutil.Process(command.pid).children(recursive=True)


def ranks_of(processes):
    return [p for p in processes if any("pretrain.py" in part for part in p.cmdline()) and "RANK" in p.environ()]


def assert_all_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=20)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert not alive, f"orphans: {alive}"


def rank_1(command, processes):
    ranks = [p for p in ranks_of(processes) if p.environ()["RANK"] == "1"]
    ranks[0].kill()


def launchers_child(command, processes):
    ranks_of(processes)[0].parent().kill()


ENDINGS = {
    "SIGTERM": (lambda command, processes: command.terminate(), 128 + signal.SIGTERM),
    "SIGINT": (lambda command, processes: command.send_signal(signal.SIGINT), 128 + signal.SIGINT),
    "a rank killed": (rank_1, 128 + signal.SIGKILL),
    "the launcher killed": (launchers_child, None),
    "the command killed": (lambda command, processes: command.kill(), -signal.SIGKILL),
}


@pytest.mark.launch
@pytest.mark.parametrize("ending", ENDINGS)
def test_however_a_run_ends_nothing_is_left_and_the_exit_code_is_true(ending, overrides, tmp_path):
    end, code = ENDINGS[ending]
    command, processes = start(overrides, tmp_path)
    assert len(ranks_of(processes)) == 2
    end(command, processes)
    command.stderr.close()
    assert command.wait(timeout=60) == code if code is not None else command.wait(timeout=60) not in (0, None)
    assert_all_gone(processes)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("stubborn", ["", "trap '' TERM; "], ids=["", "deaf to SIGTERM"])
def test_what_a_launcher_leaves_in_its_group_is_ended(stubborn, monkeypatch):
    """Where ranks cannot watch the command by themselves, this alone ends them."""
    monkeypatch.setattr(supervise, "GRACE", 3.0)
    launcher = subprocess.Popen(
        ["sh", "-c", f"{stubborn}(while true; do sleep 0.1; done) & echo $!"],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    left = psutil.Process(int(launcher.stdout.readline()))
    launcher.wait()
    assert left.is_running()
    supervise._end_group(launcher.pid)
    assert_all_gone([left])


@pytest.mark.launch
def test_a_complete_run_ends_with_zero_and_bad_input_with_two(overrides, tmp_path):
    def command(*more):
        arguments = [*overrides, f"hydra.run.dir={tmp_path}", "train.max_steps=2", "sample.tokens=0", *more]
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", "train", *arguments],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "80"},
            capture_output=True,
            text=True,
        )

    complete = command("parallel.pp=2")
    assert complete.returncode == 0, complete.stderr[-3000:]
    assert (tmp_path / "summary.json").exists()
    assert "WARNING" not in complete.stderr and "DeepSpeed" not in complete.stderr + complete.stdout
    bad = command("parallel.pp=5")
    assert bad.returncode == 2 and "parallel.pp=5" in bad.stderr
