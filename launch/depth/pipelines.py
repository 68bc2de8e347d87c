"""What pipelines a shape allows: how evenly its layers are cut into stages, and how long ranks wait."""

from dataclasses import dataclass

from model.config import ModelConfig
from parallel import schedules
from parallel.layout import ParallelConfig
from parallel.stages import split_for
from train.timeline import expected


@dataclass(frozen=True)
class Pipeline:
    """A shape over a number of pipeline ranks.

    Attributes:
        pp: the ranks.
        blocks: the fewest and the most blocks of a rank.
        imbalance: by how much the rank with the most FLOPs exceeds the mean of all, as a share of that.
        bubble: the share of a step in which ranks wait, averaged over them, messages taken to need no time.
    """

    pp: int
    blocks: tuple[int, int]
    imbalance: float
    bubble: float


def pipeline_of(
    model: ModelConfig, seq_len: int, parallel: ParallelConfig, pp: int, micro_batches: int
) -> Pipeline | None:
    """Predict a pipeline by the parts that train it: the cut by FLOPs, and the simulated step; None if there is none.

    Args:
        model: the shape.
        seq_len: tokens of a sequence.
        parallel: where the schedule is from; its pp is not looked at.
        pp: ranks of the pipeline.
        micro_batches: of a step.
    """
    placement = schedules.placement_of(parallel.schedule, pp, parallel.virtual_stages)
    if pp > model.n_layers or placement.num_stages > model.n_layers + 2:
        return None
    stages = split_for(model.layer_flops(seq_len), placement)
    step = expected(parallel.schedule, placement, micro_batches, [stage.cost_share for stage in stages])
    of_ranks = [placement.stages_of(rank) for rank in range(pp)]
    costs = [sum(stages[index].cost_share for index in own) for own in of_ranks]
    last = model.n_layers + 1  # the head's place among the layers; the embedding's is 0
    blocks = [
        sum(max(0, min(stages[index].stop, last) - max(stages[index].start, 1)) for index in own) for own in of_ranks
    ]
    return Pipeline(pp, (min(blocks), max(blocks)), max(costs) * pp / sum(costs) - 1, step.bubble)


def problems(parallel: ParallelConfig, pp: int, micro_batches: int) -> list[str]:
    """Say why a schedule cannot have these ranks and micro-batches."""
    found = schedules.problems(parallel.schedule, pp, parallel.virtual_stages)
    if found or not (of_batch := schedules.batch_problems(parallel.schedule, pp, micro_batches, 1)):
        return found
    return [f"depth.micro_batches={micro_batches}, depth.pp={pp}: {of_batch[0]}"]
