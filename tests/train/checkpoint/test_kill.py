"""Killed at any moment or told to stop at any, a run that is started again ends as if nothing had been."""

import json
import random
import signal
import time

import pytest

from tests.launch.wandb_parts import logged_steps
from tests.train.checkpoint import runs
from tests.train.checkpoint.runs import STEPS, wait_for

RUNS, KILLS, LOGGED = 4, 4, 2


def unfinished(folder):
    return list((folder / "checkpoints").glob("step-*.tmp"))


def saving(folder):
    """The newest step whose save has begun and not ended, or was never ended; 0 for none."""
    return max((int(path.name[5:13]) for path in unfinished(folder)), default=0)


def recorded(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def assert_undisturbed(folder, undisturbed):
    assert runs.digests(runs.saved(folder, STEPS)) == runs.digests(runs.saved(undisturbed, STEPS))
    assert runs.curve(folder) == runs.curve(undisturbed)
    assert json.loads((folder / "summary.json").read_text())["complete"] is True
    assert not unfinished(folder)


@pytest.mark.launch
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(overrides, undisturbed, tmp_path):
    killed, in_a_save = 0, 0
    for run in range(RUNS):
        folder, logging = tmp_path / str(run), ["wandb.mode=offline"] if run < LOGGED else []
        for kill in range(KILLS):
            chance = random.Random(KILLS * run + kill)
            # In each quarter of the run: half of them once a certain save has begun, the others a moment after a step.
            step, happened = chance.randrange(1, STEPS // KILLS) + kill * STEPS // KILLS, [recorded, saving][run % 2]
            step = max(step, recorded(folder) + 1, saving(folder) + 1)  # what was killed late has come further
            if step >= STEPS:
                break
            ranks = runs.start(folder, 2, *overrides, "parallel.pp=2", *logging)
            wait_for(lambda folder=folder, step=step, happened=happened: happened(folder) >= step, ranks)
            time.sleep(0 if run % 2 else chance.uniform(0, 0.05))
            ranks.signal(signal.SIGKILL, *chance.choice([(0,), (1,), (0, 1)]))
            killed += any(ranks.wait(60))
            in_a_save += bool(unfinished(folder))
        runs.finish(folder, 2, *overrides, "parallel.pp=2", *logging)
        assert_undisturbed(folder, undisturbed)
        if logging:
            assert logged_steps(folder / "wandb") == list(range(1, STEPS + 1))
    assert killed >= 12 and in_a_save >= 4, (killed, in_a_save)


EVERYONE = (0, 1)
TOLD = {
    "SIGTERM to all, SIGHUP to all": [(signal.SIGTERM, EVERYONE), (signal.SIGHUP, EVERYONE)],
    "SIGINT to all, SIGUSR2 to the first": [(signal.SIGINT, EVERYONE), (signal.SIGUSR2, (0,))],
    "SIGTERM to the last, SIGUSR1 to the last": [(signal.SIGTERM, (1,)), (signal.SIGUSR1, (1,))],
}
"""One after another, each in a start of the same run."""


@pytest.mark.launch
@pytest.mark.parametrize("told", TOLD)
def test_told_to_stop_all_save_and_end_with_zero(told, overrides, undisturbed, tmp_path):
    command = [*overrides, "parallel.pp=2", "checkpoint.every_steps=null", "wandb.mode=offline"]
    for number, ranks_told in TOLD[told]:
        least = max(2, recorded(tmp_path) + 1)
        ranks = runs.start(tmp_path, 2, *command)
        wait_for(lambda least=least: recorded(tmp_path) >= least, ranks)
        ranks.signal(number, *ranks_told)
        assert ranks.wait(60) == [0, 0], (tmp_path / "rank0.log").read_text()[-3000:]
        stopped = len(runs.metrics(tmp_path))
        assert least <= stopped < STEPS and runs.saved(tmp_path, stopped).is_dir()
        assert f"stopped after step {stopped} of {STEPS}" in (tmp_path / "rank0.log").read_text()
    runs.finish(tmp_path, 2, *command)
    assert_undisturbed(tmp_path, undisturbed)
    assert logged_steps(tmp_path / "wandb") == list(range(1, STEPS + 1))


@pytest.mark.launch
def test_a_second_signal_ends_a_rank_that_waits_for_another(overrides, tmp_path):
    ranks = runs.start(tmp_path, 2, *overrides, "parallel.pp=2")
    wait_for(lambda: recorded(tmp_path) >= 2, ranks)
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
