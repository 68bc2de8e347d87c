"""Where the time of a step goes: what each stage did when, beside what its schedule would have it do."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.pipeline import Pipeline
from parallel.schedules import Action, Costs, Pass, Placement, Schedule, Span, Timeline, orders, simulate, split_off

COLORS = {Pass.F: "#4c78a8", Pass.B: "#f58518", Pass.W: "#54a24b"}
NAMES = {Pass.F: "forward", Pass.B: "backward", Pass.W: "weights"}


def seconds_by_rank(blocks: Sequence[Span], rank: int, num_ranks: int) -> list[float]:
    """Forward, backward and weight-gradient seconds of this rank, and the second at which its last pass ended, each at
    the place of its rank among zeros: the highest over all ranks is each rank's."""
    found = [0.0] * (4 * num_ranks)
    for block in blocks:
        found[[*Pass].index(block.action.what) * num_ranks + rank] += block.end - block.start
    found[3 * num_ranks + rank] = blocks[-1].end if blocks else 0.0
    return found


def as_record(highest: Sequence[float], num_ranks: int, seconds: float) -> dict[str, Any]:
    """What of `seconds_by_rank` over all ranks stands in a step's record.

    ``forward_seconds``, ``backward_seconds``, ``weight_seconds`` (where the schedule splits them off) and
    ``wait_seconds`` are lists by rank of the pipeline; ``bubble`` is the share of the time of all ranks, from the
    step's beginning to the last pass of the slowest, in which they wait; ``optimizer_seconds`` what comes then of the
    step's `seconds`: the reduction over replicas, clipping, the optimizer.
    """
    forward, backward, weights, ends = (list(highest[i * num_ranks : (i + 1) * num_ranks]) for i in range(4))
    length = max(ends)
    waits = [length - f - b - w for f, b, w in zip(forward, backward, weights, strict=True)]
    record = {
        "forward_seconds": forward,
        "backward_seconds": backward,
        "weight_seconds": weights,
        "wait_seconds": waits,
    }
    if not any(weights):
        del record["weight_seconds"]
    return {**record, "bubble": sum(waits) / num_ranks / length, "optimizer_seconds": seconds - length}


def expected(schedule: Schedule, place: Placement, micro_batches: int, shares: Sequence[float]) -> Timeline:
    """A step of a schedule whose stages cost what they should, with messages that take no time.

    Forward, input gradient and weight gradient are taken to be equally long, which they are in matrix products. The
    unit of time is a micro-batch's three passes through all stages.

    Args:
        schedule, place, micro_batches: of the step.
        shares: of each stage in the cost of all.
    """
    each = [share / 3 for share in shares]
    return simulate(orders(schedule, place, micro_batches), place, Costs(each, each, each))


@dataclass(frozen=True)
class Measured:
    """A step of one pipeline.

    Attributes:
        step: its number.
        schedule, place, micro_batches: what was run.
        blocks: of each rank.
    """

    step: int
    schedule: Schedule
    place: Placement
    micro_batches: int
    blocks: list[list[Span]]

    def ideal(self) -> Timeline:
        """The same schedule with passes that take their mean time, and messages none."""
        seconds: dict[tuple[Pass, int], list[float]] = {}
        split = split_off(block.action for rank in self.blocks for block in rank)
        for rank in self.blocks:
            for block in rank:
                action = block.action
                if action.what is not Pass.B or (action.stage, action.micro_batch) in split or not split:
                    seconds.setdefault((action.what, action.stage), []).append(block.end - block.start)
        means = {key: sum(values) / len(values) for key, values in seconds.items()}
        forward, backward, weights = (
            [means.get((what, stage), 0.0) for stage in range(self.place.num_stages)] for what in Pass
        )
        return simulate(
            orders(self.schedule, self.place, self.micro_batches), self.place, Costs(forward, backward, weights)
        )

    @property
    def bubble(self) -> float:
        """Share of waiting from the step's beginning to its last pass."""
        length = max(rank[-1].end for rank in self.blocks)
        busy = sum(block.end - block.start for rank in self.blocks for block in rank)
        return 1 - busy / length / len(self.blocks)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        rows = [
            [[b.action.what.name, b.action.stage, b.action.micro_batch, b.start, b.end] for b in rank]
            for rank in self.blocks
        ]
        place = {"num_ranks": self.place.num_ranks, "virtual": self.place.virtual}
        place["there_and_back"] = self.place.there_and_back
        facts = {"step": self.step, "schedule": self.schedule.value, "micro_batches": self.micro_batches}
        return {**facts, "place": place, "bubble": self.bubble, "blocks": rows}

    @staticmethod
    def from_json(found: dict[str, Any]) -> "Measured":
        """The inverse of `as_json`."""
        blocks = [
            [Span(Action(Pass[what], s, mb), start, end) for what, s, mb, start, end in rank]
            for rank in found["blocks"]
        ]
        place = Placement(**found["place"])
        return Measured(found["step"], Schedule[found["schedule"]], place, found["micro_batches"], blocks)


