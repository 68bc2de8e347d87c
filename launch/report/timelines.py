"""Timelines of steps as SVG inside of the page: what each rank did, and what its schedule would have it do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from parallel.schedules import Pass, Placement
from parallel.simulation import Span
from train.excerpts import excerpts
from train.timeline import MeasuredStep, read, schedule_name, written
from train.timeline_picture import NAMES, said_of

SHOWN = 2
"""Timelines of a run that are drawn: the first that it has kept, and the last."""
MOST = 20_000
"""Bars of a picture; one of more would be megabytes, and is left to `deepnarrow timeline`."""
WIDTH, ROW, TEXT, GAP = 1000, 22, 54, 16
"""Units of a picture: its width, the height of a rank's row, what stands before the rows, what lies between how a step
begins and how it ends."""


def figures(run_dir: Path, name: str) -> tuple[list[str], list[str]]:
    """Draw the timelines of a run.

    Args:
        run_dir: the run folder.
        name: of the run, for the titles; empty where there is one run alone.

    Returns:
        Each as a figure of HTML; and sentences on those that are not drawn.
    """
    kept = written(run_dir)
    drawn, said = [], []
    shown = sorted({*list(kept)[: SHOWN - 1], *list(kept)[-1:]})
    for step in shown:
        try:
            drawing = figure(read(kept[step]), name)
        except (OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
            said.append(f"the timeline of step {step:,} cannot be read ({type(error).__name__}: {error})")
            continue
        bars = drawing.count("<rect")
        if bars > MOST:
            said.append(f"the timeline of step {step:,} has {bars:,} bars; deepnarrow timeline --step {step} draws it")
            continue
        drawn.append(drawing)
    if others := [f"{step:,}" for step in kept if step not in shown]:
        said.append(f"timelines of steps {', '.join(others)} are kept as well; deepnarrow timeline --step draws each")
    return drawn, said


def figure(measured: MeasuredStep, name: str) -> str:
    """Draw a step, measured above and as it would be without waiting below, as a figure of HTML."""
    ideal = measured.ideal()
    named = schedule_name(measured.schedule, measured.placement)
    of = f"{escape(name)}: " if name else ""
    found = {span.action.what for rank in measured.spans for span in rank}
    key = "".join(f'<i class="key {what.name}"></i>{NAMES[what]}' for what in Pass if what in found)
    pictures = [
        (f"measured: bubble {measured.bubble:.1%}", measured.spans),
        (f"the same passes without waiting for messages: bubble {ideal.bubble:.1%}", ideal.spans),
    ]
    return (
        f"<figure><h3>{of}step {measured.step:,}, {escape(named)}, {measured.micro_batches:,} micro-batches</h3>"
        f"{_svg(pictures, measured.placement)}<figcaption>{key}{said_of(measured.placement)}; over a pass the pointer "
        "tells it</figcaption></figure>"
    )


def _svg(pictures: Sequence[tuple[str, Sequence[Sequence[Span]]]], placement: Placement) -> str:
    chosen = excerpts([rows for _, rows in pictures])
    lengths = [end - start for start, end in chosen[0].stretches]
    scale = (WIDTH - TEXT - GAP * (len(lengths) - 1)) / sum(lengths)
    stages = [placement.stages_of(rank) for rank in range(placement.num_ranks)]
    parts: list[str] = []
    top = 0
    for at, ((title, rows), excerpt) in enumerate(zip(pictures, chosen, strict=True)):
        parts.append(f'<text x="{TEXT}" y="{top + 14}">{escape(title)}</text>')
        if excerpt.left_out:
            said = excerpt.left_out.said(1000, "ms")
            parts.append(f'<text x="{WIDTH}" y="{top + 14}" text-anchor="end">{said}</text>')
        top += 22
        parts += [f'<text x="0" y="{top + ROW * rank + 15}">rank {rank}</text>' for rank in range(placement.num_ranks)]
        below = top + ROW * placement.num_ranks
        left = float(TEXT)
        for start, end in excerpt.stretches:
            stretch, hair = _Stretch(start, end, left, scale), 1e-6 * (end - start)  # rounding shows no pass
            for rank, row in enumerate(rows):
                shown = [span for span in row if span.end > start + hair and span.start < end - hair]
                parts += [
                    _bar(span, stages[rank].index(span.action.stage), placement, top + ROW * rank, stretch)
                    for span in shown
                ]
            if excerpt.left_out or at == len(pictures) - 1:
                parts.append(_axis(stretch, below + 8))
            left = stretch.x(end) + GAP
        if excerpt.left_out:
            middle = stretch.x(start) - GAP / 2
            parts.append(f'<line class="break" x1="{middle:.1f}" x2="{middle:.1f}" y1="{top}" y2="{below + 8}"/>')
        top = below + (32 if excerpt.left_out else 8)
    top += 0 if chosen[0].left_out else 24
    return f'<svg class="timeline" viewBox="0 0 {WIDTH} {top}" role="img">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Stretch:
    """A stretch of time, in seconds, of which the start is drawn at left; units of the picture a second."""

    start: float
    end: float
    left: float
    scale: float

    def x(self, seconds: float) -> float:
        return self.left + self.scale * (min(max(seconds, self.start), self.end) - self.start)


def _bar(span: Span, turn: int, placement: Placement, top: float, stretch: _Stretch) -> str:
    action, milliseconds = span.action, 1000 * (span.end - span.start)
    title = f"{NAMES[action.what]} of micro-batch {action.micro_batch}, stage {action.stage}: {milliseconds:.4g} ms"
    later = " later" if turn else ""
    lower = 6 * turn / max(1, placement.virtual - 1)
    left, right = stretch.x(span.start), stretch.x(span.end)
    width = max(0.3, right - left - (0.5 if right - left > 3 else 0.0))  # half a unit lies between passes
    return (
        f'<rect class="{action.what.name}{later}" x="{left:.2f}" y="{top + 2 + lower:g}" width="{width:.2f}" '
        f'height="{ROW - 4 - lower:g}"><title>{title}</title></rect>'
    )


def _axis(stretch: _Stretch, top: float) -> str:
    """Draw the axis below a stretch, in milliseconds, with a mark at each round number of them."""
    start, end, left = 1000 * stretch.start, 1000 * stretch.end, stretch.left
    right = stretch.x(stretch.end)
    most = 9 * (right - left) / (WIDTH - TEXT)
    step = next(
        unit * 10.0**power for power in range(-3, 9) for unit in (1, 2, 5) if (end - start) / (unit * 10**power) < most
    )
    marks = [f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{top}" y2="{top}"/>']
    for number in range(math.ceil(start / step), math.floor(end / step) + 1):
        x, said = stretch.x(number * step / 1000), f"{number * step:,.10g}"
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + 4}"/>')
        anchor = "start" if x < left + 15 else "middle" if x < right - 30 else "end"
        unit = "" if number else " ms"
        marks.append(f'<text x="{x:.1f}" y="{top + 17}" text-anchor="{anchor}">{said}{unit}</text>')
    return "".join(marks)
