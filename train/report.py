"""Step reports: each rank makes one, one collective merges them, and one function turns a step into its record."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from model.config import ModelConfig
from parallel.engine import StepResult
from parallel.schedules import Pass
from train import timeline
from train.agreement import max_over_ranks
from train.length import StepSize
from train.metrics import peak_memory

if TYPE_CHECKING:
    from train.run import Run

LOGGED = {"logged": True}
"""Metadata of a field of `StepReport` that stands in the record under its own name."""


@dataclass(frozen=True)
class StepReport:
    """The report of one rank on a step and, once `merged`, the largest of each field over all ranks.

    A field is a bool, a float, or a list with a float for each rank of a pipeline, or of the run; in the latter a rank
    gives zeros but at its own place, so that the list then has the largest of each. What is no maximum, or known to
    rank 0 anyway, goes to `as_record` instead.

    Attributes:
        told_to_stop: a signal has asked this rank to stop.
        save_due: the settings ask for a checkpoint after this step; rank 0 says so.
        save_busy: the checkpoint before is still being written.
        memory_gib: the most that this process has held so far.
        forward_seconds, backward_seconds, weight_seconds: spent in passes of the pipeline.
        last_pass_end: when the last pass ended, in seconds after the step began.
        pass_seconds: the typical seconds of the passes of each rank of the run; empty after most steps.
    """

    told_to_stop: bool
    save_due: bool
    save_busy: bool
    memory_gib: list[float] = field(metadata=LOGGED)
    forward_seconds: list[float]
    backward_seconds: list[float]
    weight_seconds: list[float]
    last_pass_end: list[float]
    pass_seconds: list[float]

    def merged(self, group: dist.ProcessGroup) -> "StepReport":
        """Merge the reports of all ranks: one all-reduce over the CPU. All ranks call it together."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        flat = [float(one) for value in own.values() for one in (value if isinstance(value, list) else [value])]
        highest = iter(max_over_ranks(flat, group))
        of_all: dict[str, Any] = {
            name: [next(highest) for _ in value] if isinstance(value, list) else type(value)(next(highest))
            for name, value in own.items()
        }
        return replace(self, **of_all)

    def logged(self) -> dict[str, Any]:
        """The fields that stand in the record under their own names."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.metadata.get("logged")}


def own_report(run: "Run", step: int, result: StepResult) -> StepReport:
    """Make the report of this rank.

    Args:
        run: open.
        step: its number.
        result: what the engine says of it.
    """
    stage, stages = run.layout.stage(run.rank), range(run.layout.pp)

    def at_stage(value: float) -> list[float]:
        return [value if index == stage else 0.0 for index in stages]

    return StepReport(
        told_to_stop=run.signals.asked is not None,
        save_due=run.rank == 0 and run.saver.due(step),
        save_busy=run.saver.busy,
        memory_gib=at_stage(peak_memory(run.device) / 2**30),
        forward_seconds=at_stage(timeline.seconds_of(Pass.F, result.spans)),
        backward_seconds=at_stage(timeline.seconds_of(Pass.B, result.spans)),
        weight_seconds=at_stage(timeline.seconds_of(Pass.W, result.spans)),
        last_pass_end=at_stage(result.spans[-1].end if result.spans else 0.0),
        pass_seconds=run.stragglers.measured(result.spans, run.kind(step)[:2]),
    )


@dataclass(frozen=True)
class RunConstants:
    """The constants by which the figures of every step of a run are computed.

    Attributes:
        model: the shape, by which the FLOPs of a step are counted.
        peak_flops: FLOP/s of all devices together; None where a device's peak is not known.
        bubble_expected: of the schedule without messages, by the global batch of a step; empty where there is no
            pipeline.
        varies: whether steps differ in their batch or in the length of their sequences.
    """

    model: ModelConfig
    peak_flops: float | None
    bubble_expected: Mapping[int, float]
    varies: bool = False


def as_record(
    step: int,
    size: StepSize,
    result: StepResult,
    rate: float,
    seconds: float,
    report: StepReport,
    constants: RunConstants,
) -> dict[str, Any]:
    """Turn a step into its object in metrics.jsonl, evaluation and saves apart.

    Args:
        step: its number.
        size: of it.
        result: of the engine.
        rate: the learning rate.
        seconds: that the step took.
        report: merged.
        constants: of the run.
    """
    tokens_per_second = size.tokens / seconds
    record: dict[str, Any] = {
        "step": step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": rate,
        "tokens": size.tokens_before + size.tokens,
        "seconds": seconds,
        "tokens_per_second": tokens_per_second,
        **report.logged(),
    }
    if constants.varies:
        record |= {"global_batch": size.global_batch, "seq_len": size.seq_len}
    if constants.bubble_expected:
        record |= timeline.as_record(
            report.forward_seconds, report.backward_seconds, report.weight_seconds, report.last_pass_end, seconds
        )
        record["bubble_expected"] = constants.bubble_expected[size.global_batch]
    # Of what was computed: with causal attention halved, as Megatron-LM counts, and whole, as torchtitan does.
    others = size.tokens * constants.model.flops_per_token(0)
    halved, whole = (others + attention for attention in result.attention_flops)
    record["flops_per_token"] = halved / size.tokens
    if constants.peak_flops:
        record["mfu"] = halved / seconds / constants.peak_flops
        record["mfu_whole_attention"] = whole / seconds / constants.peak_flops
    return record
