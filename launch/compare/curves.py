"""Losses of runs side by side: the first step at which they differ, where they part beyond their noise, by how much.

A loss is that of a batch under the weights before the step, so it stands at what was trained on before it. Runs of
different batches have no steps in common. So each step of the run that has fewer is set against the mean of what the
other has had of the same stretch, less what the slope of the curve makes of the later places of those steps. Runs with
the same seed have had the same samples there, whatever their batches, and the noise that they share cancels.

These differences are averaged over windows of as many steps each, and how far an average may be off by chance follows
from their noise. It is told by second differences, to which a trend adds next to nothing: for points y with independent
noise of variance s², y[i-1] - 2 y[i] + y[i+1] has the variance 6 s².
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOWS = 100
"""Into which the part of the axis that two runs share is divided, at most."""
LEAST_POINTS = 8
"""Steps of a window on average, at least: fewer would not tell their noise."""
BEYOND = 3.0
"""Standard errors by which two windows differ that no chance explains."""
IN_A_ROW = 3
"""Windows in a row that differ so, in one direction, where curves are said to part."""


@dataclass(frozen=True)
class Losses:
    """The losses of a run, without steps that were passed over or whose update was skipped.

    Attributes:
        step: of each.
        x: what was done before the step: tokens, steps or hours of steps.
        loss: of its batch, in nats.
        tokens: trained on after the step.
        val_x, val_loss: the validations, each at what was done before it.
        left_out: steps that were skipped.
        nonfinite: steps whose loss was not finite, which are left out as well.
    """

    step: Floats
    x: Floats
    loss: Floats
    tokens: Floats
    val_x: Floats
    val_loss: Floats
    left_out: int
    nonfinite: int


@dataclass(frozen=True)
class Parting:
    """How the losses of a run lie beside those of another, over what both have been through.

    Attributes:
        paired: whether both have had as many tokens after each step, so that steps are compared one by one.
        alike_until: the last step up to which all losses are the same to the last bit; 0 for none. None where they have
            not.
        windows: the middles of the windows.
        difference: of the averages, this run's less the other's, in nats, by window.
        error: the standard error of each difference.
        parts_at: where they part beyond noise, on the x axis; None where they do not.
        parts_at_step: the step of this run there.
        end: the difference over the last tenth of the windows, in nats.
        end_error: its standard error.
        noise: the standard deviation of the noise of a single difference, of a step of the run that has fewer, in nats.
    """

    paired: bool
    alike_until: int | None
    windows: Floats
    difference: Floats
    error: Floats
    parts_at: float | None
    parts_at_step: int | None
    end: float | None
    end_error: float | None
    noise: float | None


NEEDED = ("step", "tokens", "loss", "seconds", "val_loss", "loss_limit", "passed_over")
"""The figures of records that `losses_of` needs."""


def losses_of(read: Mapping[str, Floats], axis: str) -> Losses:
    """Find the losses of a run in its records.

    Args:
        read: the figures in `NEEDED` of all records, as `RunFolder.columns` reads them.
        axis: of the curves: tokens, step or hours.
    """
    hours = np.cumsum(np.nan_to_num(read["seconds"])) / 3600
    after = {"tokens": read["tokens"], "step": read["step"], "hours": hours}[axis]
    before = np.concatenate([[0.0], after[:-1]]) if len(after) else after
    skipped = np.isfinite(read["loss_limit"])
    taken = np.isfinite(read["step"]) & (read["step"] > 0) & ~np.isfinite(read["passed_over"])
    finite = np.isfinite(read["loss"]) & np.isfinite(before)
    kept = taken & finite & ~skipped
    validated = np.isfinite(read["val_loss"]) & np.isfinite(after)
    return Losses(
        step=read["step"][kept],
        x=before[kept],
        loss=read["loss"][kept],
        tokens=read["tokens"][kept],
        val_x=after[validated],
        val_loss=read["val_loss"][validated],
        left_out=int((skipped & taken).sum()),
        nonfinite=int((taken & ~finite & ~skipped).sum()),
    )


def averages(x: Floats, y: Floats, borders: Floats) -> Floats:
    """Average the line through points over windows, exactly.

    Args:
        x: (n,) rising; the line is level beyond its ends.
        y: (n,) the values.
        borders: (k + 1,) of the windows, rising.

    Returns:
        (k,) the averages.
    """
    at = np.union1d(x, borders)
    line = np.interp(at, x, y)
    integral = np.concatenate([[0.0], np.cumsum(np.diff(at) * (line[1:] + line[:-1]) / 2)])
    return np.asarray(np.diff(integral[np.searchsorted(at, borders)]) / np.diff(borders))


def part(one: Losses, other: Losses) -> Parting:
    """Set the losses of a run beside those of another.

    Args:
        one: of the run.
        other: that it is set against.
    """
    rows = _paired(one, other)
    paired = rows is not None
    alike = None if rows is None else _alike(one, other, *rows)
    first, last = max(_first(one), _first(other)), min(_last(one), _last(other))
    few, many = sorted((one, other), key=lambda each: int(((each.x >= first) & (each.x <= last)).sum()))
    at, single = _single_differences(few, many, first, last)
    count = min(WINDOWS, len(at) // LEAST_POINTS)
    if count < IN_A_ROW:
        none = np.empty(0)
        return Parting(paired, alike, none, none, none, None, None, None, None, None)
    single = single if few is one else -single
    begins = np.linspace(0, len(at), count + 1).astype(np.int64)
    points = np.diff(begins)
    difference = np.add.reduceat(single, begins[:-1]) / points
    variance = _variance(single, begins)
    error, noise = np.sqrt(variance / points), float(np.sqrt(np.median(variance)))
    borders = np.append(at[begins[:-1]], at[-1])
    start = _departure(difference, error)
    tail = slice(-max(1, count // 10), None)
    return Parting(
        paired=paired,
        alike_until=alike,
        windows=(borders[1:] + borders[:-1]) / 2,
        difference=difference,
        error=error,
        parts_at=None if start is None else float(borders[start]),
        parts_at_step=None if start is None else int(one.step[np.searchsorted(one.x, borders[start])]),
        end=float(difference[tail].mean()),
        end_error=float(np.sqrt((error[tail] ** 2).sum()) / len(error[tail])),
        noise=noise,
    )


def _first(losses: Losses) -> float:
    return float(losses.x[0]) if len(losses.x) else 0.0


def _last(losses: Losses) -> float:
    return float(losses.x[-1]) if len(losses.x) else 0.0


def _paired(one: Losses, other: Losses) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return the rows of the steps that both have, where each of these leaves both with as many tokens; else None."""
    _, rows, others = np.intersect1d(one.step, other.step, assume_unique=True, return_indices=True)
    return (rows, others) if len(rows) and np.array_equal(one.tokens[rows], other.tokens[others]) else None


