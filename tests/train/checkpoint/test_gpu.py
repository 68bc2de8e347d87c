"""A run on a GPU that is killed, and goes on: one process over NCCL, from corpus to checkpoint."""

import os
import signal
import subprocess
import sys
import time

import pytest

from parallel.processes import free_port
from tests.devices import environment_with_gpus
from tests.ranks import ROOT
from tests.train.checkpoint import runs

pytestmark = [pytest.mark.gpu, pytest.mark.launch]


def start(folder, overrides):
    environment = environment_with_gpus()
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "train/pretrain.py", *runs.DEFAULTS, *overrides, f"hydra.run.dir={folder}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def test_a_run_that_is_killed_goes_on_to_the_last_bit(overrides, tmp_path):
    """With deterministic kernels; without, the fastest backward passes of attention add in an order of their own."""
    through, killed = tmp_path / "through", tmp_path / "killed"
    recipe = [*overrides, "train.deterministic=true"]
    assert start(through, recipe).wait(timeout=240) == 0
    run = start(killed, recipe)
    deadline = time.monotonic() + 120
    while not runs.saved(killed, 4).exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert start(killed, recipe).wait(timeout=240) == 0
    assert runs.curve(killed) == runs.curve(through)
    last = [runs.digests(runs.saved(folder, runs.STEPS)) for folder in (killed, through)]
    assert last[0] == last[1]
