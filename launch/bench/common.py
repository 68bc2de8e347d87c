"""What several benchmarks need: settings, weights, and how a finding is printed."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity

from conf.compose import Composition, compose_overrides
from conf.validate import Machine, validate
from model.config import ModelConfig
from model.init import initial_value
from model.problems import BadInput
from model.transformer import full_shapes
from parallel.build import ALONE, RankStages, build_stages
from parallel.stages import Stage

SEED, STD = 1, 0.02
"""Of weights that are drawn for a benchmark."""


def composed(defaults: Sequence[str], overrides: Sequence[str]) -> Composition:
    """The settings of a benchmark: its own overrides, then the user's.

    Raises:
        BadInput: with every problem found.
    """
    composition = compose_overrides([*defaults, *overrides])
    if problems := [*composition.problems, *validate(composition.config, Machine(gpus=0, elsewhere=True))[1]]:
        raise BadInput(problems)
    return composition


class Drawn:
    """A model's weights, drawn one at a time when they are asked for: `model.weights.Weights`.

    Args:
        config: the shape.
        std: of every matrix.
    """

    def __init__(self, config: ModelConfig, std: float = STD):
        self.config, self._std = config, std
        self._shapes = full_shapes(config)

    def read(self, name: str) -> torch.Tensor:
        """A parameter by its full name, fp32 on the CPU: what `model.init.initialise` draws with seed `SEED`."""
        return initial_value(name, self._shapes[name], SEED, self._std)


def drawn_stages(model: ModelConfig, stages: Sequence[Stage], device: torch.device) -> RankStages:
    """Some stages as one rank trains them, fp32, with the weights of `Drawn`."""
    weights = Drawn(model)
    ranges = {stage.index: range(stage.start, stage.stop) for stage in stages}
    return build_stages(model, ranges, ALONE, device, lambda name, _: weights.read(name))


def device_name(device: torch.device) -> str:
    """What was measured on: the GPU as its driver calls it, or the CPU with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {len(os.sched_getaffinity(0))} cores"


def rendered(table: Table) -> str:
    """A table as plain text without spaces at the ends of lines."""
    console = Console(width=118, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def synchronised(device: torch.device) -> float:
    """The time in seconds once a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Median seconds of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        begin = synchronised(device)
        run()
        times.append(synchronised(device) - begin)
    return statistics.median(times)


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matrix product: what a model's products could reach here and now."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, rounds=9)


def copy_bytes(device: torch.device) -> float:
    """Bytes per second read and written by a copy that no cache holds."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, rounds=9)


class PeakBytes:
    """The most bytes of tensors held while this is entered, beyond those held before.

    A GPU's allocator counts them; on the CPU PyTorch's profiler notes every allocation.
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
