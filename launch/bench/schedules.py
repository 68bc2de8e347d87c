"""The measured bubble of every pipeline schedule: with a model's layers on two ranks, and with stages that sleep, so
that there can be more ranks than cores. Passes and messages are those of training; no optimizer step follows."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import nn

from launch.bench.common import composed, random_stages
from launch.tables import rendered
from model.batch import Batch
from model.config import ModelConfig
from model.context import Context
from model.loss import SummedLoss
from parallel.build import Forward, RankStages, forward_functions
from parallel.deferral import DeferredGradients
from parallel.layout import Recompute
from parallel.loss import Loss
from parallel.pipeline import ActivationSpec, Pipeline
from parallel.processes import free_port
from parallel.schedules import ONE_F_ONE_B, Placement, Schedule, batch_problems, placement_of
from parallel.stages import split_for
from train import timeline
from train.strict_json import dumps

DEFAULTS = [
    *["model.n_layers=8", "model.d_model=256", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=768"],
    *["model.vocab_size=256", "model.max_seq_len=512", "train.seq_len=512"],
]
KINDS = [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2), ("zbv", 2), ("dualpipev", 2)]
REAL = {2: (2, 4, 8)}
"""The numbers of micro-batches of a step, by the number of ranks."""
ASLEEP = {4: (8,), 8: (16,)}


def measure(
    overrides: Sequence[str],
    rounds: int = 2,
    nap: float = 0.2,
    real: Mapping[int, Sequence[int]] = REAL,
    asleep: Mapping[int, Sequence[int]] = ASLEEP,
) -> dict[str, Any]:
    """Run steps of every schedule by turns; return medians over the rounds, before which one is not counted.

    Args:
        overrides: the overrides of the model, after `DEFAULTS`.
        rounds: the number of rounds, with one step of each schedule.
        nap: the seconds that a sleeping rank takes for each of forward, input gradient and weight gradient.
        real, asleep: the numbers of micro-batches of a step, by the number of ranks.
    """
    config = composed(DEFAULTS, overrides).config
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for naps, sizes in ((None, real), (nap, asleep)):
            for ranks, micro_batches in sizes.items():
                out = Path(folder) / "rows.json"
                job = (ranks, free_port(), config.model, config.train.seq_len, micro_batches, rounds, naps, out)
                torch.multiprocessing.spawn(_rank, job, ranks)
                rows += json.loads(out.read_text("utf-8"))
    return {"device": f"cpu, {os.cpu_count()} cores, a thread a rank", "nap": nap, "rows": rows}


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    tables = []
    for asleep, title in (
        (False, "layers that compute"),
        (True, f"stages that sleep {1000 * found['nap']:.0f} ms a pass"),
    ):
        columns = ["schedule", "s a step", "against 1f1b", "bubble", "expected", "busy", "1f1b's bound"]
        table = Table("ranks", "micro-batches", *columns, title=f"{title}; {found['device']}", title_justify="left")
        rows = [row for row in found["rows"] if row["asleep"] == asleep]
        for row in rows:
            size = (row["ranks"], row["micro_batches"])
            base = next(one for one in rows if (one["ranks"], one["micro_batches"]) == size)
            name = row["schedule"] + (f" x {row['virtual']}" if row["virtual"] > 1 else "")
            table.add_row(
                *map(str, size),
                name,
                f"{row['seconds']:.3f}",
                f"{row['seconds'] / base['seconds']:.3f}",
                f"{row['bubble']:.1%}",
                f"{row['expected']:.1%}",
                f"{1 - row['bubble']:.1%}",
                f"{share_of_cores(*size):.1%}",
            )
        tables.append(rendered(table))
    return "\n".join(tables)


def share_of_cores(ranks: int, micro_batches: int) -> float:
    """Return the largest share of time in which ranks can compute under 1f1b, m / (m + p - 1), for even stages."""
    return micro_batches / (micro_batches + ranks - 1)


def _rank(
    rank: int,
    ranks: int,
    port: int,
    model: ModelConfig,
    seq_len: int,
    numbers: Sequence[int],
    rounds: int,
    nap: float | None,
    out: Path,
) -> None:
    """Run one process: every schedule by turns; rank 0 writes the medians to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    pipelines = {}
    for name, virtual in KINDS:
        placement = placement_of(Schedule[name], ranks, virtual)
        if nap is None:
            stages = stages_of(model, seq_len, placement, rank)
            pipeline = pipeline_of(stages, placement, rank, (1, seq_len, model.d_model), name)
        else:
            pipeline = _asleep(placement, rank, nap, name)
        pipelines[name, virtual] = pipeline
    seconds: dict[Any, list[float]] = {}
    bubbles: dict[Any, list[float]] = {}
    expected: dict[Any, list[float]] = {}
    for number in range(rounds + 1):
        _Nap.share = 1.0 if number else 0.05
        for m in numbers:
            for kind, pipeline in pipelines.items():
                if batch_problems(Schedule[kind[0]], ranks, m, 1):
                    continue
                dist.barrier()
                pipeline.train(micro_batches_of(model, seq_len, m), m)
                spans = timeline.gather(pipeline.began, pipeline.spans(), None, range(ranks))
                if spans and number:
                    step = timeline.MeasuredStep(0, Schedule[kind[0]], pipeline.placement, m, spans)
                    key = (*kind, m)
                    seconds.setdefault(key, []).append(max(row[-1].end for row in spans))
                    bubbles.setdefault(key, []).append(step.bubble)
                    expected.setdefault(key, []).append(_expected(step, nap))
    if rank == 0:
        rows = [
            {
                **{"asleep": nap is not None, "ranks": ranks, "micro_batches": m, "schedule": name, "virtual": virtual},
                "seconds": statistics.median(values),
                "bubble": statistics.median(bubbles[name, virtual, m]),
                "expected": statistics.median(expected[name, virtual, m]),
            }
            for (name, virtual, m), values in seconds.items()
        ]
        out.write_text(dumps(rows), "utf-8")
    dist.destroy_process_group()


