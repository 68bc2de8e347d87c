"""Pictures of timelines: ranks as rows, passes as coloured bars."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from parallel.schedules import Pass, Placement
from parallel.simulation import Span
from train.excerpts import excerpts
from train.palette import PASSES, paler, text_on

NAMES = {Pass.F: "forward", Pass.B: "backward", Pass.W: "weights"}
WIDTH, DPI = 11.0, 150
"""Inches of a picture, and dots of an inch."""
_MANY = 400
"""Bars of an SVG's axes up to which each is a shape; more are dots inside of it, or it would be megabytes."""
_EDGES = 5.0
"""Dots of a bar from which on it has an edge."""
_DIGITS = 6.0
"""Points of a number in a bar."""


def draw_rows(
    pictures: Sequence[tuple[str, list[list[Span]]]],
    placement: Placement,
    path: Path,
    scale: float,
    unit: str,
    label: str = "",
) -> None:
    """Draw timelines under each other; of steps with many passes how they begin and how they end.

    Args:
        pictures: a title, and the spans of each rank.
        placement: of the stages.
        path: of the picture; its suffix says which kind, ``.png`` or ``.svg``.
        scale: from the spans' time to the unit of the axes.
        unit: that one.
        label: what is written below; the unit if empty.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = excerpts([rows for _, rows in pictures])
    lengths = [end - start for start, end in chosen[0].stretches]
    broken = len(lengths) > 1
    height = len(pictures) * (rows_height(placement) + (0.75 if broken else 0.4)) + 0.7
    figure, grid = pyplot.subplots(
        len(pictures), len(lengths), figsize=(WIDTH, height), layout="constrained", squeeze=False, width_ratios=lengths
    )
    for (title, _), excerpt, axes_of in zip(pictures, chosen, grid, strict=True):
        for axes, stretch in zip(axes_of, excerpt.stretches, strict=True):
            prepare(axes, placement, scale * stretch[0], scale * stretch[1])
        if excerpt.left_out is None:
            axes_of[0].set_title(title, fontsize="small", loc="left")
        else:
            axes_of[0].set_title(f"{title}\n", fontsize="small", loc="left")
            axes_of[1].set_title(excerpt.left_out.said(scale, unit), fontsize="x-small", loc="right")
            _break(*axes_of)
    if not broken:
        for axes in grid[:-1, 0]:
            axes.tick_params(labelbottom=False)
    below = figure.supxlabel((label or unit) + said_of(placement), fontsize="small")
    figure.legend(
        handles=legend_of(rows for _, rows in pictures), loc="outside upper right", ncols=3, fontsize="x-small"
    )
    figure.draw_without_rendering()  # now the axes have their widths, which say what fits into a bar
    numbered = [
        bars_on(axes, rows, placement, scale)
        for (_, rows), axes_of in zip(pictures, grid, strict=True)
        for axes in axes_of
    ]
    below.set_text(below.get_text() + ("; numbers: micro-batches" if any(numbered) else ""))
    with pyplot.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def rows_height(placement: Placement) -> float:
    """Return the inches that the rows of all ranks take."""
    return min(max(0.3 * placement.num_ranks, 0.8), max(4.0, 0.08 * placement.num_ranks))


def said_of(placement: Placement) -> str:
    """Say what a label of the axis should say of bars, beside the unit."""
    return "; paler and lower: a rank's later stages" if placement.virtual > 1 else ""


def prepare(axes: Any, placement: Placement, start: float, end: float) -> None:
    """Give axes a row for each rank, and the limits of the time, before the figure is laid out.

    Args:
        axes: matplotlib's.
        placement: of the stages.
        start, end: the limits.
    """
    ranks = range(0, placement.num_ranks, 1 if placement.num_ranks <= 16 else 8)
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks], fontsize="small")
    axes.set_ylim(placement.num_ranks - 0.5, -0.5)
    axes.set_xlim(start, end)
    axes.tick_params(axis="x", labelsize="small")
    axes.xaxis.set_major_formatter("{x:,.10g}")


def _break(left: Any, right: Any) -> None:
    """Show that something is left out between two axes."""
    left.spines["right"].set_visible(False)
    right.spines["left"].set_visible(False)
    right.tick_params(left=False, labelleft=False)
    mark = {"marker": [(-0.5, -1), (0.5, 1)], "markersize": 7, "color": "black", "linestyle": "none", "clip_on": False}
    left.plot([1, 1], [0, 1], transform=left.transAxes, **mark)
    right.plot([0, 0], [0, 1], transform=right.transAxes, **mark)


def bars_on(axes: Any, rows: Sequence[Sequence[Span]], placement: Placement, scale: float) -> bool:
    """Draw the passes of each rank that are within the limits of the axes, after the figure has been laid out.

    Those of a rank's later stages are paler and lower. The number of its micro-batch is in each bar that has room.

    Args:
        axes: matplotlib's, as `prepare` left them.
        rows: the spans of each rank.
        placement: of the stages.
        scale: from the spans' time to the unit of the axis.

    Returns:
        Whether a bar had room for a number.
    """
    from matplotlib.collections import PolyCollection

    low, high = axes.get_xlim()
    dots = axes.bbox.width * DPI / axes.figure.dpi / (high - low)
    row_dots = axes.bbox.height * DPI / axes.figure.dpi / placement.num_ranks
    bars: dict[tuple[Pass, int], list[tuple[float, float, int, int]]] = {}
    for rank, row in enumerate(rows):
        stages = placement.stages_of(rank)
        for span in row:
            if scale * span.end > low and scale * span.start < high:
                found = scale * span.start, scale * span.end, rank, span.action.micro_batch
                bars.setdefault((span.action.what, stages.index(span.action.stage)), []).append(found)
    many = sum(map(len, bars.values())) > _MANY
    for (what, turn), those in bars.items():
        later = turn / max(1, placement.virtual - 1)
        color, tall = paler(PASSES[what], 0.45 * later), 0.84 - 0.3 * later
        corners = []
        for start, end, rank, micro_batch in those:
            top, bottom = rank + 0.42 - tall, rank + 0.42
            corners.append([(start, top), (end, top), (end, bottom), (start, bottom)])
            shown = min(end, high) - max(start, low)
            text = str(micro_batch)
            wide = 0.65 * _DIGITS / 72 * DPI * len(text) + 4
            if dots * shown > wide and row_dots * tall > 1.3 * _DIGITS / 72 * DPI:
                middle = max(start, low) + shown / 2, bottom - tall / 2
                look = {"ha": "center", "va": "center_baseline", "fontsize": _DIGITS, "color": text_on(color)}
                axes.text(*middle, text, in_layout=False, clip_on=True, zorder=1.1, rasterized=many, **look)
        mean = dots * sum(end - start for start, end, _, _ in those) / len(those)
        edge = {"edgecolors": "white", "linewidths": 0.5} if mean > _EDGES else {"linewidths": 0}
        axes.add_collection(PolyCollection(corners, facecolors=color, rasterized=many, **edge), autolim=False)
    return bool(axes.texts)


def legend_of(pictures: Iterable[Sequence[Sequence[Span]]]) -> list[Any]:
    """Return the entries of a legend for the kinds of passes that there are."""
    from matplotlib.patches import Patch

    found = {span.action.what for rows in pictures for row in rows for span in row}
    return [Patch(color=PASSES[what], label=NAMES[what]) for what in Pass if what in found]
