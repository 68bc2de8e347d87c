"""No orphan, a true exit code, a checkpoint where one can be made: real runs ended in every way.

The commands are forked from a process that has imported everything (`tests.ranks`). Launcher and ranks are forked too
where a rank or the launcher is killed or a signal comes (`tests.launch.forked`); else they are what the commands start.
"""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest

from launch import supervise
from parallel.processes import free_port
from tests.ranks import ROOT, nursery

PRETRAIN = ROOT / "train" / "pretrain.py"
TRAIN, FORKED = ["launch.cli", "train"], ["tests.launch.forked", "train"]
DEEPSPEED = ["deepspeed.launcher.runner", "--num_gpus", "2"]


class Command:
    """A module that is run as ``python -m`` runs it, in a process group of its own, as subprocess has it."""

    def __init__(self, words, logs, **environment):
        logs.mkdir()
        module, *arguments = words
        self._ranks, self.said = nursery().start(module, 1, arguments, logs, **environment), logs / "rank0.log"
        (self.pid,) = self._ranks.pids

    def poll(self):
        return self._ranks.codes[0]

    def wait(self, timeout=60.0):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, self.said.read_text()[-3000:]
            time.sleep(0.02)
        return self.poll()

    def send_signal(self, number):
        self._ranks.signal(number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Run:
    """A run without end, once it has taken two steps: the command's process, and all below it."""

    def __init__(self, command, overrides, folder):
        more = ["parallel.pp=2", "train.total_tokens=1e12", f"hydra.run.dir={folder}", "sample.tokens=0"]
        more += ["train.timeline_at=[]"]  # a rank that draws one imports Matplotlib for it
        self.folder, self.arguments, self.processes = folder, [*overrides, *more], []
        before = self.records()
        self.command = Command([*command, *self.arguments], folder.parent / f"{folder.name}-said")
        self.said = self.command.said
        deadline = time.monotonic() + 120
        while self.records() < before + 2:
            assert self.command.poll() is None, self.said.read_text()[-3000:]
            assert time.monotonic() < deadline, "no step was taken"
            time.sleep(0.2)
        self.processes = []
        self.look()

    def look(self):
        """See which processes there are."""
        before, self.processes = self.processes, psutil.Process(self.command.pid).children(recursive=True)
        # The launcher starts them in order; of a process that was forked the system tells no environment of its own.
        self.ranks = sorted(
            (p for p in self.processes if str(PRETRAIN) in p.cmdline()[1:3]), key=lambda p: (p.create_time(), p.pid)
        )
        self.processes += before
        assert len(self.ranks) == 2

    def end(self):
        """Whatever the test has found."""
        for process in (*self.processes, self.command):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.command.wait()

    def records(self):
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    @property
    def launcher(self):
        """DeepSpeed's own, the parent of the ranks."""
        return self.ranks[0].parent()

    def assert_all_gone(self):
        _, alive = psutil.wait_procs(self.processes, timeout=20)
        alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        for process in alive:
            process.kill()
        assert not alive, f"orphans: {alive}"

    def saved_step(self):
        """The step that the run stopped after, its newest checkpoint and its last record."""
        steps = [json.loads(line)["step"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))
        manifest = json.loads((self.folder / "checkpoints" / "latest" / "manifest.json").read_text())
        assert manifest["step"] == steps[-1]
        return steps[-1]


@pytest.fixture
def begin():
    """Starts runs, and leaves none behind."""
    begun = []

    def start(*arguments):
        begun.append(Run.__new__(Run))
        begun[-1].__init__(*arguments)
        return begun[-1]

    yield start
    for run in begun:
        run.end()


def twice(run):
    """The second one while the first is being obeyed: one rank is stopped, so that the others wait for it."""
    run.ranks[1].suspend()
    run.command.send_signal(signal.SIGTERM)
    time.sleep(supervise.GRACE / 20)
    run.command.send_signal(signal.SIGINT)


KILLED = {
    "a rank killed": (lambda run: run.ranks[1].kill(), 128 + signal.SIGKILL),
    "the launcher killed": (lambda run: run.launcher.kill(), None),
    "the command killed": (lambda run: run.command.kill(), -signal.SIGKILL),
    "told to stop twice": (twice, 128 + signal.SIGINT),
}


@pytest.mark.launch
@pytest.mark.parametrize("ending", KILLED)
def test_however_a_run_is_killed_nothing_is_left_and_the_exit_code_is_true(ending, begin, overrides, tmp_path):
    end, code = KILLED[ending]
    command = TRAIN if ending == "the command killed" else FORKED
    run = begin(command, [*overrides, "launch.restarts=0"], tmp_path / "run")
    end(run)
    found = run.command.wait(timeout=60)
    assert found == code if code is not None else found not in (0, None)
    run.assert_all_gone()


@pytest.mark.launch
def test_a_run_that_has_been_started_again_is_told_to_stop_saves_and_ends_with_zero(begin, overrides, tmp_path):
    run = begin(FORKED, [*overrides, "checkpoint.every_steps=2"], tmp_path / "run")
    run.ranks[1].kill()
    events, deadline = run.folder / "events.jsonl", time.monotonic() + 120
    while not (events.exists() and "recovered" in events.read_text()):
        assert run.command.poll() is None and time.monotonic() < deadline, run.said.read_text()[-3000:]
        time.sleep(0.2)
    run.look()
    told = [json.loads(line) for line in events.read_text().splitlines()]
    failed, recovered = [event for event in told if event["event"] != "alert"]  # of a save that this has cut off
    assert (failed["rank"], failed["cause"]) == (1, "was ended by SIGKILL (as a system does that is out of memory)")
    assert recovered["seconds"]["lost"] > 0 and failed["step"] == recovered["step"]
    assert "restart 1, after a failure: rank 1 on " in (run.folder / "pretrain.log").read_text()
    run.command.send_signal(signal.SIGINT)
    assert run.command.wait(timeout=60) == 0, run.said.read_text()[-3000:]
    run.assert_all_gone()
    step = run.saved_step()
    for said in (f"stopped after step {step}", "to go on", "a second signal stops at once"):
        assert run.said.read_text().count(said) == 1, said
    assert json.loads((run.folder / "summary.json").read_text())["complete"] is False


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_group_of_deepspeeds_launcher_saves_too(number, begin, overrides, tmp_path):
    """Ctrl-C under the plain command: the launcher hears it as well, and ends each rank again, and W&B's process."""
    run = begin([*DEEPSPEED, "--master_port", str(free_port()), str(PRETRAIN)], overrides, tmp_path / "run")
    os.killpg(run.command.pid, number)
    run.command.wait(timeout=60)
    run.assert_all_gone()
    run.saved_step()
    assert "ConnectionResetError" not in run.said.read_text()  # of a W&B that is not there any more


@pytest.mark.parametrize("stubborn", ["", "trap '' TERM; "], ids=["", "deaf to SIGTERM"])
def test_what_a_launcher_leaves_in_its_group_is_ended(stubborn, monkeypatch):
    """Where ranks cannot watch the command by themselves, this alone ends them."""
    monkeypatch.setattr(supervise, "GRACE", 1.0)
    launcher = subprocess.Popen(
        ["sh", "-c", f"{stubborn}(while true; do sleep 0.1; done) & echo $!"],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    left = psutil.Process(int(launcher.stdout.readline()))
    launcher.wait()
    assert left.is_running()
    supervise.end_group(launcher.pid)
    _, alive = psutil.wait_procs([left], timeout=10)
    assert not alive


@pytest.mark.launch
def test_a_complete_run_ends_with_zero_and_bad_input_with_two(overrides, tmp_path):
    def command(*more, words=TRAIN):
        arguments = [*overrides, f"hydra.run.dir={tmp_path / 'run'}", "train.max_steps=2", "sample.tokens=0", *more]
        ended = Command([*words, *arguments], tmp_path / f"said-{'-'.join(more)}", COLUMNS="80")
        return ended.wait(120), ended.said.read_text()

    code, said = command("parallel.pp=2")
    assert code == 0, said[-3000:]
    assert (tmp_path / "run" / "summary.json").exists()
    assert "WARNING" not in said and "DeepSpeed" not in said
    code, said = command("parallel.pp=1", words=FORKED)
    assert code == 0 and "complete, 2 of 2 steps" in said
    code, said = command("parallel.pp=5")
    assert code == 2 and "parallel.pp=5" in said
    code, said = command("model.d_ff=96")
    assert code == 2 and "model.d_ff=96: the checkpoint" in said