def _alike(one: Losses, other: Losses, rows: NDArray[np.int64], others: NDArray[np.int64]) -> int:
    """Return the last step up to which the losses in those rows are the same to the last bit; 0 for none."""
    differ = np.flatnonzero(one.loss[rows] != other.loss[others])
    same = int(differ[0]) if len(differ) else len(rows)
    return int(one.step[rows[same - 1]]) if same else 0


def _single_differences(few: Losses, many: Losses, first: float, last: float) -> tuple[Floats, Floats]:
    """Set each step of the run that has fewer against the other's mean over the same stretch.

    Args:
        few, many: the losses of both.
        first, last: of the part of the x axis that both have been through.

    Returns:
        Where each step begins, and the difference of the losses there.
    """
    inside = (few.x >= first) & (few.x <= last)
    at, loss = few.x[inside], few.loss[inside][:-1]  # where the last one ends is not known
    if len(at) < 2 or len(many.x) < 2:
        return np.empty(0), np.empty(0)
    widths = np.diff(at)

    def mean(of: Floats) -> Floats:
        """Average values that hold from each step of the other run to its next over the stretches."""
        summed = np.concatenate([[0.0], np.cumsum(of[:-1] * np.diff(many.x))])
        return np.asarray(np.diff(np.interp(at, many.x, summed)) / widths)

    later = mean(many.x) - at[:-1]  # of the places at which its losses were taken
    x, y = smooth(many, (last - first) / WINDOWS)
    slope = np.interp(at[:-1], x, np.gradient(y, x)) if len(x) > 1 else 0.0
    return at[:-1], loss - (mean(many.loss) - slope * later)


