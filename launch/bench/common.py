"""Helpers of several benchmarks: settings, weights, timing and peak memory."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from conf.compose import Composition, compose_overrides
from conf.search import split_options
from model.config import ModelConfig
from model.init import initial_value
from model.transformer import full_shapes
from parallel.build import ALONE, RankStages, build_stages
from parallel.stages import Stage
from train.uptrain import compose_with_source, sound

SEED, STD = 1, 0.02
"""The seed and the standard deviation of a benchmark's random weights."""
CPU = torch.device("cpu")


def composed(defaults: Sequence[str], overrides: Sequence[str]) -> Composition:
    """Compose the settings of a benchmark: its own overrides, then the user's.

    Its own say no more about the shape of a model where the user names one, as in ``model=7b``.

    Raises:
        BadInput: the settings cannot work; it lists every problem.
    """
    own, given = split_options(overrides)
    if any(one.startswith("model=") for one in given):
        defaults = [one for one in defaults if not one.startswith(("model=", "model."))]
    _, source, implied = compose_with_source(overrides, checked=False)
    # A configuration of the user's own is a whole one, and weights have their shape whatever a benchmark's are.
    composition = compose_overrides([*(defaults if own.file is None else []), *implied])
    sound(composition, source)
    return composition


class RandomWeights:
    """A model's random weights (a `model.weights.Weights`), each of which is drawn when it is read.

    Args:
        config: the model's shape.
        std: the standard deviation of every matrix.
        device: where they are drawn. A GPU draws other numbers than a CPU, and many at a time.
    """

    def __init__(self, config: ModelConfig, std: float = STD, device: torch.device = CPU):
        self.config, self._std, self._device = config, std, device
        self._shapes = full_shapes(config)

    def read(self, name: str) -> torch.Tensor:
        """Return a parameter by its full name, fp32, as `model.init.initialise` draws it by `SEED`."""
        return initial_value(name, self._shapes[name], SEED, self._std, self._device)


def random_stages(model: ModelConfig, stages: Sequence[Stage], device: torch.device) -> RankStages:
    """Build stages as one rank trains them, in fp32, with `RandomWeights`."""
    weights = RandomWeights(model, device=device)
    ranges = {stage.index: range(stage.start, stage.stop) for stage in stages}
    return build_stages(model, ranges, ALONE, device, lambda name, _: weights.read(name))


def device_name(device: torch.device) -> str:
    """Return the name of a device: the GPU's by its driver, or the CPU with the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {len(os.sched_getaffinity(0))} cores"


def synchronised(device: torch.device) -> float:
    """Wait until a device has run all its kernels; return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def own_time(device: torch.device) -> float:
    """Return the time in seconds as `synchronised` does, but on a CPU the time of this thread alone.

    What other processes take of a core is no part of it. All that is timed so has to run on one thread.
    """
    return synchronised(device) if device.type == "cuda" else time.thread_time()


Clock = Callable[[torch.device], float]
"""The time in seconds, once a device has run all its kernels."""


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 5, clock: Clock = synchronised) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        begin = clock(device)
        run()
        times.append(clock(device) - begin)
    return statistics.median(times)


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Compute Kendall's tau-a: the share of pairs that both order alike, less the share that they order otherwise."""
    pairs = combinations(zip(one, other, strict=True), 2)
    signs = [(a - b) * (x - y) for (a, x), (b, y) in pairs]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs) if signs else 1.0


def agreed_rounds(rounds: int, least: int, limit: float) -> Iterator[int]:
    """Yield the numbers of rounds, on all ranks alike, until rank 0 has spent its time.

    Args:
        rounds: how many there are at most, after one that is not counted, whose number is 0.
        least: the last round that is run however long those before have taken.
        limit: seconds after which no further round begins.
    """
    begin, late = time.perf_counter(), torch.zeros(1)
    for number in range(rounds + 1):
        if dist.get_rank() == 0 and number > least:
            late.fill_(time.perf_counter() - begin > limit)
        dist.broadcast(late, 0)
        if late:
            return
        yield number


def product_flops(device: torch.device, dtype: torch.dtype, clock: Clock = synchronised) -> float:
    """Measure the FLOP/s of one large square matrix product, the bound of a model's products on this device."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, 9, clock)


def copy_bytes(device: torch.device, clock: Clock = synchronised) -> float:
    """Measure the bytes per second that a copy reads and writes, of a tensor larger than all caches."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, 9, clock)


class PeakBytes:
    """A context that measures the peak bytes of tensors inside it, beyond those allocated before.

    On a GPU the allocator counts them; on the CPU PyTorch's profiler records every allocation.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.bytes = 0

    def __enter__(self) -> "PeakBytes":
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_bytes())["traceEvents"]
        found = [event["args"] for event in events if event.get("name") == "[memory]"]
        before = found[0]["Total Allocated"] - found[0]["Bytes"]
        self.bytes = max(one["Total Allocated"] for one in found) - before


def device_here() -> tuple[torch.device, torch.dtype]:
    """Return what is timed on: the GPU in bf16, or the CPU in fp32 where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, PyTorch computes on one thread of the CPU, whose own time `launch.bench.common.own_time` tells."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
