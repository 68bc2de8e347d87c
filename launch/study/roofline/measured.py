"""Prefill and decoding on this machine, beside its own roofline: a matrix product and a copy, measured with them.

On a CPU that is the roofline of one core, and the time that of the thread that computes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch

from launch.bench.common import copy_bytes, device_here, device_name, one_thread, own_time, product_flops
from launch.study.decode import Points, seconds_by_turns
from launch.study.roofline.counts import Ceilings, Phase, cache_bytes, weight_bytes
from launch.study.roofline.findings import roofline_findings
from model.config import ModelConfig
from model.weights import Weights

LONGEST = 1.0
"""Seconds of a pass, by the roofline of the machine, beyond which it is not measured."""
ENOUGH = 30.0
"""Seconds after which no further round begins."""
TIMES_CACHE = 3
"""How many times the bytes of its caches a measurement needs at most: keys and values as they are computed, too."""


def measured_findings(
    models: Mapping[int, Weights],
    batches: Sequence[int],
    contexts: Sequence[int],
    say: Callable[[str], None],
    rounds: int = 3,
) -> dict[str, Any]:
    """Measure prefills and decoding steps on this machine, in bf16 on a GPU and in fp32 on a CPU, the models by turns.

    Args:
        models: the weights by key/value heads, most first; all of one shape otherwise.
        batches, contexts: of the points.
        say: the function that reports progress.
        rounds: the most rounds over all models; none begins after `ENOUGH` seconds, and the last takes as long as the
            first.

    Returns:
        `roofline_findings` of this machine, whose ceilings are the FLOP/s of a large matrix product and the bytes per
        second of a copy, each the better one of before and after all rounds; each point that was measured has
        ``measured_seconds`` and ``measured_over_roofline`` as well. ``left_out`` lists phase, batch and context of
        those that were not: they would take longer than `LONGEST` or do not fit the free memory. ``rounds`` says how
        many there were, and ``load`` the mean number of processes that were running in the minute before.
    """
    config = next(iter(models.values())).config
    load = os.getloadavg()[0]
    before = ceilings_here()
    bytes_per_value = device_here()[1].itemsize
    first = roofline_findings(config, list(models), batches, contexts, before, 1, bytes_per_value)
    points, left_out = _chosen(first, config, bytes_per_value)
    timed = seconds_by_turns(models, points, say, rounds, ENOUGH)
    after = ceilings_here()
    ceilings = Ceilings(
        timed.device.rpartition(", ")[0],  # without the dtype, which findings have of themselves
        "measured here, by a matrix product and a copy",
        max(before.product_flops, after.product_flops),
        max(before.attention_flops, after.attention_flops),
        max(before.bytes_per_second, after.bytes_per_second),
        memory_bytes=before.memory_bytes,
    )
    found = roofline_findings(config, list(models), batches, contexts, ceilings, 1, bytes_per_value)
    for model in found["models"]:
        by_point = {
            (phase.value, one["batch"], one["context"]): one["seconds"]
            for phase, of_phase in timed.seconds[model["kv_heads"]].items()
            for one in of_phase
        }
        for point in model["points"]:
            seconds = by_point.get((point["phase"], point["batch"], point["context"]))
            if seconds is not None:
                point["measured_seconds"] = seconds
                point["measured_over_roofline"] = seconds / point["seconds"]
    return {**found, "left_out": left_out, "rounds": timed.rounds, "load": load}


def ceilings_here() -> Ceilings:
    """Measure the ceilings of the GPU or of a core: a large matrix product and a copy; and the free memory."""
    device, dtype = device_here()
    with one_thread():
        rate, moved = product_flops(device, dtype, own_time), copy_bytes(device, own_time)
    return Ceilings(device_name(device), "measured here", rate, rate, moved, memory_bytes=float(free_bytes()))


def free_bytes() -> int:
    """Return the bytes of memory that are free on the GPU, or on this machine where there is none."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def problems(config: ModelConfig, kv_heads: Sequence[int]) -> list[str]:
    """Say why models with so many key/value heads cannot be measured here, in a sentence."""
    # Weights are drawn in fp32, and loaded in it before they are cast.
    needs, free = max(weight_bytes(replace(config, n_kv_heads=n), 1, 4) for n in kv_heads), free_bytes()
    if needs <= free:
        return []
    return [
        f"--measure: the weights take {needs / 2**30:,.1f} GiB in fp32, and {free / 2**30:,.1f} GiB are free here; a "
        "smaller model, or fewer of its layers such as model.n_layers=4, would work"
    ]


def _chosen(found: Mapping[str, Any], config: ModelConfig, bytes_per_value: int) -> tuple[Points, list[list[Any]]]:
    """Choose the points to measure: those that every model can do in time and in the free memory."""
    free = free_bytes()
    shapes = [replace(config, n_kv_heads=model["kv_heads"]) for model in found["models"]]
    chosen: dict[Phase, list[tuple[int, int]]] = {phase: [] for phase in Phase}
    left_out: list[list[Any]] = []
    for points in zip(*(model["points"] for model in found["models"]), strict=True):
        phase, batch, context = (points[0][key] for key in ("phase", "batch", "context"))
        needs = max(
            weight_bytes(one, 1, 4) + TIMES_CACHE * batch * cache_bytes(one, context, 1, bytes_per_value)
            for one in shapes
        )
        if max(point["seconds"] for point in points) > LONGEST or needs > free:
            left_out.append([phase, batch, context])
        else:
            chosen[Phase(phase)].append((batch, context))
    return chosen, left_out
