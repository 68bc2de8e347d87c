"""The process groups of a layout, and how they are made where making one takes the whole job.

With NCCL a group is a communicator, and making one is a collective call over all processes, whoever is in it. 1,024
ranks have thousands of groups, one for each pipeline, stage and link; but those of one kind do not overlap, and NCCL
splits the world into all of them in one call. Gloo makes them one after another, each among its own members.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from parallel.layout import Layout
from parallel.schedules import Placement
from parallel.tensor import TensorParallel

Links = Mapping[tuple[int, int], Any]
"""Process groups of two ranks of a pipeline by (sender, receiver), one for each direction, so that no message waits for
one that goes the other way."""


@dataclass(frozen=True)
class Ranks:
    """This process in the rank grid, and the process groups that it is in; a group of one rank is None.

    Attributes:
        layout: the rank grid.
        placement: which rank of a pipeline holds which stages.
        rank: this process, global.
        pipeline: the global ranks of its pipeline, in order.
        pp: those.
        dp: the ranks that hold the same part of the model.
        tp: the ranks that share its matrices.
        sharing: for each number of neighbouring ranks that hold one same parameter, those of them with this one.
        links: to and from other ranks of the pipeline.
    """

    layout: Layout
    placement: Placement
    rank: int
    pipeline: Sequence[int]
    pp: Any
    dp: Any
    tp: Any
    sharing: Mapping[int, Any]
    links: Links

    @property
    def pp_rank(self) -> int:
        """This process's place in its pipeline."""
        return self.layout.stage(self.rank)

    @property
    def dp_rank(self) -> int:
        """Which replica it belongs to."""
        return self.layout.replica(self.rank)

    @property
    def tp_rank(self) -> int:
        """Which part of every matrix it holds."""
        return self.layout.tp_rank(self.rank)

    @property
    def tensor_parallel(self) -> TensorParallel:
        """Its part in tensor parallelism."""
        layout = self.layout
        return TensorParallel(self.tp, self.tp_rank, layout.tp, layout.sequence_parallel, self.sharing)


def make_ranks(layout: Layout, placement: Placement, kv_copies: int) -> Ranks:
    """This process's groups. All processes of the layout call it together; one alone needs no process group.

    Args:
        layout: the rank grid, of as many processes as there are.
        placement: of the stages of each of its pipelines.
        kv_copies: neighbouring tensor-parallel ranks that hold the same key/value head.
    """
    rank = dist.get_rank() if layout.world_size > 1 else 0
    pp, dp, tp = layout.pp, layout.dp, layout.tp
    replicas = dp * tp  # of a stage's parts; the distance from a stage to the next
    pipelines = [[first + stage * replicas for stage in range(pp)] for first in range(replicas)]
    own = pipelines[rank % replicas]
    pp_group = _own_group(pipelines, rank)
    dp_group = _own_group([[s * replicas + d * tp + t for d in range(dp)] for s in range(pp) for t in range(tp)], rank)
    tp_group = _own_group([range(first, first + tp) for first in range(0, layout.world_size, tp)], rank)
    sharing = {tp: tp_group}
    if 1 < kv_copies < tp:
        sets = [range(first, first + kv_copies) for first in range(0, layout.world_size, kv_copies)]
        sharing[kv_copies] = _own_group(sets, rank)
    links = _make_links(placement, pipelines, rank, pp_group)
    return Ranks(layout, placement, rank, own, pp_group, dp_group, tp_group, sharing, links)


def _make_links(placement: Placement, pipelines: Sequence[Sequence[int]], rank: int, pp_group: Any) -> Links:
    """The links of this process. NCCL runs what it is told on a group one after another, so each link is a group of its
    own; Gloo does not, and the pipeline's group will do."""
    if not placement.links:
        return {}
    if not _one_after_another():
        own = next(ranks for ranks in pipelines if rank in ranks).index(rank)
        return {link: pp_group for link in placement.links if own in link}
    links: dict[tuple[int, int], Any] = {}
    for disjoint in _disjoint(placement.links):
        sets = {link: [[ranks[end] for end in link] for ranks in pipelines] for link in disjoint}
        group = _own_group([pair for pairs in sets.values() for pair in pairs], rank)
        links |= {link: group for link, pairs in sets.items() if any(rank in pair for pair in pairs)}
    return links


def _disjoint(links: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Links in as few sets as a greedy choice finds, in none of which two have a rank in common: four, or six where the
    last rank also sends to the first and their number is odd."""
    left, sets = list(links), []
    while left:
        taken: set[int] = set()
        chosen = []
        for link in left:
            if taken.isdisjoint(link):
                chosen.append(link)
                taken.update(link)
        left = [link for link in left if link not in chosen]
        sets.append(chosen)
    return sets


def _own_group(sets: Sequence[Sequence[int]], rank: int) -> Any:
    """A process group for each of these sets of ranks, which do not overlap; the one that this rank is in.

    All processes call it with the same sets. Sets of one rank get none.
    """
    if len(sets[0]) == 1:
        return None
    if _one_after_another():
        return _split_world([tuple(sorted(ranks)) for ranks in sets], rank)
    groups = [dist.new_group(list(ranks)) for ranks in sets]
    return next((group for group, ranks in zip(groups, sets, strict=True) if rank in ranks), None)


def _split_world(sets: Sequence[tuple[int, ...]], rank: int) -> Any:
    """The group of the set that this rank is in, of sets that NCCL splits the world into.

    PyTorch has NCCL tell the sets of a call apart by a hash of their ranks. Sets at even distances often share one (of
    512 ranks in pipelines of four, 31 and 127 with 32 and 64), and NCCL would join them: such sets get calls of their
    own.
    """
    own, left = None, list(sets)
    while left:
        by_color: dict[int, tuple[int, ...]] = {}
        for ranks in left:
            by_color.setdefault(split_color(ranks), ranks)
        called = set(by_color.values())
        left = [ranks for ranks in left if ranks not in called]
        # A rank outside gets a set of its own: PyTorch names a group by how many this process has made before.
        alone = [(one,) for one in sorted(set(range(dist.get_world_size())).difference(*called))]
        together = [*by_color.values(), *alone]
        assert len({split_color(ranks) for ranks in together}) == len(together), "two sets of one call look the same"
        group = dist.split_group(split_ranks=[list(ranks) for ranks in together])
        if any(rank in ranks for ranks in called):
            own = group
    return own


def split_color(ranks: Sequence[int]) -> int:
    """What tells the sets of one `dist.split_group` apart: PyTorch's ``genNcclSplitColor`` of their sorted ranks."""
    mixed = 0
    for rank in ranks:
        mixed ^= (rank + 0x9E3779B9 + (mixed << 6) % 2**64 + (mixed >> 2)) % 2**64
    return abs(mixed - 2**64 * (mixed >= 2**63)) % (2**31 - 1)


def _one_after_another() -> bool:
    """Whether the backend makes groups by splitting the world, and runs what it is told on each in order: NCCL."""
    return dist.is_initialized() and dist.get_backend() == "nccl"
