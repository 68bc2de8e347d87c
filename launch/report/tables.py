"""The tables of the report, as HTML: the runs side by side, their settings, what befell them, what they wrote."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from launch.report.facts import Row, differences, notes, rows, setting
from launch.report.plots import ShownRun
from launch.run_folder import shown_settings
from train.records import SAMPLES, records

MOST = 200
"""Lines of a table of events, skipped steps or samples: the last ones."""


def heads(runs: Sequence[ShownRun]) -> str:
    """Make the table at the head of the page, a column for each run."""
    return _by_run(runs, rows(runs), "")


def settings(runs: Sequence[ShownRun]) -> str:
    """Make the table of the settings that differ, and of each run all of them, folded away."""
    known = [run for run in runs if run.folder.config]
    parts = []
    if len(runs) > 1:
        found = differences(runs)
        parts.append(_by_run(runs, found, "setting") if found else "<p>All settings of these runs are the same.</p>")
    for index, run in enumerate(runs):
        if run in known:
            lines = "\n".join(f"{key}={setting(value)}" for key, value in shown_settings(run.folder.config).items())
            parts.append(_folded(f"all settings of {run.name}", f"<pre>{escape(lines)}</pre>", index))
    return "".join(parts)


def events(runs: Sequence[ShownRun]) -> str:
    """Make the table of failures, restarts and whatever else the runs' events tell, in the order of their time."""
    found = [
        (str(event.get("time", "")), index, event) for index, run in enumerate(runs) for event in run.folder.events
    ]
    found.sort(key=lambda one: one[0])
    lines = []
    for time, index, event in found[-MOST:]:
        rest = {key: value for key, value in event.items() if key not in ("time", "event") and value not in (None, "")}
        lines.append((index, [time, _mark(runs, index), _text(event.get("event", "")), _text(rest)]))
    return _table(["time", "run", "event", "what"], lines, len(found)) if lines else ""


def skipped(runs: Sequence[ShownRun]) -> str:
    """Make the table of the steps whose updates were skipped."""
    keys = ("step", "why", "loss", "grad_norm", "samples")
    steps = [
        (step if isinstance(step := one.get("step"), int) else -1, index, one)
        for index, run in enumerate(runs)
        for one in run.folder.skipped
    ]
    steps.sort(key=lambda line: line[0])
    found = [(index, [_mark(runs, index), *(_text(one.get(key)) for key in keys)]) for _, index, one in steps]
    headings = ["run", "step", "why", "loss", "gradient norm", "samples of the order"]
    return _table(headings, found[-MOST:], len(found)) if found else ""


def samples(runs: Sequence[ShownRun]) -> str:
    """Make the table of the texts that were drawn from the models, the latest first."""
    lines = []
    for index, run in enumerate(runs):
        for one in records(run.folder.path / SAMPLES):
            if isinstance(one, dict):
                step = one.get("step")
                texts = [f"<pre>{_text(one.get(key))}</pre>" for key in ("prompt", "text")]
                lines.append((step if isinstance(step, int) else -1, index, [_mark(runs, index), _text(step), *texts]))
    lines.sort(key=lambda line: line[0], reverse=True)
    found = [(index, cells) for _, index, cells in lines]
    return _table(["run", "step", "prompt", "text"], found[:MOST], len(found)) if found else ""


def missing(runs: Sequence[ShownRun], absent: Iterable[str], said: Iterable[str]) -> str:
    """Make the lists of what is damaged, missing or not drawn.

    Args:
        runs: of the report.
        absent: panels that no run has records for.
        said: further sentences.
    """
    lines = [
        f'<li data-of-run="{index}">{_mark(runs, index)}: {escape(note)}</li>'
        for index, run in enumerate(runs)
        for note in notes(run)
    ]
    lines += [f"<li>{escape(one)}</li>" for one in said]
    warning = f'<div class="card warn wide"><ul>{"".join(lines)}</ul></div>' if lines else ""
    listed = "; ".join(escape(one) for one in absent)
    return warning + (
        f'<p class="pale">Not drawn, since no run here has records of it: {listed}.</p>' if listed else ""
    )


def _by_run(runs: Sequence[ShownRun], found: Sequence[Row], corner: str) -> str:
    """Make a table with a column for each run, which goes away with the run."""
    head = "".join(f'<th data-of-run="{index}">{_mark(runs, index)}</th>' for index in range(len(runs)))
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td data-of-run="{index}">{escape(one)}</td>' for index, one in enumerate(said))
        + "</tr>"
        for name, said in found
    )
    return (
        f'<div class="card wide scroll"><table><thead><tr><th>{corner}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _table(headings: Sequence[str], lines: Sequence[tuple[int, Sequence[str]]], total: int) -> str:
    """Make a table with a line for each of a run's things; cells are HTML.

    Args:
        headings: of the columns.
        lines: of each, the number of its run and its cells.
        total: lines that there are; those that are left out are told.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    body = "".join(
        f'<tr data-of-run="{index}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for index, cells in lines
    )
    left = f'<p class="pale">{len(lines):,} of {total:,} are shown.</p>' if total > len(lines) else ""
    inner = f'<table class="lines"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{left}'
    return f'<div class="card wide scroll">{inner}</div>'


def _mark(runs: Sequence[ShownRun], index: int) -> str:
    return f'<span class="mark" data-color="{index}">{escape(runs[index].name)}</span>'


def _folded(title: str, inner: str, index: int) -> str:
    return f'<details data-of-run="{index}"><summary>{escape(title)}</summary>{inner}</details>'


def _text(value: Any) -> str:
    """Write a value of a record for people: a mapping as its keys and values, no braces and quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{escape(str(key))} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_text(inner) for inner in value) if not _is_stretch(value) else f"{value[0]:,} to {value[1]:,}"
    if isinstance(value, float):
        return f"{value:,.5g}"
    return "" if value is None else escape(str(value))


def _is_stretch(value: list[Any]) -> bool:
    return len(value) == 2 and all(isinstance(one, int) for one in value)
