"""Dry runs of the fastest layouts: the exact memory of the ranks that need most, from the code that trains."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.dry_run.pool import pool
from launch.plan.request import Request
from launch.plan.rows import Peak, counted, gib
from model.problems import BadInput
from parallel.plan.job import Job
from parallel.plan.search import Candidate, Choice, fastest_of_each, rank_memory
from parallel.schedules import Action

_NEARLY = 0.9
"""An end of the pipeline that needs so much of what the fullest rank needs, by the formula, is run as well."""


@dataclass(frozen=True)
class DryRun:
    """What a dry run has shown of a rank.

    Attributes:
        peak: the most that it holds.
        sections: for each pass in order, None before and after them, the bytes by kind at the pass's own peak.
        micro_batches: the number of micro-batches of the step that was run.
    """

    peak: Peak
    sections: Sequence[tuple[Action | None, Mapping[str, float]]]
    micro_batches: int


@dataclass(frozen=True)
class Checked:
    """The candidates after dry runs of the fastest.

    Attributes:
        candidates: without those that dry runs have shown not to fit.
        runs: of each that was run, its rank that needs most.
        dropped: a sentence for each of the others.
        ranks: the number of ranks that were run.
    """

    candidates: list[Candidate]
    runs: dict[Choice, DryRun]
    dropped: list[str]
    ranks: int


def check(request: Request, candidates: Sequence[Candidate], number: int) -> Checked:
    """Run the ranks that need most memory of the fastest layouts, until so many are known to fit.

    Args:
        request: what is planned.
        candidates: fastest first.
        number: of layouts, the fastest of each pp, tp, dp and schedule.

    Raises:
        BadInput: none of the layouts that fit by the formula fits.
    """
    room, ranks, left = request.cluster.allocatable_bytes, 0, list(candidates)
    runs: dict[Choice, DryRun] = {}
    dropped: list[str] = []
    with pool() as processes:
        while batch := [one for one in fastest_of_each(left)[:number] if one.choice not in runs]:
            tasks = [(one, rank) for one in batch for rank in fullest_ranks(one)]
            said = f"dry runs of {counted(len(tasks), 'rank')} of {counted(len(batch), 'layout')} ..."
            print(said, file=sys.stderr, flush=True)
            ranks += len(tasks)
            runs_of = processes.map(dry_run, [one.job for one, _ in tasks], [rank for _, rank in tasks])
            for (one, _), run in zip(tasks, runs_of, strict=True):
                before = runs.get(one.choice)
                runs[one.choice] = run if before is None or run.peak.num_bytes > before.peak.num_bytes else before
            for one in batch:
                peak = runs[one.choice].peak
                if peak.num_bytes > room:
                    left.remove(one)
                    dropped.append(
                        f"{_named(one)}: a dry run needs {gib(peak.num_bytes)} GiB on {peak.said}, where the formula "
                        f"has {gib(one.memory.peak)}"
                    )
    if not left:
        raise BadInput([f"--cluster: no layout fits: {problem}; more machines would work" for problem in dropped[:1]])
    return Checked(left, runs, dropped, ranks)


def fullest_ranks(candidate: Candidate) -> list[int]:
    """Return the ranks of the pipeline that may need most: the fullest by the formula, and ends that come near it."""
    job, rank = candidate.job, candidate.rank
    ends = {0, job.layout.pp - 1} - {rank}
    return [rank, *sorted(end for end in ends if rank_memory(job, end).peak >= _NEARLY * candidate.memory.peak)]


def dry_run(job: Job, rank: int) -> DryRun:
    """Run a rank of the pipeline, the first of its replicas and of those that share its matrices, which has most."""
    from parallel.dry_run import run
    from parallel.dry_run.storages import Kind

    found = run(job, rank * job.layout.dp * job.layout.tp)
    later = found.left_out  # which no dry run of fewer micro-batches holds

    def named(by_kind: Mapping[Kind, int]) -> dict[str, float]:
        return {kind.value: size + (later if kind is Kind.activations else 0) for kind, size in by_kind.items() if size}

    sections = [(section.action, named(section.held.by_kind)) for section in found.sections]
    parts = {kind.value: size for kind, size in found.peak_by_kind.items() if size}
    return DryRun(Peak(rank, parts, found.peak_at), sections, found.micro_batches)


def _named(candidate: Candidate) -> str:
    choice = candidate.choice
    return f"pp{choice.pp} tp{choice.tp} dp{choice.dp} {choice.schedule.name}, micro-batch {choice.micro_batch}"