def gather(pipeline: Pipeline, group: Any, ranks: Sequence[int]) -> list[list[Span]] | None:
    """The last step of the ranks of one pipeline, on rank 0, in seconds after the first of them began; None elsewhere.

    Hosts are taken to agree on the time of day. All ranks call it together.

    Args:
        pipeline: this rank's.
        group: of all ranks.
        ranks: of the pipeline that is asked for, by place.
    """
    of_all: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object((pipeline.began, pipeline.blocks()), of_all, dst=0, group=group)
    if of_all is None:
        return None
    first = min(of_all[rank][0] for rank in ranks)
    late = {rank: of_all[rank][0] - first for rank in ranks}
    return [[replace(b, start=b.start + late[r], end=b.end + late[r]) for b in of_all[r][1]] for r in ranks]


TIMELINES = "timelines"
"""In the run folder."""


def write(measured: Measured, run_dir: Path) -> Path:
    """Keep a timeline, and draw it; the path of the picture."""
    path = run_dir / TIMELINES / f"step-{measured.step:08d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(measured.as_json()) + "\n", "utf-8")
    draw(measured, path.with_suffix(".png"))
    return path.with_suffix(".png")


def kept(run_dir: Path) -> dict[int, Path]:
    """The timelines that `write` has kept, by step."""
    return {int(path.stem.removeprefix("step-")): path for path in sorted(run_dir.glob(f"{TIMELINES}/step-*.json"))}


def draw(measured: Measured, path: Path) -> None:
    """What was measured above, what the schedule would have been below.

    Args:
        measured: a step.
        path: of the picture; its suffix says which kind, ``.png`` or ``.svg``.
    """
    ideal = measured.ideal()
    title = f"step {measured.step}, {named(measured.schedule, measured.place)}: measured, bubble {measured.bubble:.1%}"
    below = f"the same passes without waiting for messages: bubble {ideal.bubble:.1%}"
    draw_rows([(title, measured.blocks), (below, ideal.blocks)], measured.place, path, 1000, "ms")


def named(schedule: Schedule, place: Placement) -> str:
    """A schedule for a title."""
    return schedule.name + (f", {place.virtual} stages a rank" if place.virtual > 1 else "")


def draw_rows(
    pictures: Sequence[tuple[str, list[list[Span]]]], place: Placement, path: Path, scale: float, unit: str
) -> None:
    """Timelines under each other, ranks as rows, passes as coloured blocks.

    Args:
        pictures: a title, and the blocks of each rank.
        place: of the stages.
        path: of the picture.
        scale: from the blocks' time to the unit that is written below.
        unit: that one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    height = 0.8 * len(pictures) + 0.4 * place.num_ranks * len(pictures)
    figure, axes_of = pyplot.subplots(
        len(pictures), 1, sharex=True, figsize=(11, height), layout="constrained", squeeze=False
    )
    found: set[Pass] = set()
    for (title, rows), axes in zip(pictures, axes_of[:, 0], strict=True):
        for rank, row in enumerate(rows):
            stages = place.stages_of(rank)
            spans: dict[tuple[Pass, int], list[tuple[float, float]]] = {}  # drawn together: there may be thousands
            for block in row:
                key = block.action.what, stages.index(block.action.stage)
                spans.setdefault(key, []).append((scale * block.start, scale * (block.end - block.start)))
            for (what, turn), ranges in spans.items():
                paler = 1.0 - 0.45 * turn / max(1, place.virtual - 1)
                look = {"facecolor": COLORS[what], "alpha": paler, "edgecolor": "white", "linewidth": 0.4}
                axes.broken_barh(ranges, (rank - 0.4, 0.8), **look)
                found.add(what)
        axes.set_yticks(range(place.num_ranks), [f"rank {rank}" for rank in range(place.num_ranks)])
        axes.invert_yaxis()
        axes.set_title(title, fontsize="small", loc="left")
    axes_of[-1, 0].set_xlabel(unit + ("; paler: a rank's later stages" if place.virtual > 1 else ""))
    patches = [Patch(color=COLORS[what], label=NAMES[what]) for what in Pass if what in found]
    figure.legend(handles=patches, loc="outside upper right", ncols=3, fontsize="x-small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
