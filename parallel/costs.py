"""The cost of each layer, by which stages are cut: counted in FLOPs, or timed on the device that trains."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.config import ModelConfig
from model.init import initialise
from model.loss import cross_entropy
from model.transformer import Block, Embedding, Head
from parallel.layout import Balance


def layer_costs(
    model: ModelConfig, balance: Balance, *, seq_len: int, micro_batch: int, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Return the cost of [embedding, block 0, ..., head], the same list on every rank.

    A counted cost is forward FLOPs per token. A measured one is the seconds of a forward and backward pass, timed on
    rank 0 while the others wait; one layer is in memory at a time, so that a model larger than a device can be timed.
    """
    if balance is Balance.flops:
        return [float(flops) for flops in model.layer_flops(seq_len)]
    measured: list[Any] = [None]
    if dist.get_rank() == 0:
        measured = [_measure(model, seq_len, micro_batch, device, dtype)]
    dist.broadcast_object_list(measured, src=0, device=device if device.type == "cuda" else None)
    embedding, blocks, head = measured[0]
    return [embedding, *(blocks[window] for window in model.windows), head]


def _measure(
    model: ModelConfig, seq_len: int, micro_batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, dict[int | None, float], float]:
    """Return the seconds of the embedding, of a block with each of the model's windows, and of the head."""
    tokens_BL = torch.randint(model.vocab_size, (micro_batch, seq_len), device=device)
    x_BLD = torch.randn(micro_batch, seq_len, model.d_model, device=device, dtype=dtype)

    def seconds(build: Callable[[ModelConfig], nn.Module], inputs: torch.Tensor, with_loss: bool = False) -> float:
        with device:
            layer = build(model).to(dtype)
        initialise(layer, "timed.", 0, model.init_std)

        def run() -> None:
            source = inputs.detach().requires_grad_() if inputs.is_floating_point() else inputs
            out = layer(source)
            (cross_entropy(out, tokens_BL).total if with_loss else out.float().sum()).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        run()  # the first pass allocates and chooses kernels, which a step does not pay for
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return sorted(times)[len(times) // 2]

    blocks = {window: seconds(partial(Block, window=window), x_BLD) for window in set(model.windows)}
    return seconds(Embedding, tokens_BL), blocks, seconds(Head, x_BLD, with_loss=True)
