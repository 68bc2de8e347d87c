"""The `deepnarrow dry-run` command: its answer as text and as JSON."""

import argparse
import json
import sys
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from launch.describe import settings
from launch.dry_run.ranks import GIB, Messages, Ran, chosen, needs, run_all, what_would_fit
from launch.plan.rows import counted
from launch.tables import of_numbers, rendered
from model.problems import BadInput
from parallel.dry_run import RankSection
from parallel.dry_run.distinct import RankClass
from parallel.dry_run.storages import Kind
from parallel.plan.cluster import Cluster
from parallel.schedules import Pass
from train.job import job_of
from train.timeline import schedule_name

_WIDTH = 160
_SHOWN = 10
"""Problems of messages that are said one by one."""


def run(options: argparse.Namespace) -> int:
    """Run ranks dry and print what they hold, send and compute; 1 if they do not fit or their messages do not pair up.

    Raises:
        BadInput: the layout is impossible, or an option is.
    """
    config = settings(options.overrides)
    job = job_of(config)
    reserved = Cluster().reserved_gib
    problems = []
    if not options.device_gib > reserved:
        problems.append(f"--device-gib={options.device_gib:g}: is above the {reserved:g} GiB that CUDA, NCCL and the "
                        "allocator take; 80 would work")  # fmt: skip
    try:
        ranks = chosen(job, options.ranks)
    except BadInput as error:
        problems += error.problems
    if problems:
        raise BadInput(problems)
    print(f"running {len(ranks):,} of {job.layout.world_size:,} ranks ...", file=sys.stderr, flush=True)
    ran = run_all(job, config.optimizer, ranks)
    verdict = judged(ran, options.device_gib, reserved)
    fits = ran.fits((options.device_gib - reserved) * GIB)
    said = {"device_gib": options.device_gib, "reserved_gib": reserved, "fits": fits, "verdict": verdict}
    print(json.dumps({**facts(ran), **said}, indent=2) if options.json else f"{as_text(ran)}\n{verdict}")
    return 0 if fits and not ran.matching.problems else 1


def judged(ran: Ran, device_gib: float, reserved_gib: float) -> str:
    """Return in a sentence whether the ranks fit a GPU, and what would if they do not.

    Args:
        ran: the ranks.
        device_gib: the memory of a GPU.
        reserved_gib: what of it CUDA, NCCL and the allocator are assumed to take.
    """
    room = (device_gib - reserved_gib) * GIB
    one, found = ran.fullest
    most = needs(found)
    stages = ran.job.placement.stages_of(one.pp_rank)
    name = f"stage {stages[0]}" if len(stages) == 1 else f"rank {found.rank}"
    where = f"at {_spoken(found.fullest, len(stages))}" if found.peak >= found.building else "while it is built"
    needed = f"{name} needs {most / GIB:.1f} GiB {where}"
    besides = f"about {reserved_gib:g} GiB are assumed for CUDA, NCCL and the allocator"
    if most <= room:
        return f"fits a GPU of {device_gib:g} GiB: {needed}, and {besides}"
    works = what_would_fit(ran, room)
    would = (
        f"{works[0]} would, with {works[1] / GIB:.1f} GiB" if works else "more pipeline or tensor-parallel ranks would"
    )
    return f"does not fit a GPU of {device_gib:g} GiB: {needed}, and {besides}; {would}"


def facts(ran: Ran) -> dict[str, Any]:
    """Return the numbers of `deepnarrow dry-run --json`.

    The keys are: layout, with dp, pp, tp and sequence_parallel; schedule; micro_batches of a step, and
    micro_batches_run of the one that was run; ranks, a list of those that were run, each with rank, stages, stands_for
    (pp_rank, tp_ranks, dp_ranks and their number), memory in bytes (peak, at which pass, by_kind at that time, state by
    kind, building: the peak while the engine was built), flops of a step, and host_reads; messages of a whole step, by
    kind, operation and ranks, on the rank with the most bytes of them; matching, with ranks_run, groups, messages of
    the step that was run, unchecked and problems.
    """
    job, layout = ran.job, ran.job.layout
    first = next(iter(ran.runs.values()))
    return {
        "layout": {"dp": layout.dp, "pp": layout.pp, "tp": layout.tp, "sequence_parallel": layout.sequence_parallel},
        "schedule": job.settings.schedule.name,
        "micro_batches": job.settings.accumulation,
        "micro_batches_run": first.micro_batches,
        "ranks": [
            {
                "rank": found.rank,
                "stages": job.placement.stages_of(one.pp_rank),
                "stands_for": {
                    "pp_rank": one.pp_rank,
                    "tp_ranks": list(one.tp_ranks),
                    "dp_ranks": list(one.replicas),
                    "number": one.size,
                },
                "memory": {
                    "peak": found.peak,
                    "at": found.peak_at,
                    "by_kind": {kind.value: size for kind, size in found.peak_by_kind.items()},
                    "state": {kind.value: size for kind, size in found.state.items()},
                    "building": found.building,
                },
                "flops": found.flops,
                "host_reads": found.reads,
            }
            for one, found in ran.runs.items()
        ],
        "messages": [
            {"kind": kind.value, "operation": operation, "ranks": ranks, "number": number, "bytes": size, "rank": rank}
            for (kind, operation, ranks), (number, size, rank) in ran.messages().items()
        ],
        "matching": {
            "ranks_run": ran.matching.ranks_run,
            "groups": ran.matching.groups,
            "messages": ran.matching.messages,
            "unchecked": ran.matching.unchecked,
            "problems": list(ran.matching.problems),
        },
    }


