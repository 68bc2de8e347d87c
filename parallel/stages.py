"""The cut of a list of layers into pipeline stages of even cost.

A pipeline runs at the pace of its slowest stage. The output head costs about as much as two blocks of the 7B and 1.2
of the 67B, so counting layers alone would leave the last stage late in every step; DeepSeek chose 30 and 95 layers so
that with the head they divide well (arXiv 2401.02954, section 2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from model.config import ModelConfig
from parallel.schedules import Placement


@dataclass(frozen=True)
class Stage:
    """One stage: the half-open range of layers [start, stop) and what share of the whole cost they are."""

    index: int
    start: int
    stop: int
    cost_share: float


def split(costs: Sequence[float], num_stages: int) -> list[Stage]:
    """Cut layers into `num_stages` consecutive, non-empty stages.

    The dearest stage is made as cheap as any cut allows; among such cuts, the one with the least sum of squares is
    taken, and among those the one whose early stages are lighter: in 1F1B they hold the most activations.

    Args:
        costs: of each layer in order, embedding and head included, in any unit.
        num_stages: at most len(costs).

    Returns:
        Stages that hold every layer exactly once, in order.

    Raises:
        ValueError: fewer layers than stages.
    """
    n = len(costs)
    if not 1 <= num_stages <= n:
        raise ValueError(f"{n} layers cannot be cut into {num_stages} stages; 1 to {n} stages work")
    # In whole units: sums are exact, so that every process and machine takes the same one of several even cuts.
    unit = max(costs) / 10**6 or 1.0
    before = [0, *accumulate(round(cost / unit) for cost in costs)]

    def best_cut(limit: int | None) -> tuple[int, list[int]] | None:
        """Least sum of squares with no stage above `limit`; with no limit, the least possible largest stage."""
        # value[i]: of the best cut of layers [i, n) into the stages from `stage` on; built from the last stage back.
        value: list[int | None] = [None] * n + [0]
        choice: list[list[int]] = []
        for stage in reversed(range(num_stages)):
            new: list[int | None] = [None] * (n + 1)
            chosen = [0] * (n + 1)
            for start in range(stage, n - (num_stages - stage) + 1):
                for stop in range(start + 1, n - (num_stages - stage - 1) + 1):
                    rest, cost = value[stop], before[stop] - before[start]
                    if rest is None or (limit is not None and cost > limit):
                        continue
                    total = max(cost, rest) if limit is None else cost * cost + rest
                    least = new[start]
                    if least is None or total < least:  # the first, shortest stage wins a tie
                        new[start], chosen[start] = total, stop
            value = new
            choice.append(chosen)
        if value[0] is None:
            return None
        bounds = [0]
        for chosen in reversed(choice):
            bounds.append(chosen[bounds[-1]])
        return value[0], bounds

    largest = best_cut(limit=None)
    assert largest is not None, "every number of stages up to the number of layers has a cut"
    even = best_cut(limit=largest[0])
    assert even is not None, "the cut that set the limit is within it"
    bounds = even[1]
    total = before[-1] or 1
    stages = [
        Stage(i, start, stop, float((before[stop] - before[start]) / total))
        for i, (start, stop) in enumerate(pairwise(bounds))
    ]
    covered = [layer for stage in stages for layer in range(stage.start, stage.stop)]
    assert covered == list(range(n)), f"a layer was lost or doubled: {bounds}"
    return stages


def split_for(costs: Sequence[float], place: Placement) -> list[Stage]:
    """Cut layers into the stages of a placement so that the *ranks* come out even, each with all its stages.

    With one stage on each rank this is `split`. With several, blocks, which all cost the same, are dealt one at a time
    to the rank that has least, and within a rank to its stage that has least: what embedding and head cost beside them
    is evened out by fewer blocks there. In a placement that goes there and back both lie on the first rank.

    Raises:
        ValueError: fewer layers than stages.
    """
    if place.virtual == 1:
        return split(costs, place.num_ranks)
    num_stages = place.num_stages
    if len(costs) < num_stages:
        raise ValueError(f"{len(costs)} layers cannot be cut into {num_stages} stages")
    block = costs[1]
    assert all(cost == block for cost in costs[1:-1]), "blocks cost the same"
    # A stage holds at least a layer; the first and the last one have the embedding and the head.
    blocks = [0, *[1] * (num_stages - 2), 0]
    loads = [costs[0], *[block] * (num_stages - 2), costs[-1]]

    def load(rank: int) -> float:
        return sum(loads[stage] for stage in place.stages_of(rank))

    for _ in range(len(costs) - 2 - sum(blocks)):
        rank = min(range(place.num_ranks), key=lambda one: (load(one), -one))
        stage = min(place.stages_of(rank), key=lambda one: (loads[one], -one))
        blocks[stage] += 1
        loads[stage] += block
    bounds = [0, *accumulate(count + (index in (0, num_stages - 1)) for index, count in enumerate(blocks))]
    assert bounds[-1] == len(costs), f"a layer was lost or doubled: {bounds}"
    total = sum(costs) or 1.0
    return [Stage(i, start, stop, loads[i] / total) for i, (start, stop) in enumerate(pairwise(bounds))]


def stage_rows(model: ModelConfig, stages: Sequence[Stage], place: Placement | None = None) -> list[dict[str, Any]]:
    """One row per stage for a table or JSON: stage, rank, layers, blocks, parameters, cost_share."""
    embedding = head = model.vocab_size * model.d_model
    params = [embedding, *[model.block_params] * model.n_layers, head + model.d_model]
    rows = []
    for stage in stages:
        first, last = max(stage.start - 1, 0), min(stage.stop - 2, model.n_layers - 1)
        parts = ["embedding"] if stage.start == 0 else []
        if last >= first:
            parts.append(f"blocks {first}-{last}" if last > first else f"block {first}")
        if stage.stop == model.n_layers + 2:
            parts.append("head")
        rows.append(
            {
                "stage": stage.index,
                "rank": place.rank_of(stage.index) if place else stage.index,
                "layers": ", ".join(parts),
                "blocks": max(last - first + 1, 0),
                "parameters": sum(params[stage.start : stage.stop]),
                "cost_share": stage.cost_share,
            }
        )
    return rows


def stage_table(rows: Sequence[dict[str, Any]]) -> str:
    """`stage_rows` as a table for the terminal."""
    several = any(row["rank"] != row["stage"] for row in rows)  # stages on a rank of the pipeline
    table = Table(
        "stage", *(["rank"] if several else []), "layers", "parameters", "share of cost", title_justify="left"
    )
    table.title = f"{len(rows)} pipeline stage{'s' * (len(rows) > 1)}"
    for row in rows:
        rank = [str(row["rank"])] if several else []
        table.add_row(str(row["stage"]), *rank, row["layers"], f"{row['parameters']:,}", f"{row['cost_share']:.1%}")
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
