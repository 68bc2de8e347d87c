"""Fewer points of a curve that look the same: the lowest and the highest of each bucket, so that no spike is lost."""

import numpy as np
from numpy.typing import NDArray

EVEN, LOGARITHMIC = 700, 400
"""Buckets of equal width, about the pixels of a plot; and those that grow, for a logarithmic axis."""

REACH = 5
"""Points before and after one over which it is smoothed at least, where there are as many."""

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


def borders(length: int) -> Places:
    """Return where the buckets of so many points begin: even ones, with finer ones at the beginning.

    A logarithmic axis is mostly beginning: of a million steps, even buckets of a plot's pixels would leave two points
    of the first thousand steps.

    Args:
        length: points.

    Returns:
        (k,) the first place of each bucket, rising from 0; each place has a bucket of its own where they are few.
    """
    if length <= EVEN + LOGARITHMIC:
        return np.arange(length)
    even = np.linspace(0, length, EVEN, endpoint=False)
    growing = np.geomspace(1, length, LOGARITHMIC, endpoint=False) - 1
    return np.unique(np.concatenate([even, growing]).astype(np.int64))


def extremes(values: Floats) -> Places:
    """Choose the points to draw of a curve: the lowest and the highest of each bucket, and the last.

    Args:
        values: (n,) float64, NaN where there is none; those are left out.

    Returns:
        (k,) places among the n, rising.
    """
    there = np.flatnonzero(np.isfinite(values))
    found = values[there]
    begins = borders(len(found))
    if len(begins) == len(found):
        return there
    bucket = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(found))))
    chosen = [np.array([len(found) - 1])]
    for of_bucket in (np.minimum, np.maximum):
        hits = np.flatnonzero(found == of_bucket.reduceat(found, begins)[bucket])
        chosen.append(hits[np.append(True, np.diff(bucket[hits]) > 0)])  # the first of each bucket
    return there[np.unique(np.concatenate(chosen))]


def smoothed(values: Floats) -> tuple[Places, Floats, int]:
    """Smooth a curve: the mean over a hundredth of its points, eleven at least, as many before a point as after it.

    At the ends the window is as narrow as the nearer end is close, so that a curve that falls is not bent there.

    Args:
        values: (n,) float64, NaN where there is none; those are left out.

    Returns:
        Places among the n, one for each bucket; the means there; the points of the widest window.
    """
    there = np.flatnonzero(np.isfinite(values))
    count = len(there)
    if not count:
        return there, np.empty(0), 0
    sums = np.concatenate([[0.0], np.cumsum(values[there])])
    begins = borders(count)
    at = np.append(begins, count - 1) if begins[-1] < count - 1 else begins
    reach = np.minimum(max(REACH, count // 200), np.minimum(at, count - 1 - at))
    means = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return there[at], means, int(2 * reach.max() + 1)
