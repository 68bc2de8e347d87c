"""The ranks of a job that do the same, so that one of each kind has to be run.

All replicas of a part of the model do the same: the index of a replica only says which share of the optimizer's state
is its own, and shares are equal. Ranks that share a matrix do the same where their parts of every parameter have the
same size and the same of them are counted in the norm: it tells the first one from the others, and the last one where
the vocabulary does not divide. Ranks of other stages do other things.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.transformer import full_shapes
from parallel.plan.job import Job
from parallel.sharding import parameter_info


@dataclass(frozen=True)
class RankClass:
    """Ranks of a job that do the same.

    Attributes:
        pp_rank: their pipeline-parallel rank.
        tp_ranks: their tensor-parallel ranks, in order.
        replicas: their data-parallel ranks, in order.
        rank: the global rank of the first of them, which is run for all.
    """

    pp_rank: int
    tp_ranks: Sequence[int]
    replicas: Sequence[int]
    rank: int

    @property
    def size(self) -> int:
        """The number of these ranks."""
        return len(self.tp_ranks) * len(self.replicas)


def alone(job: Job, rank: int) -> RankClass:
    """Return the class of a rank that stands for no other."""
    layout = job.layout
    return RankClass(layout.stage(rank), (layout.tp_rank(rank),), (layout.replica(rank),), rank)


def classes(job: Job) -> list[RankClass]:
    """Return the classes of all ranks of a job, in the order of the pipeline."""
    layout = job.layout
    replicas = layout.dp * layout.tp
    found = []
    shapes = full_shapes(job.model)
    for pp_rank in range(layout.pp):
        alike: dict[object, list[int]] = {}
        for tp_rank in range(layout.tp):
            alike.setdefault(_signature(job, shapes, pp_rank, tp_rank), []).append(tp_rank)
        found += [
            RankClass(pp_rank, tuple(tp_ranks), range(layout.dp), pp_rank * replicas + tp_ranks[0])
            for tp_ranks in alike.values()
        ]
    return found


def _signature(job: Job, shapes: Mapping[str, torch.Size], pp_rank: int, tp_rank: int) -> object:
    """Return what tells a rank from others of its stages: the sizes of its parts of parameters, and which it counts."""
    model, layout = job.model, job.layout
    held = {0: "embedding.", 1: "blocks.0.", model.n_layers + 1: "head."}
    layers = [range(job.stages[index].start, job.stages[index].stop) for index in job.placement.stages_of(pp_rank)]
    kinds = {held[layer if layer in held else 1] for indices in layers for layer in indices}
    infos = [
        parameter_info(name, shape, model, layout.tp, tp_rank, layout.sequence_parallel)
        for name, shape in shapes.items()
        if any(name.startswith(kind) for kind in kinds)
    ]
    return tuple((info.name, info.shard.stop - info.shard.start, info.counted) for info in infos)