def as_text(ran: Ran) -> str:
    """Render what the ranks have shown, but for the verdict."""
    job, settings = ran.job, ran.job.settings
    run_micro_batches = next(iter(ran.runs.values())).micro_batches
    lines = [
        f"{counted(job.layout.world_size, 'rank')}, {job.layout}; {schedule_name(settings.schedule, job.placement)}, "
        f"{'bf16' if settings.bf16 else 'fp32'}, micro-batches of {settings.micro_batch} x {settings.seq_len} tokens, "
        f"recompute {settings.recompute.name}"
    ]
    if run_micro_batches < settings.accumulation:
        lines.append(
            f"{run_micro_batches} of a step's {settings.accumulation:,} micro-batches were run: a longer step holds no "
            "more but their token ids, which are added; its FLOPs and messages are counted from these"
        )
    parts: list[RenderableType] = ["GiB of each rank at its peak, by kind, and TFLOP of a step", _memory(ran)]
    if messages := ran.messages():
        parts += ["messages of a step, on the rank with the most bytes of each kind", _messages(messages)]
    lines += [line for line in rendered(*parts, width=_WIDTH).splitlines() if line]
    return "\n".join([*lines, *_pairing(ran)])


def _memory(ran: Ran) -> Table:
    kinds = [kind for kind in Kind if any(run.peak_by_kind[kind] for run in ran.runs.values())]
    columns = ["rank", "stands for", "stages", *(kind.value for kind in kinds), "peak", "at", "building", "TFLOP"]
    table = of_numbers(columns, ["at"])
    for one, run in ran.runs.items():
        sizes = [f"{run.peak_by_kind[kind] / GIB:.2f}" for kind in kinds]
        stages = ", ".join(map(str, ran.job.placement.stages_of(one.pp_rank)))
        table.add_row(
            *(f"{run.rank:,}", _alike(one), stages, *sizes, f"{run.peak / GIB:.2f}", run.peak_at),
            *(f"{run.building / GIB:.2f}", f"{run.flops / 1e12:,.1f}"),
        )
    return table


def _messages(messages: Messages) -> Table:
    table = of_numbers(["kind", "operation", "between", "number", "GiB", "rank"], ["kind", "operation"])
    for (kind, operation, ranks), (number, size, rank) in sorted(messages.items(), key=lambda one: -one[1][1]):
        table.add_row(kind.value, operation, f"{ranks:,} ranks", f"{number:,.0f}", f"{size / GIB:,.3g}", f"{rank:,}")
    return table


def _alike(one: RankClass) -> str:
    """Say for how many ranks one stands, itself among them."""
    return counted(one.size, "rank")


def _pairing(ran: Ran) -> list[str]:
    """Say whether the messages pair up."""
    found = ran.matching
    if ran.job.layout.world_size == 1:
        return ["messages: none, of a rank alone"]
    said = f"{found.messages:,} messages of {found.groups:,} groups"
    lines = [f"not checked: {found.unchecked:,} groups with ranks that were not run; --ranks=distinct runs what they "
             "need"] * bool(found.unchecked)  # fmt: skip
    if not found.problems:
        return [*lines, f"messages: {said} pair up, by dry runs of {counted(found.ranks_run, 'rank')}"]
    more = len(found.problems) - _SHOWN
    return [
        *lines,
        f"messages: of {said} {len(found.problems):,} groups disagree",
        *found.problems[:_SHOWN],
        *([f"and {more:,} more"] if more > 0 else []),
    ]


def _spoken(section: RankSection, stages: int) -> str:
    """Say which pass a section is: ``the backward pass of micro-batch 4``, through which stage if there are several."""
    if section.action is None:
        return f"the time {section.name}"
    what = "pass of weight gradients" if section.action.what is Pass.W else f"{section.action.what.value} pass"
    through = f" through stage {section.action.stage}" if stages > 1 else ""
    return f"the {what} of micro-batch {section.action.micro_batch}{through}"
