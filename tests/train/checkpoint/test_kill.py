"""Killed at any moment or told to stop at any, a run that is started again ends as if nothing had been."""

import json
import random
import signal
import time

import pytest

from tests.launch.wandb_parts import logged_steps
from tests.train.checkpoint import runs
from tests.train.checkpoint.runs import STEPS, wait_for

TRIALS, LOGGED = 21, 4


def unfinished(folder):
    return list((folder / "checkpoints").glob("step-*.tmp"))


def assert_undisturbed(folder, undisturbed):
    assert runs.digests(runs.saved(folder, STEPS)) == runs.digests(runs.saved(undisturbed, STEPS))
    assert runs.curve(folder) == runs.curve(undisturbed)
    assert json.loads((folder / "summary.json").read_text())["complete"] is True
    assert not unfinished(folder)


@pytest.mark.launch
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(overrides, undisturbed, tmp_path):
    killed, in_a_save = 0, 0
    for trial in range(TRIALS):
        chance, folder = random.Random(trial), tmp_path / str(trial)
        logging = ["wandb.mode=offline"] if trial < LOGGED else []
        ranks = runs.start(folder, 2, *overrides, "parallel.pp=2", *logging)
        # Half of them once a certain save has begun, the others a moment after a certain step.
        step = chance.randrange(1, STEPS)
        if trial % 2:
            wait_for(lambda folder=folder, step=step: any(int(p.name[5:13]) >= step for p in unfinished(folder)), ranks)
        else:
            metrics = folder / "metrics.jsonl"
            wait_for(lambda m=metrics, step=step: m.exists() and m.read_bytes().count(b"\n") >= step, ranks)
            time.sleep(chance.uniform(0, 0.05))
        ranks.signal(signal.SIGKILL, *chance.choice([(0,), (1,), (0, 1)]))
        codes = ranks.wait(60)
        killed += any(codes)
        in_a_save += bool(unfinished(folder))
        runs.finish(folder, 2, *overrides, "parallel.pp=2", *logging)
        assert_undisturbed(folder, undisturbed)
        if logging:
            assert logged_steps(folder / "wandb") == list(range(1, STEPS + 1))
    assert killed >= 20 and in_a_save >= 5, (killed, in_a_save)


EVERYONE = (0, 1)
TOLD = [
    (signal.SIGTERM, EVERYONE),
    (signal.SIGINT, EVERYONE),
    (signal.SIGHUP, EVERYONE),
    (signal.SIGTERM, (1,)),
    (signal.SIGUSR1, (1,)),
    (signal.SIGUSR2, (0,)),
]


@pytest.mark.launch
@pytest.mark.parametrize(("number", "told"), TOLD)
def test_told_to_stop_all_save_and_end_with_zero(number, told, overrides, undisturbed, tmp_path):
    command = [*overrides, "parallel.pp=2", "checkpoint.every_steps=null", "wandb.mode=offline"]
    ranks = runs.start(tmp_path, 2, *command)
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2, ranks)
    ranks.signal(number, *told)
    assert ranks.wait(60) == [0, 0], (tmp_path / "rank0.log").read_text()[-3000:]
    stopped = len(runs.metrics(tmp_path))
    assert 2 <= stopped < STEPS and runs.saved(tmp_path, stopped).is_dir()
    assert f"stopped after step {stopped} of {STEPS}" in (tmp_path / "rank0.log").read_text()
    runs.finish(tmp_path, 2, *command)
    assert_undisturbed(tmp_path, undisturbed)
    assert logged_steps(tmp_path / "wandb") == list(range(1, STEPS + 1))


@pytest.mark.launch
def test_a_second_signal_ends_a_rank_that_waits_for_another(overrides, tmp_path):
    ranks = runs.start(tmp_path, 2, *overrides, "parallel.pp=2")
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2, ranks)
    ranks.signal(signal.SIGSTOP, 1)  # the other now waits in a collective, where Python hears no signal
    time.sleep(0.3)
    ranks.signal(signal.SIGTERM, 0)
    time.sleep(1.0)
    ranks.signal(signal.SIGTERM, 0)  # the same, told twice
    time.sleep(0.5)
    assert ranks.codes[0] is None
    time.sleep(1.0)
    ranks.signal(signal.SIGINT, 0)
    wait_for(lambda: ranks.codes[0] is not None, ranks, timeout=10)
    assert ranks.codes[0] == 128 + signal.SIGINT
    ranks.wait(10)
