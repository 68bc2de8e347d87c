"""What a rank does around the passes of a step: it exchanges gradients and weights with its replicas, and runs Adam.

It follows `parallel/zero.py`: buckets of consecutive layers, a reduce-scatter of fp32 gradients as soon as the last of
them has been added, an all-gather of the weights in the order of their use.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from parallel.plan.costs import PassTime, Prices, Reach, pass_time
from parallel.plan.job import Job
from parallel.plan.operations import GroupKind
from parallel.plan.steps import Exchange, RankTime, StageTime
from parallel.plan.work import LayerWork

_FP32 = 4
_MOVED_BY_ADAM = 7 * _FP32
"""Bytes that Adam reads (gradient, weight, both moments) and writes (weight, both moments) for a parameter."""


@dataclass(frozen=True)
class LayerTime:
    """A kind of layer: its work, and the time of its passes."""

    work: LayerWork
    times: StageTime


def layer_time(work: LayerWork, prices: Prices, where: Mapping[GroupKind, Reach]) -> LayerTime:
    """Return the time of a layer's passes: forward, whole backward, and the two halves of that."""
    passes = (work.forward, work.backward, work.input_gradient, work.weights)
    return LayerTime(work, StageTime(*(pass_time(operations, prices, where) for operations in passes)))


def stage_time(layers: Sequence[tuple[LayerTime, int]]) -> StageTime:
    """Return the time of a stage's passes.

    Args:
        layers: each kind of layer, and how many of it the stage has.
    """
    found = StageTime(PassTime(), PassTime(), PassTime(), PassTime())
    for layer, number in layers:
        for total, time in zip(found, layer.times, strict=True):
            total.add(time, number)
    for total in found:
        total.wait_for_host()
    return found


def rank_time(
    job: Job, rank: int, layers: Sequence[LayerTime], prices: Prices, where: Mapping[GroupKind, Reach]
) -> RankTime:
    """Return what a rank of the pipeline does around its passes.

    Args:
        job: the job.
        rank: the rank of the pipeline.
        layers: the time of each layer of the model, embedding and head included.
        prices: of the cluster.
        where: the ranks of each group.
    """
    dp, value = job.layout.dp, 2 if job.settings.bf16 else _FP32
    own = [job.stages[index] for index in job.placement.stages_of(rank)]
    held = [layers[at].work for stage in own for at in range(stage.start, stage.stop)]
    parameters = sum(layer.parameters for layer in held)
    shared = sum(layer.shared_parameters for layer in held)
    share = parameters / dp
    after = prices.traffic(share * _FP32)  # the squares of the gradients
    if shared:
        after += prices.message("all_reduce", shared * _FP32, where[GroupKind.sharing])
        after += prices.message("reduce_scatter", shared * _FP32, where[GroupKind.dp])
    cast = share * (_FP32 + value) if job.settings.bf16 else 0
    adam = prices.traffic(share * _MOVED_BY_ADAM) + prices.traffic(cast)
    if dp == 1:
        return RankTime((), after, adam)
    exchanges = tuple(
        Exchange(
            prices.message("reduce_scatter", size * _FP32, where[GroupKind.dp]),
            prices.message("all_gather", size * value, where[GroupKind.dp]),
            *_uses(job, rank, layers, first, last),
        )
        for first, last, size in _buckets(job, rank, layers)
    )
    return RankTime(exchanges, after, adam)


def _buckets(job: Job, rank: int, layers: Sequence[LayerTime]) -> Iterator[tuple[int, int, int]]:
    """Yield the first and the last layer and the parameters of each bucket of a rank, as `parallel.zero` fills them."""
    held = [
        at for stage in job.placement.stages_of(rank) for at in range(job.stages[stage].start, job.stages[stage].stop)
    ]
    first, last, size = held[0], held[0], 0
    for at in held:
        if size >= job.settings.bucket:
            yield first, last, size
            first, size = at, 0
        size += layers[at].work.parameters - layers[at].work.shared_parameters
        last = at
    yield first, last, size


def _uses(
    job: Job, rank: int, layers: Sequence[LayerTime], first: int, last: int
) -> tuple[tuple[int, float], tuple[tuple[int, float], ...]]:
    """Return the first use of the layers from `first` to `last` of a rank, and what makes their gradients ready.

    Within a stage, forward passes go up through its layers, and backward passes and deferred gradients down.
    """
    used: tuple[int, float] | None = None
    ready = []
    for index in job.placement.stages_of(rank):
        stage = job.stages[index]
        lowest = max(first, stage.start)
        if lowest > min(last, stage.stop - 1):
            continue
        if used is None:
            used = index, sum(layers[at].times.forward.seconds for at in range(lowest, stage.stop))
        ready.append((index, sum(layers[at].times.weights.seconds for at in range(stage.start, lowest))))
    assert used is not None, "a bucket has layers"
    return used, tuple(ready)
