"""The process groups of a layout, created in few collective calls.

With NCCL a group is a communicator, and creating one is a collective call over all processes, members or not. 1,024
ranks have thousands of groups, one for each pipeline, stage and link; but those of one kind do not overlap, and NCCL
splits the world into all of them in one call. Gloo creates them one after another, each among its own members.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from parallel.environment import timeout
from parallel.layout import Layout
from parallel.schedules import Placement
from parallel.tensor import TensorParallel

DRY = "dry"
"""The name of the backend of `parallel/dry_run`, which stands for NCCL and sends nothing."""

Links = Mapping[tuple[int, int], Any]
"""The process groups of two ranks of a pipeline by (sender, receiver), one for each direction, so that no message waits
for one that goes the other way."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process in the rank grid, and its process groups; a group of one rank is None.

    Attributes:
        layout: the rank grid.
        placement: the placement of the stages on the ranks of a pipeline.
        rank: the global rank of this process.
        pipeline: the global ranks of its pipeline, in order.
        pp: the group of its pipeline.
        dp: the group of the ranks that hold the same part of the model.
        tp: the group of the ranks that share its matrices.
        sharing: the group of the neighbouring ranks that hold the same parameter, by how many they are.
        links: the groups of this rank and another one of its pipeline, one for each direction.
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
        """The pipeline-parallel rank of this process."""
        return self.layout.stage(self.rank)

    @property
    def dp_rank(self) -> int:
        """The data-parallel rank: the index of the replica that this process belongs to."""
        return self.layout.replica(self.rank)

    @property
    def tp_rank(self) -> int:
        """The tensor-parallel rank: the index of the part of every matrix that this process holds."""
        return self.layout.tp_rank(self.rank)

    @property
    def tensor_parallel(self) -> TensorParallel:
        """The tensor-parallel ranks of this process, as the layers need them."""
        layout = self.layout
        return TensorParallel(self.tp, self.tp_rank, layout.tp, layout.sequence_parallel, self.sharing)


def make_ranks(layout: Layout, placement: Placement, kv_copies: int) -> Ranks:
    """Create this process's groups. All processes of the layout call it together; a single one needs no process group.

    Args:
        layout: the rank grid, of as many processes as have been started.
        placement: the placement of the stages on the ranks of a pipeline.
        kv_copies: the number of neighbouring tensor-parallel ranks that hold the same key/value head.
    """
    rank = dist.get_rank() if layout.world_size > 1 else 0
    pp, dp, tp = layout.pp, layout.dp, layout.tp
    replicas = dp * tp  # the ranks of a stage, and so the distance from a stage to the next
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
    """Create the links of this process. NCCL runs the operations of a group one after another, so each link is a group
    of its own; Gloo does not, and the pipeline's group serves for all."""
    if not placement.links:
        return {}
    if not _is_nccl():
        own = next(ranks for ranks in pipelines if rank in ranks).index(rank)
        return {link: pp_group for link in placement.links if own in link}
    links: dict[tuple[int, int], Any] = {}
    for disjoint in _disjoint(placement.links):
        sets = {link: [[ranks[end] for end in link] for ranks in pipelines] for link in disjoint}
        group = _own_group([pair for pairs in sets.values() for pair in pairs], rank)
        links |= {link: group for link, pairs in sets.items() if any(rank in pair for pair in pairs)}
    return links


def _disjoint(links: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Divide links into as few sets as a greedy choice finds, in none of which two links share a rank: four, or six
    where the last rank also sends to the first and their number is odd."""
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
    """Create a process group for each of these disjoint sets of ranks, and return the group of this rank.

    All processes call it with the same sets. Sets of one rank get no group.
    """
    if len(sets[0]) == 1:
        return None
    if _is_nccl():
        return _split_world([tuple(sorted(ranks)) for ranks in sets], rank)
    groups = [dist.new_group(list(ranks), timeout=timeout()) for ranks in sets]
    return next((group for group, ranks in zip(groups, sets, strict=True) if rank in ranks), None)


def _split_world(sets: Sequence[tuple[int, ...]], rank: int) -> Any:
    """Split the world into these sets with NCCL, and return the group of this rank.

    PyTorch has NCCL tell the sets of a call apart by a hash of their ranks. Sets at even distances often share a hash
    (of 512 ranks in pipelines of four, 31 and 127 with 32 and 64), and NCCL would join them: such sets get calls of
    their own.
    """
    own, left = None, list(sets)
    while left:
        by_color: dict[int, tuple[int, ...]] = {}
        for ranks in left:
            by_color.setdefault(split_color(ranks), ranks)
        called = set(by_color.values())
        left = [ranks for ranks in left if ranks not in called]
        # A rank outside gets a set of its own: PyTorch names a group by how many this process has created before.
        alone = [(one,) for one in sorted(set(range(dist.get_world_size())).difference(*called))]
        together = [*by_color.values(), *alone]
        assert len({split_color(ranks) for ranks in together}) == len(together), "two sets of one call look the same"
        group = dist.split_group(split_ranks=[list(ranks) for ranks in together], timeout=timeout())
        if any(rank in ranks for ranks in called):
            own = group
    return own


def split_color(ranks: Sequence[int]) -> int:
    """Compute the color of a set in `dist.split_group`: PyTorch's ``genNcclSplitColor`` of its sorted ranks."""
    mixed = 0
    for rank in ranks:
        mixed ^= (rank + 0x9E3779B9 + (mixed << 6) % 2**64 + (mixed >> 2)) % 2**64
    return abs(mixed - 2**64 * (mixed >= 2**63)) % (2**31 - 1)


def _is_nccl() -> bool:
    """Return whether the backend is NCCL, or the one of `parallel/dry_run` that stands for it: it splits the world into
    groups, and runs a group's operations in order."""
    return dist.is_initialized() and dist.get_backend() in ("nccl", DRY)
