"""What a study costs, said before it is trained: runs, FLOPs, and about how long they take on this machine."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.functional import cross_entropy

from launch.bench.common import one_thread
from launch.scaling.plan import Plan, Setting
from model.config import ModelConfig
from model.transformer import Transformer
from train.metrics import peak_flops

START_SECONDS = 3.0
"""Of a run on a CPU that a process with all imports forks: the engine, its end, a checkpoint and W&B's."""
STEP_SECONDS = 0.003
"""Of a step on a CPU besides its passes: data, optimizer, records."""
GPU_START_SECONDS = 25.0
"""Of a run on GPUs, a command of its own: imports, CUDA and NCCL, the engine, a checkpoint. Assumed, not measured."""
GPU_STEP_SECONDS = 0.03
"""Of a step on GPUs besides its FLOPs: small models wait for kernels to be launched. Assumed, not measured."""
MOST_FLOPS = 2e10
"""Of a micro-batch that is timed, a second on a slow core; the speed of larger models is that of the largest timed."""
PROBE_SECONDS = 0.15
ON_GPU = 0.3
"""The share of a GPU's peak that is reckoned with."""
_SPIN = "import select, sys\nwhile not select.select([sys.stdin], [], [], 0)[0]: sum(range(100000))"
"""A process that computes for as long as its standard input is open: killed with this one, it ends as well."""
HELD_OUT = 1 / 3
"""What a held-out token costs of one that is trained on: its forward pass."""


def cost_of(study: Plan, settings: Sequence[Setting]) -> str:
    """Say what runs cost, those that are done already apart.

    Args:
        study: the plan.
        settings: of all runs.
    """
    left = [one for one in settings if not study.training(one).is_done]
    done = f", {len(settings) - len(left)} of them done" if len(left) < len(settings) else ""
    said = f"{len(settings)} runs{done}, {sum(one.compute for one in left):.2g} FLOPs C = M D left"
    if not left:
        return said
    return f"{said}; {_about(seconds_of(study, left))}"


def seconds_of(study: Plan, settings: Sequence[Setting]) -> float | None:
    """Estimate the seconds that runs take on this machine; None where nothing is known of its GPUs.

    On a CPU a forward and a backward pass of each model are timed, on GPUs `ON_GPU` of their peak is reckoned with;
    what a run and a step take besides is added. As many runs share the time as `parallel_runs` and the devices allow,
    and the longest run is the least that it takes.
    """
    train, parallel = study.config.train, study.config.parallel
    ranks = parallel.pp * parallel.tp * (parallel.dp or 1)
    on_gpus = torch.cuda.is_available()
    peak = peak_flops(torch.device("cuda")) if on_gpus else None
    if on_gpus and peak is None:
        return None
    devices = max(torch.cuda.device_count(), 1) if on_gpus else len(os.sched_getaffinity(0))
    start, step = (GPU_START_SECONDS, GPU_STEP_SECONDS) if on_gpus else (START_SECONDS, STEP_SECONDS)
    busy = min(devices, ranks * (study.settings.parallel_runs or max(1, devices // ranks)))
    rates = {str(one.shape): ON_GPU * peak for one in settings} if peak else _flops_per_second(study, settings, busy)
    held_out = train.val_sequences * train.seq_len * HELD_OUT
    of_runs = [
        study.ladder.model(one.shape).flops_per_token(one.seq_len)
        * (one.tokens + held_out)
        / (rates[str(one.shape)] * min(ranks, devices))
        + step * one.steps
        + start
        for one in settings
    ]
    return max(sum(of_runs) * min(ranks, devices) / busy, max(of_runs))


def _flops_per_second(study: Plan, settings: Sequence[Setting], busy: int) -> dict[str, float]:
    """Time a pass of each model on one core, the smallest first, while as many cores are busy as will be."""
    found, micro_batch, last = dict[str, float](), study.config.train.micro_batch, 0.0
    with one_thread(), _cores_busy(busy - 1):
        for one in sorted(settings, key=lambda one: one.m):
            model = study.ladder.model(one.shape)
            flops = model.flops_per_token(one.seq_len) * micro_batch * one.seq_len
            if str(one.shape) not in found:
                last = (
                    flops / _pass_seconds(model, micro_batch, one.seq_len) if flops < MOST_FLOPS or not last else last
                )
                found[str(one.shape)] = last
    return found


@contextmanager
def _cores_busy(number: int) -> Iterator[None]:
    """Within, other processes keep so many cores busy: what looks like two cores may be the two threads of one."""
    others = [subprocess.Popen([sys.executable, "-IS", "-c", _SPIN], stdin=subprocess.PIPE) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


def _pass_seconds(config: ModelConfig, micro_batch: int, seq_len: int) -> float:
    """Time a forward and a backward pass, the median of some after one that is not counted."""
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config)
        tokens_BL = torch.randint(config.vocab_size, (micro_batch, seq_len))
        times: list[float] = []
        while len(times) < 3 or (sum(times) < PROBE_SECONDS and len(times) < 50):
            before = time.thread_time()  # what others take of the core is no part of it
            cross_entropy(model(tokens_BL).flatten(0, 1), tokens_BL.flatten()).backward()
            times.append(time.thread_time() - before)
    return statistics.median(times[1:])


def _about(seconds: float | None) -> str:
    if seconds is None:
        return "how long they take is not known of this GPU"
    minutes = seconds / 60
    about = f"about {minutes:.0f} min here" if minutes >= 2 else f"about {seconds:.0f} s here"
    return f"{about}, reckoned by {ON_GPU:.0%} of a GPU's peak and not measured" if torch.cuda.is_available() else about
