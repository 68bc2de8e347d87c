"""The speed of two pipeline stages with a core each, against one process with both cores and the bubble's bound.

Real processes exchange real messages, on the CPU on every machine: one GPU cannot run two stages at once. Passes and
messages are those of training; no optimizer step follows.
"""

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from launch.bench import schedules
from launch.bench.common import agreed_rounds, composed, device_name
from launch.bench.schedules import micro_batches_of, pipeline_of, share_of_cores, stages_of
from launch.tables import rendered
from model.config import ModelConfig
from parallel.processes import free_port
from parallel.schedules import ONE_F_ONE_B, placement_of
from parallel.stages import split_for
from train import timeline
from train.strict_json import dumps

DEFAULTS = [*schedules.DEFAULTS, "train.seq_len=256"]
RANKS = 2
"""The number of ranks of the pipeline; one more process holds the whole model."""
CASES = {"two stages": 1, "both cores": RANKS, "one core": 1}
"""The cases that are measured by turns, and the threads of each process; all but the first have one process."""


def measure(overrides: Sequence[str], micro_batches: int = 8, rounds: int = 7, limit: float = 40.0) -> dict[str, Any]:
    """Run steps of 1f1b by turns; return medians over the rounds, before which one is not counted.

    Args:
        overrides: the overrides of the model and `train.seq_len`, after those of `deepnarrow bench schedules`.
        micro_batches: the number of micro-batches of a step.
        rounds: the number of rounds, with one step of each case.
        limit: the seconds after which no further round begins, but for the second: a busy machine gets fewer.

    Returns:
        ``seconds`` by the keys of `CASES`. ``ratio`` is that of one process with both cores to two stages with a core
        each, and ``ratios`` its extremes over the rounds; ``bound`` is its limit where two threads are twice as fast
        as one, m / (m + p - 1). ``speedup`` is that of two stages over one core, and ``speedup_bound`` the most
        that this cut and its bubble allow, however well threads share work. ``loss_difference`` and
        ``gradient_difference`` (of the norm, relative) show whether the results are the same.

    Raises:
        BadInput: the settings cannot work.
    """
    config = composed(DEFAULTS, overrides).config
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        job = (free_port(), config.model, config.train.seq_len, micro_batches, rounds, limit, out)
        torch.multiprocessing.spawn(_process, job, RANKS + 1)
        found = json.loads(out.read_text("utf-8"))
    (loss_cut, squares_cut), (loss_alone, squares_alone) = found["checks"]
    rounds_of = found["seconds"]
    seconds = {case: statistics.median(values) for case, values in rounds_of.items()}
    ratios = [alone / cut for alone, cut in zip(rounds_of["both cores"], rounds_of["two stages"], strict=True)]
    return {
        "parameters": config.model.num_params,
        "device": device_name(torch.device("cpu")),
        "tokens": [micro_batches, config.train.seq_len],
        "rounds": len(ratios),
        "threads": CASES,
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "bound": share_of_cores(RANKS, micro_batches),
        "speedup": seconds["one core"] / seconds["two stages"],
        "speedup_bound": speedup_bound(config.model, config.train.seq_len, micro_batches),
        "bubble": found["bubble"],
        "bubble_expected": found["bubble_expected"],
        "loss": loss_alone,
        "loss_difference": abs(loss_cut - loss_alone),
        "gradient_difference": abs(math.sqrt(squares_cut / squares_alone) - 1),
    }


def speedup_bound(model: ModelConfig, seq_len: int, micro_batches: int) -> float:
    """Return the bound of 1f1b's speedup on two cores over one, for this model's split: 2 m / (m + 1) if even."""
    placement = placement_of(ONE_F_ONE_B, RANKS, None)
    stages = split_for([float(flops) for flops in model.layer_flops(seq_len)], placement)
    return (
        micro_batches / timeline.expected(ONE_F_ONE_B, placement, micro_batches, [s.cost_share for s in stages]).seconds
    )


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    micro_batches, seq_len = found["tokens"]
    title = (
        f"1f1b, {micro_batches} micro-batches of {seq_len} tokens, {found['parameters']:,} parameters, fp32; "
        f"medians of {found['rounds']} rounds on {found['device']}"
    )
    table = Table("", "processes", "threads each", "s a step")
    for case, threads in found["threads"].items():
        processes = RANKS if case == "two stages" else 1
        table.add_row(case, str(processes), str(threads), f"{found['seconds'][case]:.3f}")
    low, high = found["ratios"]
    return "\n".join(
        [
            title,
            rendered(table),
            f"two stages against one process with both cores  {found['ratio']:.2f} times as fast "
            f"({low:.2f} to {high:.2f}); m / (m + p - 1) of two cores is {found['bound']:.2f}",
            f"two stages against one core                     {found['speedup']:.2f} times as fast; "
            f"this cut and its bubble allow {found['speedup_bound']:.2f}",
            f"bubble                                          {found['bubble']:.1%}; "
            f"{found['bubble_expected']:.1%} expected",
            f"the same loss to {found['loss_difference']:.1e}, "
            f"the same gradient norm to {found['gradient_difference']:.1e}",
        ]
    )


def _process(
    rank: int, port: int, model: ModelConfig, seq_len: int, micro_batches: int, rounds: int, limit: float, out: Path
) -> None:
    """Run one process, with a stage or, on the last one, the whole model; rank 0 writes the results to a file."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS + 1)
    alone = rank == RANKS
    placement = placement_of(ONE_F_ONE_B, 1 if alone else RANKS, None)
    own, first = (0, RANKS) if alone else (rank, 0)
    stages = stages_of(model, seq_len, placement, own)
    pipeline = pipeline_of(stages, placement, own, (1, seq_len, model.d_model), first=first)
    parameters = [parameter for layer in stages.in_order() for parameter, _ in layer.parameters()]
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    bubbles, ideals = [], []
    mean_loss, count = 0.0, micro_batches * seq_len
    for number in agreed_rounds(rounds, 2, limit):
        for case, threads in CASES.items():
            cut = case == "two stages"
            dist.barrier()  # processes whose turn it is not wait here, which takes no core
            if alone != cut:
                torch.set_num_threads(threads)
                for parameter in parameters:
                    parameter.grad = None
                loss = pipeline.train(micro_batches_of(model, seq_len, micro_batches), micro_batches)
                mean_loss = float(loss.total) / count
            dist.barrier()
            spans = timeline.gather(pipeline.began, pipeline.spans(), None, range(RANKS) if cut else [RANKS])
            if spans and number:
                seconds[case].append(max(row[-1].end for row in spans))
                if cut:
                    step = timeline.MeasuredStep(0, ONE_F_ONE_B, placement, micro_batches, spans)
                    bubbles.append(step.bubble)
                    ideals.append(step.ideal().bubble)
    # The first stage has no loss, and each has its own gradients: sums over the ranks are those of a whole model.
    checks = torch.zeros(2, 2, dtype=torch.float64)
    checks[int(alone), 0] = mean_loss
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    checks[int(alone), 1] = sum(float(gradient.double().square().sum()) for gradient in gradients) / count**2
    dist.all_reduce(checks)
    if rank == 0:
        bubble = {"bubble": statistics.median(bubbles), "bubble_expected": statistics.median(ideals)}
        out.write_text(dumps({"seconds": seconds, **bubble, "checks": checks.tolist()}), "utf-8")
    dist.destroy_process_group()
