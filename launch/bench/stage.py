"""The training of a pipeline stage that fits one device: tokens per second, model FLOPs utilisation, memory.

A step is that of a rank of a pipeline: forward and backward passes of its micro-batches, fp32 accumulation,
clipping and AdamW, without the messages to its neighbours, which one device cannot have.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Column, Table

from conf.schema import Config
from launch.bench.common import (
    PeakBytes,
    composed,
    device_name,
    product_flops,
    random_stages,
    seconds_of,
)
from launch.tables import rendered
from model.context import Context
from model.kernels import which_and_why
from parallel.build import forward_functions
from parallel.layout import Layout
from parallel.memory import Step, stage_memory
from parallel.schedules import Action, Pass
from parallel.stages import Stage
from parallel.zero import Replicas, Zero
from train.metrics import peak_flops
from train.optimizer import adamw

# The cases are (name, blocks, whether embedding and head are with them): those for a GPU fit 80 GB at 18 bytes per
# parameter, and those for a CPU train in seconds.
ON_GPU = [("7b", 15, False), ("7b", 8, True), ("67b", 5, False), ("67b", 2, True)]
ON_CPU = [("8x512", 4, False), ("8x512", 2, True)]
_ALONE = [Action(Pass.F, 0, 0), Action(Pass.B, 0, 0)]
"""What a stage that is a pipeline by itself does with a micro-batch."""
SMALL = ["model.vocab_size=8192", "train.seq_len=512"]
"""The overrides that make the preset smaller on a CPU."""


def measure(
    overrides: Sequence[str], cases: Sequence[tuple[str, int, bool]] = (), micro_batches: int = 0, rounds: int = 3
) -> dict[str, Any]:
    """Run steps of each stage, one stage after another; return the medians.

    Args:
        overrides: the overrides after the presets: `parallel.recompute`, `parallel.head_pieces`, `model.kernels`,
            `model.attention`, `train.micro_batch`, `train.seq_len`, `train.precision`.
        cases: the model, its blocks, and whether embedding and head are with them; empty for those that fit the device.
        micro_batches: the number of micro-batches of a step; 0 for 8 on a GPU and 2 on a CPU.
        rounds: the number of timed steps.

    Returns:
        ``product_flops``, the FLOP/s of a large matrix product in this run; ``rows``, for each case with
        ``tokens_per_second``, ``flops`` a second by true model FLOPs (arithmetic of `ModelConfig`; causal attention
        counted half), ``flops_whole_attention`` with all of it counted and ``flops_by_m`` by the paper's M, ``mfu``,
        ``mfu_whole_attention`` and ``mfu_by_m`` of the device's nominal peak where that is known,
        ``share`` of the matrix product's, ``peak_bytes`` and ``predicted_bytes``.

    Raises:
        BadInput: the settings cannot work.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    cases = cases or (ON_GPU if on_gpu else ON_CPU)
    configs = [composed([f"model={name}", *([] if on_gpu else SMALL)], overrides).config for name, _, _ in cases]
    dtype = torch.bfloat16 if on_gpu or configs[0].train.precision.name == "bf16" else torch.float32
    if alone := not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        bound = product_flops(device, dtype)
        rows = [
            _row(name, config, blocks, whole, device, dtype, micro_batches or (8 if on_gpu else 2), rounds, bound)
            for (name, blocks, whole), config in zip(cases, configs, strict=True)
        ]
    finally:
        if alone:
            dist.destroy_process_group()
    return {
        "device": device_name(device),
        "precision": str(dtype).removeprefix("torch."),
        "kernels": which_and_why(configs[0].model, device, dtype),
        "product_flops": bound,
        "rows": rows,
    }


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    title = (
        f"training a stage (ends: embedding and head), {found['precision']} on {found['device']}; {found['kernels']}; "
    )
    title += f"a matrix product alone: {found['product_flops'] / 1e12:.3g} TFLOP/s"
    columns = ["tokens/s", "TFLOP/s", "of product", "MFU (whole)", "by M", "peak GiB", "predicted"]
    table = Table(Column("stage", no_wrap=True), "recompute", *columns, title=title, title_justify="left")
    for row in found["rows"]:
        table.add_row(
            row["stage"],
            row["recompute"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flops'] / 1e12:.3g}",
            f"{row['share']:.1%}",
            f"{row['mfu']:.1%} ({row['mfu_whole_attention']:.1%})" if row["mfu"] else "-",
            f"{row['mfu_by_m']:.1%}" if row["mfu_by_m"] else "-",
            f"{row['peak_bytes'] / 2**30:.3f}",
            f"{row['predicted_bytes'] / 2**30:.3f} ({row['predicted_bytes'] / row['peak_bytes']:.3f})",
        )
    return rendered(table)


def _row(
    name: str,
    config: Config,
    blocks: int,
    whole: bool,
    device: torch.device,
    dtype: torch.dtype,
    micro_batches: int,
    rounds: int,
    bound: float,
) -> dict[str, Any]:
    model = replace(config.model, n_layers=blocks)
    config = replace(config, model=model)
    train, parallel = config.train, config.parallel
    stage = Stage(0, 0, blocks + 2, 1.0) if whole else Stage(0, 1, blocks + 1, 1.0)
    with PeakBytes(device) as peak:
        run = _step(config, stage, device, dtype, micro_batches)
        for _ in range(2):  # the first one allocates the moments
            run()
    seconds = seconds_of(run, device, rounds)
    bf16 = dtype == torch.bfloat16
    step = Step(train.micro_batch, train.seq_len, bf16, parallel.recompute, parallel.head_pieces)
    tokens = micro_batches * train.micro_batch * train.seq_len
    per_token = 3 * sum(model.layer_flops(train.seq_len)[stage.start : stage.stop])
    # Unmasked FLOPs add the other half of each block's causal attention, forward and backward.
    unmasked = per_token + 3 * blocks * 2 * model.n_heads * model.d_head * train.seq_len
    by_count = {"": per_token, "_whole_attention": unmasked, "_by_m": model.scaling_m(train.seq_len)}
    flops = {name: tokens * count / seconds for name, count in by_count.items()}
    nominal = peak_flops(device)
    return {
        "stage": f"{name}, {blocks} blocks" + (" + ends" if whole else ""),
        "recompute": parallel.recompute.name + (f", head in {parallel.head_pieces}" * (parallel.head_pieces > 1)),
        "micro_batches": micro_batches,
        "tokens_per_micro_batch": train.micro_batch * train.seq_len,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        **{f"flops{name}": count for name, count in flops.items()},
        **{f"mfu{name}": count / nominal if nominal else None for name, count in flops.items()},
        "share": flops[""] / bound,
        "peak_bytes": peak.bytes,
        "predicted_bytes": stage_memory(model, Layout(1, 1), {0: stage}, _ALONE, step).peak,
    }


def _step(
    config: Config, stage: Stage, device: torch.device, dtype: torch.dtype, micro_batches: int
) -> Callable[[], None]:
    """Build a stage, and return a function that runs a training step of it."""
    model, train, parallel = config.model, config.train, config.parallel
    stages = random_stages(model, [stage], device)
    optimizer = Zero(
        stages.in_order(),
        partial(adamw, settings=config.optimizer),
        dtype=dtype,
        micro_batches=micro_batches,
        clip=config.optimizer.clip,
        replicas=Replicas(None, 0, 1),
        sharing={},
    )
    functions, loss = forward_functions(stages, parallel.recompute, parallel.head_pieces)
    shape = (train.micro_batch, train.seq_len)
    tokens_BL = torch.randint(model.vocab_size, shape, device=device)
    count = torch.tensor(float(micro_batches * tokens_BL.numel()), device=device, dtype=torch.float64)

    def step() -> None:
        for _ in range(micro_batches):
            y = tokens_BL if loss else torch.randn(*shape, model.d_model, device=device, dtype=dtype).requires_grad_()
            for function in functions[stage.index]:
                y = function(y, Context())
            if loss:
                y = loss(y, tokens_BL).total  # the logits must have no other name, which would keep them in memory
                y.backward()
            else:
                y.backward(torch.ones_like(y).div_(y.numel()))
        optimizer.update(config.optimizer.lr, optimizer.reduce().sqrt() / count, count)

    return step
