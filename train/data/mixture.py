"""Mixtures of corpora: which source the n-th sample of a run comes from, and the how many-th of that source it is.

Both are pure functions of n. A mixture repeats a period of P samples, in which source k stands p_k times; its order is
that of R. Tijdeman, "The chairman assignment problem" (Discrete Mathematics 32, 1980): of the sources that are behind
their share by 1/(2K - 2) or more, the next sample is of the one that would first be too far behind. With K sources, the
samples of source k among the first n are then never further from n p_k / P than 1 - 1/(2K - 2), less than one sequence.
"""

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.data.order import counted

LONGEST_PERIOD = 1_000_000
"""Samples. Weights whose exact shares have a longer one are rounded to parts of so many."""


class Mixture:
    """A mixture of sources, by weights.

    Args:
        weights: of each source, finite, not negative, and not all zero; they need not sum to 1. Each is taken as the
            decimal number that it is written as.

    Raises:
        ValueError: the weights are not so.
    """

    def __init__(self, weights: Mapping[str, float]):
        if any(not 0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"weights={dict(weights)}: must be finite, not negative and not all zero")
        exact = {name: Fraction(repr(float(weights[name]))) for name in sorted(weights) if weights[name]}
        total = sum(exact.values())
        self.names = tuple(exact)
        """The sources that have a share, in the order of the alphabet."""
        self.shares = {name: weight / total for name, weight in exact.items()}
        """The exact share of each, by its weight."""
        period = math.lcm(*(share.denominator for share in self.shares.values()))
        self.rounded = period > LONGEST_PERIOD
        """Whether the parts stand for shares that had to be rounded."""
        self.parts = np.array(
            _rounded([*self.shares.values()]) if self.rounded else [int(s * period) for s in self.shares.values()],
            dtype=np.int64,
        )
        """(K,) samples of each source in a period."""
        self.period = int(self.parts.sum())
        """Samples after which the order of sources repeats."""

    def take(self, indices: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look up samples.

        Args:
            indices: numbers of samples, integers of any shape, from 0 up to 2**62.

        Returns:
            The source of each, as an index of `names`, and how many samples of that source come before it; int64 of the
            same shape.

        Raises:
            ValueError: an index is negative.
        """
        wanted = counted(indices)
        periods, slots = np.divmod(wanted, np.int64(self.period))
        sources = self._layout[slots].astype(np.int64)
        return sources, periods * self.parts[sources] + self._before[slots]

    def counts(self, samples: int) -> NDArray[np.int64]:
        """Count the samples of each source among the first so many: int64 (K,), in the order of `names`."""
        periods, rest = divmod(samples, self.period)
        return periods * self.parts + np.bincount(self._layout[:rest], minlength=len(self.names))

    def index_of(self, source: int, position: int) -> int:
        """Return the number of the sample that is source's `position`-th, counted from 0."""
        periods, rest = divmod(position, int(self.parts[source]))
        return periods * self.period + int(np.flatnonzero(self._layout == source)[rest])

    def rounding(self) -> str | None:
        """Say which shares had to be rounded, in a clause; None where all are exact."""
        if not self.rounded:
            return None
        pairs = zip(self.parts.tolist(), self.shares.values(), strict=True)
        off = max(abs(float(Fraction(part, self.period) - share)) for part, share in pairs)
        return f"shares are rounded to millionths, by at most {off:.1g}"

    @cached_property
    def _layout(self) -> NDArray[np.int16]:
        """The sources of a period, (period,)."""
        return _lay_out(tuple(self.parts.tolist()))

    @cached_property
    def _before(self) -> NDArray[np.int64]:
        """How often the source of each slot of a period has stood in it before, (period,)."""
        before = np.empty(self.period, np.int64)
        for source, part in enumerate(self.parts):
            before[self._layout == source] = np.arange(part)
        return before


def _rounded(shares: list[Fraction]) -> list[int]:
    """Round shares to parts of `LONGEST_PERIOD`, by largest remainders; a share that is not zero keeps one part."""
    exact = [share * LONGEST_PERIOD for share in shares]
    parts = [max(1, math.floor(part)) for part in exact]
    order = sorted(range(len(parts)), key=lambda k: parts[k] - exact[k])
    for k in order[: max(0, LONGEST_PERIOD - sum(parts))]:
        parts[k] += 1
    parts[max(range(len(parts)), key=parts.__getitem__)] -= sum(parts) - LONGEST_PERIOD  # what the least ones took
    return parts


@lru_cache(maxsize=16)  # a second or two for a period of a million, and a run asks for its mixtures in several places
def _lay_out(of_sources: tuple[int, ...]) -> NDArray[np.int16]:
    """Lay out one period: each sample in the slots from its release to its deadline, the earliest deadline first."""
    parts = np.array(of_sources, dtype=np.int64)
    period, m = int(parts.sum()), max(1, 2 * len(parts) - 2)
    sources = np.repeat(np.arange(len(parts)), parts)
    place = np.concatenate([np.arange(part) for part in parts])
    each = m * parts[sources]
    releases = -(-(place * m + 1) * period // each) - 1
    deadlines = (place * m + m - 1) * period // each
    # Ties go to the source that comes first, and within a source to the earlier sample.
    ranks = np.empty(period, np.int64)
    ranks[np.lexsort((place, sources, deadlines))] = np.arange(period)
    owner = np.empty(period, np.int16)
    owner[ranks] = sources
    by_release = np.argsort(releases, kind="stable")
    released = np.searchsorted(releases[by_release], np.arange(period), side="right").tolist()
    waiting: list[int] = []
    chosen, pushed, order = [], 0, ranks[by_release].tolist()
    for until in released:
        for rank in order[pushed:until]:
            heapq.heappush(waiting, rank)
        pushed = until
        chosen.append(heapq.heappop(waiting))
    return owner[np.array(chosen)]