def _variance(y: Floats, begins: NDArray[np.int64]) -> Floats:
    """Estimate the variance of the noise of single points in windows that begin at some of them.

    The noise is averaged over five windows: the few points of one would tell it badly.
    """
    squares = (y[:-2] - 2 * y[1:-1] + y[2:]) ** 2 / 6
    window = np.searchsorted(begins, np.arange(1, len(y) - 1), side="right") - 1
    sums = np.bincount(window, weights=squares, minlength=len(begins) - 1)
    counts = np.bincount(window, minlength=len(begins) - 1)
    near = np.ones(min(5, len(begins) - 1))
    return np.convolve(sums, near, mode="same") / np.maximum(np.convolve(counts, near, mode="same"), 1)


def _departure(difference: Floats, error: Floats) -> int | None:
    """Find the first of several windows in a row that differ beyond their errors, in one direction."""
    beyond = np.where(np.abs(difference) > BEYOND * error, np.sign(difference), 0)
    for index in range(len(beyond) - IN_A_ROW + 1):
        row = beyond[index : index + IN_A_ROW]
        if row[0] and (row == row[0]).all():
            return index
    return None


def longest(of: Sequence[Losses]) -> float:
    """Return how much of the x axis the longest of some runs has been through."""
    return max((_last(losses) - _first(losses) for losses in of), default=0.0)


def smooth(losses: Losses, width: float) -> tuple[Floats, Floats]:
    """Average a curve over windows of about a width, or of its points where those are fewer: middles, and averages."""
    if len(losses.x) < 2 or not width > 0:
        return losses.x, losses.loss
    count = int(np.clip(np.ceil((losses.x[-1] - losses.x[0]) / width), 1, len(losses.x) - 1))
    borders = np.linspace(losses.x[0], losses.x[-1], count + 1)
    return (borders[1:] + borders[:-1]) / 2, averages(losses.x, losses.loss, borders)


def share_to_reach(one: Losses, other: Losses) -> float | None:
    """Return after which share of what both have been through a run is as low as the other one is in the end.

    Args:
        one: of the run; it is lower in the end.
        other: that it is set against.
    """
    last = min(_last(one), _last(other))
    if not last:
        return None
    (target,) = averages(other.x, other.loss, np.array([0.95 * last, last]))
    x, y = smooth(one, last / WINDOWS)
    there = np.flatnonzero((y <= target) & (x <= last))
    if not len(there):
        return None
    first = int(there[0])
    if first == 0:
        return float(x[0] / last)
    share = (y[first - 1] - target) / (y[first - 1] - y[first])
    return float((x[first - 1] + share * (x[first] - x[first - 1])) / last)


def at_shares(of: Sequence[Losses], shares: Sequence[float]) -> tuple[Floats, list[Floats]]:
    """Average each run's loss about the same places: those shares of what all have been through.

    Args:
        of: the losses of each run.
        shares: between 0 and 1.

    Returns:
        The places on the x axis, and for each run its average over the twentieth of the axis that ends there.
    """
    last = min((_last(losses) for losses in of), default=0.0)
    places = np.array([share * last for share in shares])
    width = last / 20
    if not last:
        return places, [np.full(len(places), np.nan) for _ in of]
    found = []
    for losses in of:
        borders = np.stack([places - width, places], axis=1)
        found.append(np.array([averages(losses.x, losses.loss, pair)[0] for pair in borders]))
    return places, found
