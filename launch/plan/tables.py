"""A plan as text."""

from collections.abc import Sequence

from launch.plan.request import KEYS, Request, overrides_of
from launch.plan.rows import GIB, Row, gib
from launch.tables import of_numbers, rendered
from parallel.plan.search import Found, groups

_WIDTH = 120


def head(request: Request, found: Found) -> str:
    """Say what was planned, for which machines, and how many choices were looked at."""
    cluster, task = request.cluster, request.task
    figures = f"measured: {', '.join(cluster.measured)}; else data sheet" if cluster.measured else "data-sheet figures"
    size = f"{task.global_batch:,} x {task.seq_len:,} tokens a step, {'bf16' if task.bf16 else 'fp32'}"
    lines = [
        f"{request.config.preset} on {cluster.nodes:,} x {cluster.gpus_per_node} {cluster.name} ({figures}): {size}"
    ]
    if request.length.varies:
        lines[0] += ", the last step's; days and cost are of all steps, each with its own"
    if request.fixed:
        lines.append(f"kept as they are set: {' '.join(kept(request))}")
    refused = ", ".join(f"{key} {count:,}" for key, count in found.refused.most_common())
    room, memory, reserved = (
        gib(size * GIB) for size in (cluster.allocatable_gib, cluster.memory_gib, cluster.reserved_gib)
    )
    lines.append(
        f"{found.tried:,} choices: {found.refused.total():,} refused{f' ({refused})' if refused else ''}, "
        f"{found.too_large:,} do not fit\nthe {room} GiB that a plan may fill ({memory} less {reserved}, assumed for "
        f"CUDA, NCCL and the allocator),\n{found.idle:,} recompute more than they need to fit, "
        f"{len(found.candidates):,} timed"
    )
    return "\n".join(lines)


def kept(request: Request) -> list[str]:
    """Return the overrides of the keys that were not searched."""
    return [f"{KEYS[name]}={getattr(value, 'name', value)}" for name, value in request.fixed.items()]


def tables(request: Request, rows: Sequence[Row], found: Found) -> str:
    """Render the fastest layouts: what they reach, where steps go, what fills memory, and their overrides."""
    text = _reached(request, rows) + _spent(rows) + "what fills the rank that needs most, GiB\n"
    text += "".join(
        f"{number:>3}  {gib(row.peak.num_bytes)} on {row.peak.said}{' (dry run)' if row.peak.where else ''}\n"
        for number, row in enumerate(rows, 1)
    )
    text += f"\n{_equal(rows, found)}\n\noverrides\n"
    return text + "\n".join(
        f"{number:>3}  {' '.join(overrides_of(row.candidate.choice))}" for number, row in enumerate(rows, 1)
    )


def _equal(rows: Sequence[Row], found: Found) -> str:
    """Say how many layouts cannot be told from the fastest, and which of them is the plainest."""
    error = rows[0].candidate.prediction.error
    first = groups(found.candidates, error)[0]
    said = f"Predictions of steps that others have measured were off by {error:.0%} (docs/planner.md):"
    if len(first) == 1:
        return f"{said} the first is faster than all others by more."
    text = (
        f"{said}\n{len(first):,} of the {len(found.candidates):,} are no slower than the first by more, and any of "
        "them may be the fastest."
    )
    plainest = min(first, key=lambda one: (one.choice.pp * one.choice.tp, one.choice.pp, one.seconds))
    if plainest is not rows[0].candidate:
        said = f"{plainest.seconds:,.4g} s a step, {plainest.seconds / rows[0].candidate.seconds - 1:.1%} more"
        text += f"\nThe one of them that cuts the model least: {' '.join(overrides_of(plainest.choice))} ({said})"
    return text


def _reached(request: Request, rows: Sequence[Row]) -> str:
    priced = request.cluster.price_per_gpu_hour is not None
    columns = ["", "pp", "tp", "dp", "schedule", "micro-\nbatch", "recompute", "head\npieces", "seconds\na step"]
    columns += ["tokens/s\na GPU", "MFU", "MFU,\nwhole", "GiB", "run", *(["cost"] if priced else [])]
    title = "the fastest of each pp, tp, dp and schedule; MFU with attention's causal half counted, and the whole"
    table = of_numbers(columns, (4, 6), title)
    group = rows[0].group
    for number, row in enumerate(rows, 1):
        if row.group != group:
            table.add_section()
            group = row.group
        choice, prediction = row.candidate.choice, row.candidate.prediction
        stages = f" x{choice.virtual_stages}" if choice.virtual_stages > 1 else ""
        table.add_row(
            str(number),
            *(str(size) for size in (choice.pp, choice.tp, choice.dp)),
            choice.schedule.name + stages if choice.pp > 1 else "-",
            str(choice.micro_batch),
            choice.recompute.name,
            str(choice.head_pieces),
            f"{prediction.seconds:,.3g}",
            f"{prediction.tokens_per_second_per_gpu:,.0f}",
            f"{prediction.mfu:.1%}",
            f"{prediction.mfu_whole_attention:.1%}",
            gib(row.peak.num_bytes),
            _duration(row.run_seconds),
            *([_price(row.cost)] if row.cost is not None else []),
        )
    return f"{rendered(table, width=_WIDTH)}\n"


def _spent(rows: Sequence[Row]) -> str:
    names = list(rows[0].parts)
    table = of_numbers(["", *(name.replace(" ", "\n") for name in names)], title="where a step goes")
    for number, row in enumerate(rows, 1):
        seconds = row.candidate.seconds
        table.add_row(str(number), *(f"{part / seconds:.1%}" for part in row.parts.values()))
    return f"{rendered(table, width=_WIDTH)}\n"


def _duration(seconds: float) -> str:
    for length, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:,.3g} {name}"
    return f"{seconds:.3g} s"


def _price(cost: float) -> str:
    return f"{cost:,.0f}" if cost < 1e6 else f"{cost / 1e6:,.2f} M"
