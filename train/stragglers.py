"""Stragglers: ranks whose passes take longer than those of the ranks that compute the same, or than they once did.

A rank times its passes in any case. Once in so many steps it hands the others the median of what they took, in the
report that ranks merge after each step, and so all know who is slow; no message is sent for it alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

from parallel.layout import Layout
from parallel.simulation import Span

EVERY_SECONDS = 600.0
"""Seconds between two warnings about the same ranks."""
NAMED = 4
"""The most ranks that a warning names."""


@dataclass(frozen=True)
class Slow:
    """A rank that is slow.

    Attributes:
        rank: of all ranks.
        seconds: that its passes take in a step, the median.
        against: the seconds that they are compared with.
    """

    rank: int
    seconds: float
    against: float

    @property
    def ratio(self) -> float:
        """How many times as long its passes take."""
        return self.seconds / self.against


class Stragglers:
    """Measures this rank's passes, and tells from those of all ranks which are slow.

    Args:
        layout: the rank grid.
        rank: of this process.
        percent: by how much a rank is slower than its like to be slow (`train.straggler_percent`); None measures
            nothing.
        steps: whose median is compared (`train.straggler_steps`).
        hosts: of all ranks; empty where this rank says nothing.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        percent: float | None,
        steps: int,
        hosts: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._layout, self._rank, self._percent, self._steps = layout, rank, percent, steps
        self._hosts, self._clock = hosts, clock
        self._kind: Any = None
        self._busy: list[float] = []
        self._fastest: list[float] = []
        self._told: tuple[int, ...] = ()
        self._told_at = -float("inf")

    def measured(self, spans: Sequence[Span], kind: Any) -> list[float]:
        """Add the passes of a step, and return what this rank hands to the others after it.

        Args:
            spans: of the passes.
            kind: of the step; those of another kind take another time, and begin a new measurement.

        Returns:
            Seconds by rank, zero but at this rank's place, each time that enough steps are measured; else nothing. That
            is so after the same steps on every rank.
        """
        if self._percent is None or self._layout.world_size == 1:  # nobody waits for it
            return []
        if kind != self._kind:
            self._kind, self._busy, self._fastest = kind, [], []
        self._busy.append(typical_seconds(spans))
        if len(self._busy) < self._steps:
            return []
        seconds, self._busy = median(self._busy), []
        return [seconds if rank == self._rank else 0.0 for rank in range(self._layout.world_size)]

    def slow(self, seconds: Sequence[float]) -> list[Slow]:
        """Return the ranks that are slow, the slowest first; it is called once for each measurement.

        With several replicas a rank is compared with the median of the ranks of its stage, the lower of two in the
        middle; with one, with the fastest that it has been in this run on steps of this kind.

        Args:
            seconds: of each rank, from `measured` over all of them.
        """
        layout, found = self._layout, []
        if layout.dp > 1:
            of_stage: dict[int, list[float]] = {}
            for rank, one in enumerate(seconds):
                of_stage.setdefault(layout.stage(rank), []).append(one)
            middle = {stage: median_low(each) for stage, each in of_stage.items()}
            against = [middle[layout.stage(rank)] for rank in range(layout.world_size)]
        else:
            self._fastest = [min(pair) for pair in zip(self._fastest or seconds, seconds, strict=True)]
            against = self._fastest
        assert self._percent is not None
        for rank, (own, other) in enumerate(zip(seconds, against, strict=True)):
            if other > 0 and own > other * (1 + self._percent / 100):
                found.append(Slow(rank, own, other))
        return sorted(found, key=lambda one: -one.ratio)

    def said(self, slow: Sequence[Slow]) -> str | None:
        """Say who is slow: at once where that is new, and every ten minutes while it goes on; also when it is over."""
        ranks, now = tuple(sorted(one.rank for one in slow)), self._clock()
        if ranks == self._told and (not ranks or now - self._told_at < EVERY_SECONDS):
            return None
        self._told, self._told_at = ranks, now
        if not slow:
            return "no rank is slow any more"
        alike = self._layout.dp * self._layout.tp
        whom = f"the median of the {alike} ranks of its stage" if self._layout.dp > 1 else "the fastest that it was"
        each = [
            f"rank {one.rank} ({self._hosts[one.rank]}, stage {self._layout.stage(one.rank)}) takes "
            f"{one.ratio - 1:.0%} longer than {whom} ({one.seconds:.3g} s a step against {one.against:.3g} s)"
            for one in slow[:NAMED]
        ]
        more = f"; {len(slow) - NAMED:,} more ranks are slow" if len(slow) > NAMED else ""
        return f"slow over the last {self._steps} steps: {'; '.join(each)}{more}"


def typical_seconds(spans: Sequence[Span]) -> float:
    """Sum the seconds of a step's passes, of each kind and stage the median for every one of them.

    The first pass of a step waits for weights that other ranks have moved, and a hiccup is none of the rank's speed.
    """
    seconds: dict[Any, list[float]] = {}
    for span in spans:
        seconds.setdefault((span.action.what, span.action.stage), []).append(span.end - span.start)
    return sum(median(each) * len(each) for each in seconds.values())
