"""One rank of a run to which something happens: ``python -m tests.faults.faulty FAULT ARGUMENTS``."""

import math
import os
import resource
import shutil
import sys
import time

import psutil
import torch
import wandb

from model import generate
from parallel import pipeline, zero
from parallel.engine import Engine
from tests.train.checkpoint.patient import saves_are_waited_for
from train import profiling, run, sample, spikes, timeline
from train.checkpoint.storage import Writer
from train.pretrain import main

RANK = int(os.environ.get("RANK", "0"))
STEPS = [0]


def after_step(act):
    """Do something once a step is taken, told its number."""
    step = Engine.step

    def stepped(self, *arguments):
        result = step(self, *arguments)
        STEPS[0] += 1
        act(self, STEPS[0])
        return result

    Engine.step = stepped


def gradients(first, last):
    """Gradients are not finite in some steps, losses are."""
    reduce = zero.Zero.reduce

    def spoilt(self):
        squares = reduce(self)
        return squares * math.nan if int(first) <= STEPS[0] + 1 <= int(last) else squares

    zero.Zero.reduce = spoilt
    after_step(lambda engine, step: None)


def spike_and_nan(spike, nan, rank, least):
    """The gradients of one rank are far too large in a step, and one of them is not a number in another; so many steps
    are enough to judge a spike by."""
    reduce, add = zero.Zero.reduce, zero.Bucket.add

    def enlarged(self):
        return reduce(self) * (1e6 if (STEPS[0] + 1, RANK) == (int(spike), int(rank)) else 1.0)

    def spoilt(self, index):
        if (STEPS[0] + 1, RANK, index) == (int(nan), int(rank), 0):
            self.slots[index].parameter.grad.view(-1)[3] = math.nan
        return add(self, index)

    zero.Zero.reduce, zero.Bucket.add, spikes.LEAST = enlarged, spoilt, int(least)
    after_step(lambda engine, step: None)


def slow(rank, first, last):
    """One rank takes 300 ms more for each of its forward passes, in some steps."""
    run_layers = pipeline._Training._run_layers

    def slowed(self, action, x):
        if int(rank) == RANK and int(first) <= STEPS[0] + 1 <= int(last):
            time.sleep(0.3)
        return run_layers(self, action, x)

    pipeline._Training._run_layers = slowed
    after_step(lambda engine, step: None)


def weights(step, rank):
    """One weight of one rank is lost after a step."""

    def spoil(engine, taken):
        if taken == int(step) and int(rank) == RANK:
            with torch.no_grad():
                engine.zero.buckets[-1].master[3] = math.inf

    after_step(spoil)


def moment(step):
    """One of Adam's moments is lost after a step."""

    def spoil(engine, taken):
        if taken == int(step):
            engine.zero.adam.state[engine.zero.buckets[0].master]["exp_avg"][0] = math.nan

    after_step(spoil)


def losses(first):
    """From some step on, no loss is finite, on held-out sequences either: what weights give that are far too large."""
    over_all_ranks = Engine._over_all_ranks

    def spoilt(self, *arguments):
        sums = over_all_ranks(self, *arguments)
        sums[0] *= math.nan if STEPS[0] + 1 > int(first) else 1.0
        return sums

    Engine._over_all_ranks = spoilt
    after_step(lambda engine, step: None)


def fails(*named):
    """What a run can do without fails."""

    def failing(*arguments, **more):
        raise RuntimeError("as the test asks")

    where = {
        "samples": (sample, "sample_text"),
        "draw": (generate.Decoder, "prefill"),
        "timeline": (timeline, "draw"),
        "profile": (profiling, "write"),
        "profiler": (profiling.profile, "start"),
        "wandb": (wandb.Run, "log"),
        "wandb start": (wandb, "init"),
    }
    for what in named:
        setattr(*where[what], failing)


def step_fails(step):
    """A step fails on every rank while a save is being written."""
    write = Writer._write

    def slowly(self, plan, planner):
        time.sleep(0.5)
        return write(self, plan, planner)

    Writer._write = slowly

    def fail(engine, taken):
        if taken == int(step):
            raise RuntimeError("as the test asks")

    after_step(fail)


def full(size, step=0):
    """Rank 0 can write no file beyond a size, nor can W&B's process, from the start of its log on up to some step."""
    made = run.Tracker

    def limited(*arguments, **more):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
        return made(*arguments, **more)

    def free(engine, taken):
        if RANK == 0 and taken == int(step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    run.Tracker = limited
    after_step(free)


def deleted(folder, step):
    """A folder of the run is deleted after a step."""

    def delete(engine, taken):
        if RANK == 0 and taken == int(step):
            shutil.rmtree(folder)

    after_step(delete)


def wandb_stops(step):
    """W&B's process is stopped after a step, and stays so."""

    def stop(engine, taken):
        if taken == int(step):
            (core,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
            core.suspend()

    after_step(stop)


if __name__ == "__main__":
    fault, count, *rest = sys.argv[1:]
    told, arguments = rest[: int(count)], rest[int(count) :]
    if fault != "step_fails":
        saves_are_waited_for()
    globals()[fault](*told)
    main(arguments)
