"""Excerpts of steps that have more passes than a picture has room for: how they begin and how they end.

Between the two a pipeline does the same over and over: each rank a forward and a backward pass by turns. With 1,152
micro-batches that is nearly the whole step, and of a picture of it nothing could be seen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parallel.simulation import Span

LEGIBLE = 300
"""Passes of a rank that are told apart beside each other in a picture of usual width."""


@dataclass(frozen=True)
class LeftOut:
    """What lies between the beginning and the end of a step.

    Attributes:
        length: of it, in the unit of the spans.
        share: of the whole step's length.
        micro_batches: those of which no pass, on any rank, is in the excerpt.
        waiting: the share of it in which ranks wait, averaged over the ranks.
    """

    length: float
    share: float
    micro_batches: int
    waiting: float

    def said(self, scale: float, unit: str) -> str:
        """Say it in a line.

        Args:
            scale: from the spans' unit to the one that is said.
            unit: that one.
        """
        length = scale * self.length
        digits = 0 if length >= 100 else 1
        return (
            f"left out: {length:,.{digits}f} {unit}, {self.share:.1%} of the step, with {self.micro_batches:,} whole "
            f"micro-batches; ranks wait {self.waiting:.1%} of it"
        )


@dataclass(frozen=True)
class Excerpt:
    """What is drawn of a step.

    Attributes:
        stretches: the start and the end of each, in the unit of the spans: of the whole step, or of its beginning and
            of its end.
        left_out: what lies between; None where nothing does.
    """

    stretches: list[tuple[float, float]]
    left_out: LeftOut | None = None


def excerpts(pictures: Sequence[Sequence[Sequence[Span]]], legible: int = LEGIBLE) -> list[Excerpt]:
    """Choose what is drawn of steps under each other: all of them, or the first and the last 2 p micro-batches.

    With p ranks and m micro-batches, counted from 0, a beginning lasts until the first pass of micro-batch 2 p, and an
    end is what comes after the last pass of micro-batch m - 2 p - 1: there the pipeline fills, and runs empty.
    Beginnings are equally long in all pictures, and so are ends.

    Args:
        pictures: of each step the spans of each rank, the same passes in all.
        legible: the passes of a rank up to which the whole is drawn.
    """
    ends = [max(row[-1].end for row in rows) for rows in pictures]
    edge, micro_batches = 2 * len(pictures[0]), 1 + max(span.action.micro_batch for row in pictures[0] for span in row)
    if max(len(row) for rows in pictures for row in rows) > legible and micro_batches > 2 * edge:
        first = max(min(s.start for s in _all(rows) if s.action.micro_batch >= edge) for rows in pictures)
        last = max(
            end - max(s.end for s in _all(rows) if s.action.micro_batch < micro_batches - edge)
            for rows, end in zip(pictures, ends, strict=True)
        )
        if first + last < min(ends):
            return [
                Excerpt([(0.0, first), (end - last, end)], _between(rows, first, end - last, end))
                for rows, end in zip(pictures, ends, strict=True)
            ]
    return [Excerpt([(0.0, max(ends))]) for _ in pictures]


def _all(rows: Sequence[Sequence[Span]]) -> Iterable[Span]:
    return (span for row in rows for span in row)


def _between(rows: Sequence[Sequence[Span]], start: float, stop: float, end: float) -> LeftOut:
    busy, shown, found = 0.0, set(), set()
    for span in _all(rows):
        busy += max(0.0, min(span.end, stop) - max(span.start, start))
        found.add(span.action.micro_batch)
        if span.start < start or span.end > stop:
            shown.add(span.action.micro_batch)
    length = stop - start
    return LeftOut(length, length / end, len(found - shown), 1 - busy / length / len(rows))
