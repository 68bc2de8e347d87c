"""The seconds that shapes take here, the models by turns: a training pass of a micro-batch, and a decoded token."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from launch.bench.common import RandomWeights, device_here, device_name, one_thread, own_time
from launch.study.decode import decode_seconds
from model.config import ModelConfig
from model.transformer import Transformer

PASSES = 2
"""Timed passes of a round, after one that is not counted."""
ROUNDS = 3


@dataclass(frozen=True)
class Timed:
    """Median times.

    Attributes:
        train: tokens a second of a forward and a backward pass, by model; empty where they could not be timed.
        decode: seconds of a token of every sequence, by model; as `train`.
        device: its name, threads and dtype.
        problem: why something could not be timed; None where all was.
    """

    train: dict[str, float] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)
    device: str = ""
    problem: str | None = None


def times_of(
    models: Mapping[str, ModelConfig],
    micro_batch: int,
    seq_len: int,
    decode_batch: int,
    decode_context: int,
    say: Callable[[str], None],
) -> Timed:
    """Time every model on one device, a CPU's by a single thread in fp32, a GPU in bf16.

    Args:
        models: by name; one is in memory at a time, with random weights.
        micro_batch, seq_len: sequences of a training pass, and their tokens.
        decode_batch, decode_context: sequences that are decoded together, and the tokens of each in the caches.
        say: reports progress.
    """
    train: dict[str, float] = {}
    try:
        train = _train(models, micro_batch, seq_len, say)
        weights = {at: RandomWeights(model, device=device_here()[0]) for at, model in enumerate(models.values())}
        found, device = decode_seconds(weights, [decode_batch], [decode_context], say, ROUNDS)
    except (RuntimeError, MemoryError) as error:  # what was trained is reported all the same
        name = device_name(device_here()[0])
        why = (str(error) or repr(error)).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError):
            why = "a model does not fit the memory of one device"
        return Timed(train, device=name, problem=f"{why} ({name})")
    return Timed(train, {name: found[at][0]["seconds"] for at, name in enumerate(models)}, device)


def _train(
    models: Mapping[str, ModelConfig], micro_batch: int, seq_len: int, say: Callable[[str], None]
) -> dict[str, float]:
    device, dtype = device_here()
    times: dict[str, list[float]] = {name: [] for name in models}
    with one_thread(), torch.random.fork_rng(devices=[]):
        for number in range(ROUNDS):
            say(f"training passes, round {number + 1} of {ROUNDS}")
            for name, config in models.items():
                model = Transformer(config).to(device, dtype)
                tokens_BL = torch.randint(config.vocab_size, (micro_batch, seq_len), device=device)
                for timed in range(PASSES + 1):
                    begin = own_time(device)
                    cross_entropy(model(tokens_BL).flatten(0, 1), tokens_BL.flatten()).backward()
                    if timed:
                        times[name].append(own_time(device) - begin)
                del model  # or it would lie beside the next one
    return {name: micro_batch * seq_len / statistics.median(taken) for name, taken in times.items()}
