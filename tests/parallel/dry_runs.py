"""One of four ranks that run steps over gloo, and dry-run the same: what its storages are, here and there.

A main of `tests.ranks`. Kernels are plain in both, since what a compiler makes for a CPU holds what it likes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from model.batch import Batch
from model.config import Kernels
from model.layers import rotary_tables
from parallel import deferral
from parallel.deepspeed_engine import start_process_group
from parallel.dry_run import run
from parallel.dry_run.rank import _adamw, _fewest_micro_batches, _label_buckets, _moments, _step
from parallel.dry_run.record import Record, Recorder
from parallel.dry_run.storages import Held, Kind
from parallel.engine import EngineSettings, build_engine
from parallel.layout import Layout, Recompute
from parallel.plan.job import Job
from parallel.schedules import TABLE, Schedule, placement_of
from tests.ranks import report
from tests.shapes import small

SEQ_LEN = 64


@dataclass(frozen=True)
class Case:
    """A job of four ranks."""

    schedule: str
    recompute: str
    pp: int = 4
    tp: int = 1
    bf16: bool = False
    head_pieces: int = 1

    @property
    def job(self) -> Job:
        """With layers for every stage."""
        model = small(
            2,
            n_heads=8,
            d_model=64,
            d_ff=192,
            n_layers=6 if self.pp == 4 else 3,
            vocab_size=512,
            max_seq_len=SEQ_LEN,
            kernels=Kernels.plain,
        )
        schedule, dp = Schedule[self.schedule], 4 // (self.pp * self.tp)
        settings = EngineSettings(
            *(1, self.pp * max(1, TABLE[self.schedule].least_per_rank), 1.0, self.bf16, 1, SEQ_LEN),
            *(Recompute[self.recompute], self.head_pieces),
            schedule=schedule,
            placement=placement_of(schedule, self.pp, None),
            bucket=20_000,
        )
        return Job(model, Layout(dp, self.pp, self.tp, self.tp > 1), settings)


LAYOUTS = [dict(pp=2, tp=2), dict(pp=2), dict(pp=2, tp=2, bf16=True), dict(pp=4, bf16=True), dict(pp=2, bf16=True)]
"""Of four ranks; with `pp` alone, two replicas where that leaves two."""
CASES = [
    Case(schedule, how.value, **LAYOUTS[(index + shift) % len(LAYOUTS)])
    for index, schedule in enumerate(TABLE)
    for shift, how in enumerate(Recompute)
]
CASES += [Case("1f1b", "none", pp=2, tp=2, head_pieces=3, bf16=True), Case("zbv", "full", pp=2, head_pieces=2)]
"""Every schedule with every recomputation, and both in turn with every layout and precision."""


def batches(job: Job) -> Iterator[Batch]:
    """Micro-batches without end."""
    while True:
        yield Batch(*(torch.zeros(1, SEQ_LEN, dtype=torch.int64) for _ in range(2)))


def on_copies(call: Callable[..., Any], receives: bool) -> Callable[..., Any]:
    """A call of `torch.distributed` whose tensors Gloo only has copies of, which are not followed.

    Gloo copies what it is to reduce and scatter, and one of its threads may hold a tensor a moment longer than the work
    that it was given for. NCCL does neither.

    Args:
        call: the function.
        receives: whether its first tensor is written to.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            copies = [one.clone() if isinstance(one, torch.Tensor) else one for one in args]
            work = call(*copies, **kwargs)
        out, copy = (args[0], copies[0]) if receives else (None, None)

        def wait() -> None:
            with _disable_current_modes(), torch.no_grad():
                if work is not None:
                    work.wait()
                if out is not None:
                    out.copy_(copy)

        return SimpleNamespace(wait=wait) if work is not None else wait()

    return run


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """`parallel.deferral.add_product`; what a CPU makes by itself, where a GPU has a kernel, is not followed."""
    with _disable_current_modes():
        deferral.add_product(total, left, right, first)


CALLS = {
    "all_reduce": True,
    "all_gather_into_tensor": True,
    "reduce_scatter_tensor": True,
    "isend": False,
    "irecv": True,
}
"""What a step calls, and whether it writes to the first tensor."""


def for_real(job: Job) -> list[Held]:
    """What this rank holds in each section of a second step over gloo."""
    record, source = Record("cpu"), batches(job)
    rotary_tables.cache_clear()
    on_gloo = {name: on_copies(getattr(dist, name), receives) for name, receives in CALLS.items()}
    with Recorder(record):
        engine = build_engine(job.model, job.layout, job.stages, job.settings, _adamw, torch.device("cpu"))
        engine.pipeline.around = record.around
        _label_buckets(engine, record)
        with mock.patch.multiple(dist, **on_gloo), mock.patch("parallel.zero.add_product", add_product):
            _step(engine, record, source, _fewest_micro_batches(job))
            record.storages.label(_moments(engine), Kind.optimizer)
            _step(engine, record, source, job.settings.accumulation)
            engine.wait()
        return record.storages.sections()


def main() -> list[dict[str, Any]]:
    """Of each case what each section of the step held, for real and dry."""
    start_process_group()
    rank = dist.get_rank()
    real = [for_real(case.job) for case in CASES]
    dist.destroy_process_group()
    dry = [run(case.job, rank, micro_batches=case.job.settings.accumulation).sections for case in CASES]
    return [
        {
            "names": [section.name for section in dry_sections],
            "real": [(held.peak, held.after) for held in real_sections],
            "dry": [(one.held.peak, one.held.after) for one in dry_sections],
        }
        for real_sections, dry_sections in zip(real, dry, strict=True)
    ]


if __name__ == "__main__":
    report(main)
