"""The seconds per prefill and per decoded token, by key/value heads, batch and context, the models by turns.

On a CPU one thread computes, and the time is its own: what other processes take of its core is no part of it.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launch.bench.common import device_here, one_thread, own_time
from launch.study.roofline.counts import Phase
from model.config import ModelConfig
from model.generate import Decoder
from model.weights import Weights
from parallel.decode import load_stage
from parallel.layout import Layout

STEPS = 8
"""The number of timed tokens of a round."""
PREFILLS = 2
"""The number of timed prefills of a round."""
Points = Mapping[Phase, Sequence[tuple[int, int]]]
"""What is timed: batches and contexts."""


@dataclass(frozen=True)
class Timed:
    """Median times.

    Attributes:
        seconds: a list of ``batch``, ``context``, ``seconds`` by key/value heads and phase.
        device: its name, and the dtype.
        rounds: how many there were.
    """

    seconds: dict[int, dict[Phase, list[dict[str, Any]]]]
    device: str
    rounds: int


def decode_seconds(
    models: Mapping[int, Weights],
    batches: Sequence[int],
    contexts: Sequence[int],
    say: Callable[[str], None],
    rounds: int = 3,
) -> tuple[dict[int, list[dict[str, Any]]], str]:
    """Measure the median time of a step that adds a token to every sequence, on one device, the models by turns.

    Args:
        models: the weights by key/value heads; one model is in memory at a time.
        batches: the numbers of sequences that are decoded together.
        contexts: the numbers of tokens of each sequence in the caches.
        say: the function that reports progress.
        rounds: the number of rounds over all models.

    Returns:
        A list of ``batch``, ``context``, ``seconds`` by key/value heads; and the name of the device.
    """
    points = [(batch, context) for batch in batches for context in contexts]
    found = seconds_by_turns(models, {Phase.decode: points}, say, rounds)
    return {heads: by_phase[Phase.decode] for heads, by_phase in found.seconds.items()}, found.device


def seconds_by_turns(
    models: Mapping[int, Weights],
    points: Points,
    say: Callable[[str], None],
    rounds: int = 3,
    limit: float = math.inf,
) -> Timed:
    """Measure the median time of prefills and of decoding steps, on one device, the models by turns.

    Args:
        models: the weights by key/value heads; one model is in memory at a time.
        points: what is timed: prefills of so many sequences of so many tokens, and steps with so many tokens of each
            sequence in the caches, which are filled with noise: the time does not depend on their values.
        say: the function that reports progress.
        rounds: the most rounds over all models.
        limit: seconds after which no further round begins.
    """
    device, dtype = device_here()
    times: dict[tuple[int, Phase, int, int], list[float]] = {}
    begin, done = time.perf_counter(), 0
    with one_thread():
        for number in range(rounds):
            if number and time.perf_counter() - begin > limit:
                say(f"{time.perf_counter() - begin:.0f} s are over: no further round of {rounds}")
                break
            done += 1
            say(f"{' and '.join(phase.value for phase in points)}, round {number + 1} of {rounds}")
            for heads, weights in models.items():
                stages, _ = load_stage(weights, Layout(dp=1, pp=1), device, dtype)
                for phase, of_phase in points.items():
                    run = _prefills if phase is Phase.prefill else _steps
                    for batch, context in of_phase:
                        taken = run(stages[0], weights.config, batch, context, device)
                        times.setdefault((heads, phase, batch, context), []).extend(taken)
                del stages  # or they would lie beside the next model's
    found: dict[int, dict[Phase, list[dict[str, Any]]]] = {heads: {one: [] for one in points} for heads in models}
    for (heads, phase, batch, context), seconds in times.items():
        found[heads][phase].append({"batch": batch, "context": context, "seconds": statistics.median(seconds)})
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu, 1 thread"
    return Timed(found, f"{name}, {str(dtype).removeprefix('torch.')}", done)


def _steps(
    layers: Sequence[nn.Module], config: ModelConfig, batch: int, context: int, device: torch.device
) -> list[float]:
    decoder = Decoder(layers, [[0]] * batch, context + STEPS + 2)
    decoder.lengths_B.fill_(context)
    dtype = next(layers[0].parameters()).dtype
    for cache in decoder.caches:
        noise = torch.randn(2, 1, 1, config.n_kv_heads, config.d_head, device=device, dtype=dtype)
        cache.add(*noise.expand(2, batch, context, -1, -1))
    tokens_B = torch.zeros(batch, dtype=torch.int64)
    seconds = []
    for _ in range(STEPS + 1):
        begin = own_time(device)
        tokens_B = decoder.step(tokens_B).argmax(-1)
        seconds.append(own_time(device) - begin)
    return seconds[1:]  # the first one pays for allocations


def _prefills(
    layers: Sequence[nn.Module], config: ModelConfig, batch: int, context: int, device: torch.device
) -> list[float]:
    prompts = torch.randint(config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(1)).tolist()
    seconds = []
    for _ in range(PREFILLS + 1):
        decoder = Decoder(layers, prompts, context + 1)
        begin = own_time(device)
        decoder.prefill()
        seconds.append(own_time(device) - begin)
    return seconds[1:]
