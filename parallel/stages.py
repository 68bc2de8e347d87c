"""The split of a list of layers into pipeline stages of even cost.

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
    """A pipeline stage: the half-open range of layers [start, stop), and their share of the whole model's cost."""

    index: int
    start: int
    stop: int
    cost_share: float


def split(costs: Sequence[float], num_stages: int) -> list[Stage]:
    """Cut layers into `num_stages` consecutive, non-empty stages.

    The cost of the most expensive stage is minimal; of the cuts with that minimum, the one with the least sum of
    squares is chosen, and of those the one with the cheapest early stages, which save the most activations in 1F1B.

    Args:
        costs: the cost of each layer in order, embedding and head included, in any unit.
        num_stages: the number of stages, at most len(costs).

    Returns:
        The stages, in order; every layer is in exactly one.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    n = len(costs)
    if not 1 <= num_stages <= n:
        raise ValueError(f"{n} layers cannot be cut into {num_stages} stages; 1 to {n} stages work")
    # Costs are rounded to integers, whose sums are exact: every process and machine takes the same one of equal cuts.
    unit = max(costs) / 10**6 or 1.0
    before = [0, *accumulate(round(cost / unit) for cost in costs)]

    def best_cut(limit: int | None) -> tuple[int, list[int]] | None:
        """Minimise the sum of squares with no stage above `limit`; without a limit, minimise the largest stage."""
        # value[i]: of the best cut of layers [i, n) into the stages from `stage` on; computed from the last stage back.
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


def split_for(costs: Sequence[float], placement: Placement) -> list[Stage]:
    """Cut layers into the stages of a placement so that the cost of *ranks* is even, each with all its stages.

    With one stage on each rank this is `split`. With several, blocks, which all cost the same, are assigned one at a
    time to the rank with the least cost, and within a rank to its cheapest stage: fewer blocks lie beside the embedding
    and the head. In a V-shaped placement both of these are on the first rank.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if placement.virtual == 1:
        return split(costs, placement.num_ranks)
    num_stages = placement.num_stages
    if len(costs) < num_stages:
        raise ValueError(f"{len(costs)} layers cannot be cut into {num_stages} stages")
    block = costs[1]
    assert all(cost == block for cost in costs[1:-1]), "blocks cost the same"
    # A stage holds at least a layer; the first and the last one have the embedding and the head.
    blocks = [0, *[1] * (num_stages - 2), 0]
    loads = [costs[0], *[block] * (num_stages - 2), costs[-1]]

    def load(rank: int) -> float:
        return sum(loads[stage] for stage in placement.stages_of(rank))

    for _ in range(len(costs) - 2 - sum(blocks)):
        rank = min(range(placement.num_ranks), key=lambda one: (load(one), -one))
        stage = min(placement.stages_of(rank), key=lambda one: (loads[one], -one))
        blocks[stage] += 1
        loads[stage] += block
    bounds = [0, *accumulate(count + (index in (0, num_stages - 1)) for index, count in enumerate(blocks))]
    assert bounds[-1] == len(costs), f"a layer was lost or doubled: {bounds}"
    total = sum(costs) or 1.0
    return [Stage(i, start, stop, loads[i] / total) for i, (start, stop) in enumerate(pairwise(bounds))]


def stage_rows(model: ModelConfig, stages: Sequence[Stage], placement: Placement | None = None) -> list[dict[str, Any]]:
    """Return one row per stage for a table or JSON: stage, rank, layers, blocks, parameters, cost_share."""
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
                "rank": placement.rank_of(stage.index) if placement else stage.index,
                "layers": ", ".join(parts),
                "blocks": max(last - first + 1, 0),
                "parameters": sum(params[stage.start : stage.stop]),
                "cost_share": stage.cost_share,
            }
        )
    return rows


def stage_table(rows: Sequence[dict[str, Any]]) -> str:
    """Render `stage_rows` as a table for the terminal."""
    several = any(row["rank"] != row["stage"] for row in rows)  # whether a rank of the pipeline holds several stages
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
