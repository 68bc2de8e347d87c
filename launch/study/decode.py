"""The seconds per decoded token, by key/value heads, batch and context."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from model.config import ModelConfig
from model.generate import Decoder
from model.weights import StoredWeights
from parallel.decode import load_stage
from parallel.layout import Layout

STEPS = 8
"""The number of timed tokens of a round."""


def decode_seconds(
    models: Mapping[int, StoredWeights],
    batches: list[int],
    contexts: list[int],
    say: Callable[[str], None],
    rounds: int = 3,
) -> tuple[dict[int, list[dict[str, Any]]], str]:
    """Measure the median time of a step that adds a token to every sequence, on one device, the models by turns.

    Args:
        models: the weights by key/value heads; one model is in memory at a time.
        batches: the numbers of sequences that are decoded together.
        contexts: the numbers of tokens of each sequence in the caches, which are filled with noise: the time of a step
            does not depend on their values.
        say: the function that reports progress.
        rounds: the number of rounds over all models.

    Returns:
        A list of ``batch``, ``context``, ``seconds`` by key/value heads; and the name of the device.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    times: dict[tuple[int, int, int], list[float]] = {}
    for number in range(rounds):
        say(f"decoding, round {number + 1} of {rounds}")
        for heads, weights in models.items():
            # Rotary positions have no end: a longer context changes no weight.
            config = replace(weights.config, max_seq_len=max(contexts) + STEPS + 2)
            stages, _ = load_stage(replace(weights, config=config), Layout(dp=1, pp=1), device, dtype)
            for batch in batches:
                for context in contexts:
                    times.setdefault((heads, batch, context), []).extend(
                        _steps(stages[0], config, batch, context, device)
                    )
    found: dict[int, list[dict[str, Any]]] = {heads: [] for heads in models}
    for (heads, batch, context), seconds in times.items():
        found[heads].append({"batch": batch, "context": context, "seconds": statistics.median(seconds)})
    name = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    return found, f"{name}, {str(dtype).removeprefix('torch.')}"


def _steps(layers: list[nn.Module], config: ModelConfig, batch: int, context: int, device: torch.device) -> list[float]:
    decoder = Decoder(layers, [[0]] * batch, context + STEPS + 2)
    decoder.lengths_B.fill_(context)
    dtype = next(layers[0].parameters()).dtype
    for cache in decoder.caches:
        noise = torch.randn(2, 1, 1, config.n_kv_heads, config.d_head, device=device, dtype=dtype)
        cache.add(*noise.expand(2, batch, context, -1, -1))
    tokens_B = torch.zeros(batch, dtype=torch.int64)
    seconds = []
    for _ in range(STEPS + 1):
        _wait(device)
        begin = time.perf_counter()
        tokens_B = decoder.step(tokens_B).argmax(-1)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]  # the first one pays for allocations


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
