"""Whether the messages of all ranks of a job pair up: what one sends another awaits, and groups say the same together.

NCCL has no names for messages: the k-th that a rank sends on a link is the k-th that the other asks for there, whatever
both mean, and the k-th call of a group is one collective for all of its ranks. A job whose ranks disagree hangs, or
goes on with wrong numbers. Here every group of every rank is gone through, with the dry run of the rank that does what
each of its ranks does: the result of which pass, the operation, its bytes, dtype and reduction have to be the same.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from parallel.dry_run.distinct import RankClass
from parallel.dry_run.rank import RankRun
from parallel.layout import Layout
from parallel.plan.job import Job
from parallel.plan.operations import GroupKind
from parallel.schedules import Action
from parallel.sharding import kv_copies

_Said = tuple[object, ...]
_Group = tuple[GroupKind, tuple[int, ...]]
"""The kind and the global ranks of a group; of a link from one rank to another these, sender first."""


@dataclass(frozen=True)
class Matching:
    """The outcome of pairing the messages of a job.

    Attributes:
        ranks_run: the number of ranks that were run.
        groups: the number of groups of all ranks whose messages were gone through, links among them.
        messages: the number of messages of these groups in a step: each once, however many ranks take part.
        unchecked: the number of groups with a rank that none of those that were run stands for.
        problems: one sentence for each group whose ranks disagree, and each group that the layout does not have.
    """

    ranks_run: int
    groups: int
    messages: int
    unchecked: int
    problems: Sequence[str]


def match(job: Job, runs: Mapping[RankClass, RankRun]) -> Matching:
    """Pair up the messages of all ranks.

    Args:
        job: of which the ranks are.
        runs: the dry run of one rank of each class, all with the same number of micro-batches.
    """
    assert len({run.micro_batches for run in runs.values()}) == 1, "runs of the same step"
    of_rank = _classes_by_rank(job.layout, runs)
    said = {one: _by_group(run) for one, run in runs.items()}
    run_ranks = {one.rank for one in runs}
    groups_of: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    for _, ranks in _groups(job):
        for rank in run_ranks.intersection(ranks):
            groups_of[rank].add(ranks)
    problems = [problem for one, run in runs.items() for problem in _foreign(job, one, run, groups_of[one.rank])]
    seen: dict[object, tuple[int, list[str]]] = {}
    groups = messages = unchecked = 0
    for kind, ranks in _groups(job):
        own = [of_rank.get(rank) for rank in ranks]
        if None in own:
            unchecked += 1
            continue
        members = [one for one in own if one is not None]
        # Groups of the same classes have the same messages.
        alike = kind, tuple(id(one) for one in members)
        if alike not in seen:
            name = tuple(map(job.layout.stage, ranks)) if kind is GroupKind.pp else kind
            sequences = [said[one].get(name, []) for one in members]
            problem = _disagreement(kind, ranks, members, sequences)
            seen[alike] = len(sequences[0]), [problem] if problem else []
            problems += seen[alike][1]
        groups += 1
        messages += seen[alike][0]
    return Matching(len(runs), groups, messages, unchecked, problems)


def _classes_by_rank(layout: Layout, runs: Mapping[RankClass, RankRun]) -> dict[int, RankClass]:
    replicas = layout.dp * layout.tp
    return {
        one.pp_rank * replicas + dp_rank * layout.tp + tp_rank: one
        for one in runs
        for dp_rank in one.replicas
        for tp_rank in one.tp_ranks
    }


def _groups(job: Job) -> Iterator[_Group]:
    """Yield every group of the layout that a step may use; a link of a pipeline is one for each direction."""
    layout, replicas = job.layout, job.layout.dp * job.layout.tp
    world = range(layout.world_size)
    if layout.world_size > 1:
        yield GroupKind.world, tuple(world)
    if layout.tp > 1:
        for first in world[:: layout.tp]:
            yield GroupKind.tp, tuple(range(first, first + layout.tp))
    copies = kv_copies(job.model, layout.tp)
    if 1 < copies < layout.tp:
        for first in world[::copies]:
            yield GroupKind.sharing, tuple(range(first, first + copies))
    if layout.dp > 1:
        for stage in range(layout.pp):
            for tp_rank in range(layout.tp):
                yield GroupKind.dp, tuple(range(stage * replicas + tp_rank, (stage + 1) * replicas, layout.tp))
    for sender, receiver in job.placement.links:
        for place in range(replicas):
            yield GroupKind.pp, (sender * replicas + place, receiver * replicas + place)


def _by_group(run: RankRun) -> dict[object, list[_Said]]:
    """Return what a rank says to each of its groups, in order."""
    said: dict[object, list[_Said]] = defaultdict(list)
    for one in run.exchanges:
        if one.operation in ("send", "receive"):
            said[tuple(map(run.job.layout.stage, one.group))].append((one.of, one.num_bytes, one.dtype))
        else:
            said[one.kind].append((one.operation, one.num_bytes, one.dtype, one.how))
    return said


def _disagreement(
    kind: GroupKind, ranks: tuple[int, ...], members: Sequence[RankClass], sequences: Sequence[list[_Said]]
) -> str | None:
    """Return in a sentence where the ranks of a group first differ; None where they never do."""
    first = sequences[0]
    for rank, one, other in zip(ranks[1:], members[1:], sequences[1:], strict=True):
        if other == first:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other))
        )
        between = (
            f"from rank {ranks[0]} to rank {ranks[1]}" if kind is GroupKind.pp else f"{kind.value} of {len(ranks)}"
        )
        return (
            f"{between}: message {at} is {_shown(first, at)} on rank {ranks[0]} and {_shown(other, at)} on rank {rank} "
            f"(run as ranks {members[0].rank} and {one.rank})"
        )
    return None


def _shown(sequence: Sequence[_Said], at: int) -> str:
    if at >= len(sequence):
        return f"none, after {len(sequence)}"
    what, num_bytes, dtype, *how = sequence[at]
    named = what.said if isinstance(what, Action) else what
    return " ".join([str(named), f"{num_bytes:,} bytes", str(dtype), *(str(one) for one in how if one)])


def _foreign(job: Job, one: RankClass, run: RankRun, own: Collection[tuple[int, ...]]) -> Iterator[str]:
    """Yield a sentence for each group that a rank speaks to and that is none of its own."""
    for group in {tuple(exchange.group) for exchange in run.exchanges}:
        if group not in own:
            yield f"rank {one.rank}: speaks to ranks {_listed(group)}, which are no group of {job.layout} that it is in"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} others" if len(ranks) > 8 else "")
