"""Timelines of a step: when each rank of a pipeline did which pass, beside the simulation of its schedule."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.schedules import Action, Pass, Placement, Schedule, orders, split_off
from parallel.simulation import Costs, Span, Timeline, simulate
from train import strict_json
from train.records import TIMELINES
from train.timeline_picture import draw_rows


def seconds_of(what: Pass, spans: Iterable[Span]) -> float:
    """Sum the seconds that a rank spent on one kind of pass."""
    return sum(span.end - span.start for span in spans if span.action.what is what)


def as_record(
    forward: Sequence[float], backward: Sequence[float], weight: Sequence[float], ends: Sequence[float], seconds: float
) -> dict[str, Any]:
    """Break the time of a step down for its record.

    Args:
        forward, backward, weight: seconds of each rank of a pipeline; of weight gradients 0 where the schedule does
            not split them off.
        ends: the second at which each rank's last pass ended.
        seconds: of the whole step.

    Returns:
        ``forward_seconds``, ``backward_seconds``, ``weight_seconds`` (where the schedule splits them off) and
        ``wait_seconds``, lists by rank of the pipeline; ``bubble``, the share of the time of all ranks, from the step's
        beginning to the last pass of the slowest, in which they wait; ``optimizer_seconds``, what comes then of the
        step: the reduction over replicas, clipping, the optimizer.
    """
    length = max(ends)
    waits = [length - f - b - w for f, b, w in zip(forward, backward, weight, strict=True)]
    return {
        "forward_seconds": list(forward),
        "backward_seconds": list(backward),
        **({"weight_seconds": list(weight)} if any(weight) else {}),
        "wait_seconds": waits,
        "bubble": sum(waits) / len(waits) / length,
        "optimizer_seconds": seconds - length,
    }


def expected(schedule: Schedule, placement: Placement, micro_batches: int, shares: Sequence[float]) -> Timeline:
    """Simulate a step of a schedule whose stages cost what they should, with messages that take no time.

    Forward, input gradient and weight gradient are taken to be equally long, which they are in matrix products. The
    unit of time is a micro-batch's three passes through all stages.

    Args:
        schedule, placement, micro_batches: of the step.
        shares: of each stage in the cost of all.
    """
    each = [share / 3 for share in shares]
    return simulate(orders(schedule, placement, micro_batches), placement, Costs(each, each, each))


@dataclass(frozen=True)
class MeasuredStep:
    """A step of one pipeline, as it was measured.

    Attributes:
        step: its number.
        schedule, placement, micro_batches: what was run.
        spans: of the passes of each rank, in seconds after the first rank began.
    """

    step: int
    schedule: Schedule
    placement: Placement
    micro_batches: int
    spans: list[list[Span]]

    def ideal(self) -> Timeline:
        """Simulate the same schedule with passes that take their mean time, and messages none."""
        seconds: dict[tuple[Pass, int], list[float]] = {}
        split = split_off(span.action for rank in self.spans for span in rank)
        for rank in self.spans:
            for span in rank:
                action = span.action
                if action.what is not Pass.B or (action.stage, action.micro_batch) in split or not split:
                    seconds.setdefault((action.what, action.stage), []).append(span.end - span.start)
        means = {key: sum(values) / len(values) for key, values in seconds.items()}
        forward, backward, weights = (
            [means.get((what, stage), 0.0) for stage in range(self.placement.num_stages)] for what in Pass
        )
        order = orders(self.schedule, self.placement, self.micro_batches)
        return simulate(order, self.placement, Costs(forward, backward, weights))

    @property
    def bubble(self) -> float:
        """Share of waiting from the step's beginning to its last pass."""
        length = max(rank[-1].end for rank in self.spans)
        busy = sum(span.end - span.start for rank in self.spans for span in rank)
        return 1 - busy / length / len(self.spans)

    def as_json(self) -> dict[str, Any]:
        """Turn the step into what a file of the run folder holds."""
        rows = [
            [[span.action.what.name, span.action.stage, span.action.micro_batch, span.start, span.end] for span in rank]
            for rank in self.spans
        ]
        # The keys are those of the first version, so that each reads the files of all others.
        placement = {"num_ranks": self.placement.num_ranks, "virtual": self.placement.virtual}
        placement["there_and_back"] = self.placement.there_and_back
        facts = {"step": self.step, "schedule": self.schedule.value, "micro_batches": self.micro_batches}
        return {**facts, "place": placement, "bubble": self.bubble, "blocks": rows}

    @staticmethod
    def from_json(found: dict[str, Any]) -> "MeasuredStep":
        """Read what `as_json` made, in this version or an earlier one."""
        spans = [
            [Span(Action(Pass[what], stage, mb), start, end) for what, stage, mb, start, end in rank]
            for rank in found["blocks"]
        ]
        placement = Placement(**found["place"])
        return MeasuredStep(found["step"], Schedule[found["schedule"]], placement, found["micro_batches"], spans)


def gather(began: float, spans: Sequence[Span], group: Any, ranks: Sequence[int]) -> list[list[Span]] | None:
    """Gather the spans of the ranks of one pipeline on rank 0, in seconds after the first of them began.

    Hosts are taken to agree on the time of day. All ranks call it together.

    Args:
        began: when this rank's step began, by the wall clock.
        spans: of this rank's passes, in seconds after that.
        group: of all ranks.
        ranks: of the pipeline that is asked for, in the order of its stages.

    Returns:
        The spans by rank of the pipeline on rank 0; None elsewhere.
    """
    of_all: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object((began, list(spans)), of_all, dst=0, group=group)
    if of_all is None:
        return None
    first = min(of_all[rank][0] for rank in ranks)
    late = {rank: of_all[rank][0] - first for rank in ranks}
    return [
        [replace(span, start=span.start + late[rank], end=span.end + late[rank]) for span in of_all[rank][1]]
        for rank in ranks
    ]


def write(measured: MeasuredStep, run_dir: Path) -> Path:
    """Write a step's timeline to the run folder, draw it, and return the path of the picture."""
    path = run_dir / TIMELINES / f"step-{measured.step:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(strict_json.dumps(measured.as_json()) + "\n", "utf-8")
    draw(measured, path.with_suffix(".png"))
    return path.with_suffix(".png")


def written(run_dir: Path) -> dict[int, Path]:
    """List the timelines that `write` has left in a run folder, by step."""
    paths = sorted(run_dir.glob(f"{TIMELINES}/step-*.json"))
    return {int(step): path for path in paths if (step := path.stem.removeprefix("step-")).isdecimal()}


def read(path: Path) -> MeasuredStep:
    """Read a timeline that `write` has left."""
    return MeasuredStep.from_json(json.loads(path.read_text("utf-8")))


def draw(measured: MeasuredStep, path: Path) -> None:
    """Draw what was measured above, what the schedule would have been below.

    Args:
        measured: a step.
        path: of the picture; its suffix says which kind, ``.png`` or ``.svg``.
    """
    ideal = measured.ideal()
    named = schedule_name(measured.schedule, measured.placement)
    above = f"step {measured.step}, {named}: measured, bubble {measured.bubble:.1%}"
    below = f"the same passes without waiting for messages: bubble {ideal.bubble:.1%}"
    draw_rows([(above, measured.spans), (below, ideal.spans)], measured.placement, path, 1000, "ms")


def schedule_name(schedule: Schedule, placement: Placement) -> str:
    """Name a schedule in a title."""
    return schedule.name + (f", {placement.virtual} stages a rank" if placement.virtual > 1 else "")
