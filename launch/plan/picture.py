"""The picture of a plan: a step of the fastest layout, and below it the memory of the rank that needs most."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.plan.dry_runs import DryRun
from launch.plan.rows import GIB, Row
from launch.timeline import picture
from parallel.plan.predict import predict
from parallel.simulation import Span
from train.palette import MEMORY
from train.timeline import schedule_name
from train.timeline_picture import DPI, WIDTH, bars_on, legend_of, prepare, rows_height, said_of


def draw(row: Row, run: DryRun, path: Path) -> None:
    """Draw the first micro-batches of a step as they are predicted, and the memory of a rank over the same passes.

    Args:
        row: the layout.
        run: the dry run of its rank that needs most, whose micro-batches are drawn.
        path: of the picture, which ends in .png or .svg.

    Raises:
        BadInput: the file cannot be drawn or written.
    """
    with picture("--picture", path):
        _draw(row, run, path)


def _draw(row: Row, run: DryRun, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    job, cluster = row.candidate.job, row.candidate.prediction.cluster
    drawn = replace(job, settings=replace(job.settings, accumulation=run.micro_batches))
    timeline, placement = predict(drawn, cluster).timeline, job.placement
    rows = rows_height(placement)
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(WIDTH, rows + 3.6), layout="constrained", height_ratios=[rows, 2.6]
    )
    prepare(above, placement, 0.0, 1000 * timeline.seconds)
    choice = row.candidate.choice
    named = schedule_name(choice.schedule, placement) if choice.pp > 1 else "no pipeline"
    part = "" if run.micro_batches == job.settings.accumulation else f" of {job.settings.accumulation:,}"
    above.set_title(
        f"pp{choice.pp} tp{choice.tp} dp{choice.dp}, {named}: {run.micro_batches:,}{part} micro-batches of "
        f"{choice.micro_batch} x {job.settings.seq_len:,} tokens, as predicted on {cluster.name}",
        fontsize="small",
        loc="left",
    )
    _memory(below, timeline.spans[run.peak.rank], run, cluster.memory_gib, cluster.allocatable_gib)
    below.set_xlabel("ms" + said_of(placement), fontsize="small")
    figure.legend(handles=legend_of([timeline.spans]), loc="outside upper right", ncols=3, fontsize="x-small")
    figure.draw_without_rendering()  # now the axes have their widths
    bars_on(above, timeline.spans, placement, 1000)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _memory(axes: Any, spans: Sequence[Span], run: DryRun, memory_gib: float, allocatable_gib: float) -> None:
    """Stack the memory of a rank at the fullest moment of each pass, over the time of the pass."""
    by_action = {action: parts for action, parts in run.sections if action is not None}
    parts = [by_action[span.action] for span in spans]
    times = [1000 * span.start for span in spans] + [1000 * spans[-1].end]
    bottom = [0.0] * (len(spans) + 1)
    for kind, color in MEMORY.items():
        sizes = [part.get(kind, 0.0) / GIB for part in parts]
        top = [low + size for low, size in zip(bottom, [*sizes, sizes[-1]], strict=True)]
        if any(sizes):
            axes.fill_between(times, bottom, top, step="post", color=color, label=kind, linewidth=0)
        bottom = top
    axes.axhline(memory_gib, color="black", linewidth=1)
    axes.axhline(allocatable_gib, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1.02 * max(memory_gib, *bottom))
    axes.set_ylabel("GiB")
    axes.set_title(
        f"memory of rank {run.peak.rank} at the fullest moment of each pass, by a dry run; the most is "
        f"{run.peak.num_bytes / GIB:.1f} GiB, {run.peak.where}; dashed: what a plan may fill",
        fontsize="small",
        loc="left",
    )
    axes.legend(loc="lower right", ncols=7, fontsize="x-small")