def _expected(step: timeline.MeasuredStep, nap: float | None) -> float:
    """Return the theoretical bubble, for naps of equal length or for passes of their measured length."""
    if nap is None:
        return step.ideal().bubble
    even = [1 / step.placement.num_stages] * step.placement.num_stages
    return timeline.expected(step.schedule, step.placement, step.micro_batches, even).bubble


def micro_batches_of(model: ModelConfig, seq_len: int, micro_batches: int) -> Iterator[Batch]:
    """Yield the micro-batches of a step, random tokens and labels, int64 (1, L); the same in every call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(micro_batches):
        tokens = torch.randint(model.vocab_size, (1, seq_len + 1), generator=generator)
        yield Batch(tokens[:, :-1], tokens[:, 1:])


def stages_of(model: ModelConfig, seq_len: int, placement: Placement, rank: int) -> RankStages:
    """Build the stages of a pipeline-parallel rank on the CPU, with the same random weights for every placement."""
    stages = split_for([float(flops) for flops in model.layer_flops(seq_len)], placement)
    return random_stages(model, [stages[index] for index in placement.stages_of(rank)], torch.device("cpu"))


def pipeline_of(
    stages: RankStages,
    placement: Placement,
    rank: int,
    shape: tuple[int, ...],
    schedule: str = ONE_F_ONE_B.name,
    first: int = 0,
) -> Pipeline:
    """Build one rank's `Pipeline` over Gloo, without an engine around it.

    Args:
        stages: the stages of this rank.
        placement: the placement of all stages.
        rank: the pipeline-parallel rank.
        shape: the shape of the activations between stages, fp32.
        schedule: the order of passes.
        first: the global rank of the pipeline's first rank, which the others follow.
    """
    functions, loss = forward_functions(stages, Recompute.none, head_pieces=1)
    return _pipeline(functions, loss, stages.deferred, placement, rank, shape, schedule, first)


def _pipeline(
    functions: Mapping[int, Sequence[Forward]],
    loss: Loss | None,
    deferred: DeferredGradients,
    placement: Placement,
    rank: int,
    shape: tuple[int, ...],
    schedule: str,
    first: int = 0,
) -> Pipeline:
    ranks = range(first, first + placement.num_ranks)
    links = {link: dist.group.WORLD for link in placement.links if rank in link}
    spec = ActivationSpec(shape, torch.float32, torch.device("cpu"))
    return Pipeline(functions, loss, deferred, Schedule[schedule], placement, rank, ranks, links, spec)


class _Nap(torch.autograd.Function):
    """The forward and backward passes of a stage that sleeps instead of computing."""

    share = 1.0
    """The share of its seconds that it sleeps; less than 1 in the round that only opens connections."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, seconds: float, deferred: DeferredGradients
    ) -> torch.Tensor:
        ctx.weight, ctx.seconds, ctx.deferred = weight, seconds, deferred
        time.sleep(_Nap.share * seconds)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        def weight_gradient() -> list[torch.Tensor]:
            time.sleep(_Nap.share * ctx.seconds)
            return [torch.zeros_like(ctx.weight)]

        time.sleep(_Nap.share * ctx.seconds)
        return grads[0], *ctx.deferred.gradients([ctx.weight], weight_gradient), None, None


def _asleep(placement: Placement, rank: int, nap: float, schedule: str) -> Pipeline:
    deferred = DeferredGradients()

    def stage(index: int) -> Forward:
        weight, first = nn.Parameter(torch.ones(1)), index == 0

        def forward(x: torch.Tensor, context: Context) -> torch.Tensor:
            return _Nap.apply(torch.ones(1) if first else x, weight, nap / placement.virtual, deferred)

        return forward

    def loss(y: torch.Tensor, labels: torch.Tensor) -> SummedLoss:
        return SummedLoss(y.sum().double(), torch.tensor(1))

    functions = {index: [stage(index)] for index in placement.stages_of(rank)}
    return _pipeline(functions, loss, deferred, placement, rank, (1,), schedule)
