"""Timelines of steps as SVG inside of the page: what each rank did, and what its schedule would have it do."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from parallel.schedules import Pass, Placement
from parallel.simulation import Span
from train.timeline import NAMES, MeasuredStep, read, schedule_name, written

SHOWN = 2
"""Timelines of a run that are drawn: the first that it has kept, and the last."""
MOST = 20_000
"""Passes of a picture; one of more would be megabytes, and is left to `deepnarrow timeline`."""
WIDTH, ROW, TEXT = 1000, 22, 54
"""Units of a picture: its width, the height of a rank's row, what stands before the rows."""


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
            measured = read(kept[step])
            passes = sum(map(len, measured.spans))
            drawing = figure(measured, name) if passes <= MOST else ""
        except (OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
            said.append(f"the timeline of step {step:,} cannot be read ({type(error).__name__}: {error})")
            continue
        if passes > MOST:
            said.append(
                f"the timeline of step {step:,} has {passes:,} passes; deepnarrow timeline --step {step} draws it"
            )
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
    paler = "; paler: a rank's later stages" if measured.placement.virtual > 1 else ""
    pictures = [
        (f"measured: bubble {measured.bubble:.1%}", measured.spans),
        (f"the same passes without waiting for messages: bubble {ideal.bubble:.1%}", ideal.spans),
    ]
    return (
        f"<figure><h3>{of}step {measured.step:,}, {escape(named)}, {measured.micro_batches} micro-batches</h3>"
        f"{_svg(pictures, measured.placement)}<figcaption>{key}{paler}; over a pass the pointer tells it</figcaption>"
        "</figure>"
    )


def _svg(pictures: Sequence[tuple[str, Sequence[Sequence[Span]]]], placement: Placement) -> str:
    end = max(span.end for _, rows in pictures for row in rows for span in row)
    scale = (WIDTH - TEXT) / end
    parts: list[str] = []
    top = 0
    for title, rows in pictures:
        parts.append(f'<text x="{TEXT}" y="{top + 14}">{escape(title)}</text>')
        top += 22
        for rank, row in enumerate(rows):
            parts.append(f'<text x="0" y="{top + 15}">rank {rank}</text>')
            stages = placement.stages_of(rank)
            parts += [_bar(span, stages.index(span.action.stage), top, scale) for span in row]
            top += ROW
        top += 8
    parts.append(_axis(end, scale, top))
    return f'<svg class="timeline" viewBox="0 0 {WIDTH} {top + 24}" role="img">{"".join(parts)}</svg>'


def _bar(span: Span, turn: int, top: float, scale: float) -> str:
    action, milliseconds = span.action, 1000 * (span.end - span.start)
    title = f"{NAMES[action.what]} of micro-batch {action.micro_batch}, stage {action.stage}: {milliseconds:.4g} ms"
    later = " later" if turn else ""
    width = max(0.3, scale * (span.end - span.start) - 0.5)  # half a unit lies between passes
    return (
        f'<rect class="{action.what.name}{later}" x="{TEXT + scale * span.start:.2f}" y="{top + 2}" '
        f'width="{width:.2f}" height="{ROW - 4}"><title>{title}</title></rect>'
    )


def _axis(end: float, scale: float, top: float) -> str:
    """Draw the axis below, in milliseconds, with a mark at each round number of them."""
    step = next(
        unit * 10.0**power for power in range(-3, 9) for unit in (1, 2, 5) if 1000 * end / (unit * 10**power) < 9
    )
    marks = [f'<line x1="{TEXT}" x2="{WIDTH}" y1="{top}" y2="{top}"/>']
    at = 0.0
    while at <= 1000 * end:
        x = TEXT + scale * at / 1000
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + 4}"/>')
        anchor = "start" if not at else "middle" if x < WIDTH - 30 else "end"
        marks.append(f'<text x="{x:.1f}" y="{top + 17}" text-anchor="{anchor}">{at:g}{" ms" if not at else ""}</text>')
        at += step
    return "".join(marks)
