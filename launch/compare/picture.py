"""The picture of a comparison: losses against tokens, and below them how far the others are from the first run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launch.compare.curves import WINDOWS, Losses, Parting, averages, longest, smooth
from launch.timeline import picture
from train.palette import look_of

UNITS = {"tokens": "tokens", "step": "steps", "hours": "hours of steps"}
_DRAWN = 2000
"""Windows into which a curve is averaged where it has more points: as many as a picture has dots across."""


def draw(names: Sequence[str], losses: Sequence[Losses], partings: Sequence[Parting], axis: str, path: Path) -> None:
    """Draw the losses of runs, and the differences of the others from the first.

    Args:
        names: of the runs.
        losses: of each.
        partings: of each but the first.
        axis: tokens, step or hours.
        path: of the picture, which ends in .png or .svg.

    Raises:
        BadInput: the file cannot be drawn or written.
    """
    with picture("--out", path):
        _draw(names, losses, partings, axis, path)


def _draw(names: Sequence[str], losses: Sequence[Losses], partings: Sequence[Parting], axis: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 7), layout="constrained", height_ratios=[3, 2]
    )
    smoothed = [smooth(one, longest(losses) / WINDOWS) for one in losses]
    for index, (name, one) in enumerate(zip(names, losses, strict=True)):
        look = look_of(index)
        color, x, y = look["color"], one.x, one.loss
        if len(x) > _DRAWN:
            borders = np.linspace(x[0], x[-1], _DRAWN + 1)
            x, y = (borders[1:] + borders[:-1]) / 2, averages(x, y, borders)
        above.plot(x, y, color=color, linewidth=0.6, alpha=0.35)
        above.plot(*smoothed[index], color=color, linestyle=look["linestyle"], linewidth=1.6, label=name)
        above.plot(one.val_x, one.val_loss, look["marker"], color=color, markersize=4, markeredgecolor="white")
    for index, parting in enumerate(partings, 1):
        color, line = look_of(index)["color"], look_of(index)["linestyle"]
        low, high = (parting.difference + sign * 2 * parting.error for sign in (-1, 1))
        below.plot(parting.windows, parting.difference, color=color, linestyle=line, linewidth=1.4)
        below.fill_between(parting.windows, low, high, color=color, alpha=0.25, linewidth=0)
        if parting.parts_at is not None:
            below.axvline(parting.parts_at, color=color, linewidth=0.8, linestyle=":")
    if tops := [values[len(values) // 20] for _, values in smoothed if len(values)]:
        lowest = min(float(np.min(one.loss)) for one in losses if len(one.loss))
        above.set_ylim(lowest - 0.03 * (max(tops) - lowest), max(tops))
    above.set_ylabel("loss, nats (marks: validation)")
    above.legend(fontsize="small")
    below.axhline(0, color="black", linewidth=0.8)
    below.set_ylabel(f"loss less that of\n{names[0]}, ±2 errors")
    below.set_xlabel(UNITS[axis])
    if axis != "hours":
        below.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 2T
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
