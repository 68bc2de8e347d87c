"""`deepnarrow compare`: which settings of runs differ, where their losses part, how fast each is."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.text import Text

from launch.compare.curves import NEEDED, Losses, Parting, at_shares, longest, losses_of, part, share_to_reach, smooth
from launch.compare.picture import UNITS, draw
from launch.compare.settings import CODE, GROUPS, differing, layout_of
from launch.compare.terminal import COLORS, Line, plot
from launch.report.history import history_of
from launch.run_folder import MARKS, RunFolder, is_run
from launch.run_state import state_of
from launch.runs import PIPE_WIDTH, distinct_names, quantity
from launch.tables import WIDTH, of_numbers, rendered
from model.problems import BadInput
from train.strict_json import dumps

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Of what all runs have been through, where their losses are set side by side."""
_LONGEST = 60
"""Characters of a value that are shown; --json has all."""
_HEIGHT = 20
_SPEEDS = {
    "tokens_per_second": "tokens/s, median",
    "seconds": "seconds a step, median",
    "mfu": "MFU, median",
    "mfu_whole_attention": "MFU with whole attention, median",
    "bubble": "bubble, median",
    "grad_norm": "gradient norm, median",
}


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        folders: theirs.
        names: by which they are told apart.
        axis: of the curves: tokens, step or hours.
        differ, unknown: from `differing`.
        losses: of each.
        partings: of each but the first, against the first.
        places, at_places: where on the axis losses are set side by side, and those of each run.
        speeds: of each run, by the keys of `_SPEEDS`; ``hours`` of its steps; ``memory_gib``, the most of any stage.
    """

    folders: list[RunFolder]
    names: list[str]
    axis: str
    differ: dict[str, dict[str, list[Any]]]
    unknown: list[str]
    losses: list[Losses]
    partings: list[Parting]
    places: list[float]
    at_places: list[list[float]]
    speeds: list[dict[str, float | None]]


def run(options: argparse.Namespace) -> int:
    """Compare runs.

    Raises:
        BadInput: one is no run, is given twice, or the picture cannot be drawn.
    """
    paths = _paths(options.runs)
    found = compare(paths, options.x)
    if options.out:
        draw(found.names, found.losses, found.partings, found.axis, options.out)
    terminal = sys.stdout.isatty()
    if options.json:
        print(dumps(as_json(found), indent=2))
    elif terminal:
        console = Console(highlight=False)
        console.print(shown(found, console.width, colored=True))
    else:
        print(rendered(shown(found, WIDTH, colored=False), width=PIPE_WIDTH))
    if options.out:
        print(f"the curves are drawn in {options.out}", file=sys.stderr)
    return 0


def _paths(given: Sequence[Path]) -> list[Path]:
    """Return the run folders that are given.

    Raises:
        BadInput: one is none, or given twice, or there are too few or too many.
    """
    problems = []
    for path in given:
        if not path.exists():
            problems.append(f"{path}: no such folder; deepnarrow runs lists those that there are")
        elif not path.is_dir() or not is_run(path):
            inside = [child.name for child in sorted(path.iterdir()) if is_run(child)] if path.is_dir() else []
            works = " or ".join(str(path / name) for name in inside[:2]) or f"a folder with {', '.join(MARKS)}"
            problems.append(f"{path}: no run; {works} would work")
    real = [path.resolve() for path in given]
    problems += [f"{path}: given twice; another run would work" for path in {*given} if real.count(path.resolve()) > 1]
    if len(given) < 2:
        problems.append(f"{given[0]}: one run is compared with nothing; two or more would work")
    if len(given) > len(LETTERS):
        problems.append(f"{len(given)} runs: {len(LETTERS)} at most would work")
    if problems:
        raise BadInput(problems)
    return [*given]


def compare(paths: Sequence[Path], axis: str) -> Comparison:
    """Set runs side by side.

    Args:
        paths: their folders; the first is what the others are set against.
        axis: of the curves: tokens, step or hours.
    """
    folders = [RunFolder(path) for path in paths]
    names = distinct_names(paths)
    needed = tuple(dict.fromkeys((*NEEDED, *_SPEEDS)))
    histories = [history_of(folder.chunks(*needed)) for folder in folders]  # a step that stands twice counts once
    read = [{name: history[name,] for name in needed} for history in histories]
    losses = [losses_of(columns, axis) for columns in read]
    places, at_places = at_shares(losses, SHARES)
    differ, unknown = differing(folders)
    return Comparison(
        folders=folders,
        names=[names[path] for path in paths],
        axis=axis,
        differ=differ,
        unknown=unknown,
        losses=losses,
        partings=[part(one, losses[0]) for one in losses[1:]],
        places=places.tolist(),
        at_places=[values.tolist() for values in at_places],
        speeds=[_speeds(folder, columns) for folder, columns in zip(folders, read, strict=True)],
    )


def _speeds(folder: RunFolder, read: Mapping[str, NDArray[np.float64]]) -> dict[str, float | None]:
    """Take the medians of a run's figures of speed, the hours of its steps, and its memory."""
    found: dict[str, float | None] = {"hours": float(np.nansum(read["seconds"]) / 3600)}
    for key in _SPEEDS:
        there = read[key][np.isfinite(read[key])]
        found[key] = float(np.median(there)) if len(there) else None
    memory = [value for value in (folder.last or {}).get("memory_gib") or [] if isinstance(value, int | float)]
    return found | {"memory_gib": max(memory, default=None)}


def as_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values; numbers that are not finite are written as null."""
    runs = [
        {
            "letter": letter,
            "path": str(folder.path),
            "name": name,
            "state": str(state_of(folder)),
            "layout": folder.facts.get("layout"),
            "code": folder.facts.get("code"),
            "step": (folder.last or {}).get("step"),
            "tokens": (folder.last or {}).get("tokens"),
            "val_loss": folder.val_loss,
            "skipped": losses.left_out,
            "nonfinite": losses.nonfinite,
            "speeds": speeds,
            "losses": values,
            "faults": folder.faults,
        }
        for letter, folder, name, losses, speeds, values in zip(
            LETTERS, found.folders, found.names, found.losses, found.speeds, found.at_places, strict=False
        )
    ]
    against = [
        {
            "run": name,
            "paired": one.paired,
            "alike_until_step": one.alike_until,
            "parts_at": one.parts_at,
            "parts_at_step": one.parts_at_step,
            "end_difference": one.end,
            "end_error": one.end_error,
            "noise": one.noise,
            "windows": one.windows.tolist(),
            "difference": one.difference.tolist(),
            "error": one.error.tolist(),
        }
        for name, one in zip(found.names[1:], found.partings, strict=True)
    ]
    settings = {"differ": found.differ, "newer_than_some": found.unknown}
    return {"axis": found.axis, "runs": runs, "places": found.places, **settings, "against_first": against}


def shown(found: Comparison, width: int, colored: bool) -> RenderableType:
    """Show a comparison: which run is which, what differs, the figures side by side, where they part, the curves.

    Args:
        found: the comparison.
        width: characters of a line.
        colored: whether curves are told apart by colour, or else by letter.
    """
    parts: list[RenderableType] = [_heads(found, colored)]
    for group, settings in found.differ.items():
        table = of_numbers([GROUPS[group], *_letters(found)], range(len(found.names) + 1))
        for column in table.columns:
            column.no_wrap, column.overflow = False, "fold"
        for key, values in settings.items():
            table.add_row(key, *(_commit(value) if group == CODE else _short(value) for value in values))
        parts.append(table)
    parts.append(Text("\n".join(_alike(found))))
    parts.append(_figures(found))
    parts += [Text(line) for line in said(found)]
    return Group(*parts, *_plots(found, width, colored))


def _letters(found: Comparison) -> list[str]:
    return list(LETTERS[: len(found.names)])


def _heads(found: Comparison, colored: bool) -> Text:
    """Write a line for each run: its letter, name and state, what could not be read of it."""
    text = Text()
    for index, (letter, folder, name) in enumerate(zip(LETTERS, found.folders, found.names, strict=False)):
        state, layout = state_of(folder), layout_of(folder)
        why = f" ({state.why})" if state.why else ""
        text.append(f"{letter}  ", COLORS[index % len(COLORS)] if colored else "")
        text.append(f"{name}: {state}{why}{f', {layout}' if layout else ''}\n")
        text.append("".join(f"   {fault}\n" for fault in folder.faults))
    return text


def _alike(found: Comparison) -> list[str]:
    """Say which groups of settings are the same."""
    same = [called for group, called in GROUPS.items() if group not in found.differ]
    lines = [f"the same in all: {', '.join(same)}"] if same else []
    if found.unknown:
        count = "1 setting" if len(found.unknown) == 1 else f"{len(found.unknown):,} settings"
        lines.append(f"left out: {count} that some runs are too old for, and the others have by default (--json)")
    changed = [
        letter
        for letter, folder in zip(LETTERS, found.folders, strict=False)
        if str(folder.facts.get("code", "")).endswith("+changes")
    ]
    if changed and CODE not in found.differ:
        lines.append(
            f"the code of {', '.join(changed)} had changes that were not committed, and may differ all the same"
        )
    return lines


def _figures(found: Comparison) -> RenderableType:
    """Set losses at the same places, and speeds, side by side."""
    table = of_numbers(["", *_letters(found)], [0])
    unit = UNITS[found.axis]
    for row, (share, place) in enumerate(zip(SHARES, found.places, strict=True)):
        cells = [_number(values[row], ".4f") for values in found.at_places]
        table.add_row(f"loss at {quantity(place)} {unit} ({share:.0%} of what all have)", *cells)
    table.add_row("loss of the last twentieth of each", *(_number(_end(one), ".4f") for one in found.losses))
    table.add_row("validation loss, last", *(_number(folder.val_loss, ".4f") for folder in found.folders))
    steps = [(folder.last or {}).get("step") for folder in found.folders]
    table.add_row("steps", *(f"{step:,}" if isinstance(step, int) else "" for step in steps))
    table.add_row("tokens", *(quantity((folder.last or {}).get("tokens")) for folder in found.folders))
    table.add_row("hours of steps", *(_number(speeds["hours"], ".3g") for speeds in found.speeds))
    for key, called in {**_SPEEDS, "memory_gib": "memory of the fullest stage, GiB"}.items():
        values = [speeds[key] for speeds in found.speeds]
        if any(value is not None for value in values):
            form = ".1%" if key.startswith(("mfu", "bubble")) else ",.4g"
            table.add_row(called, *(_number(value, form) for value in values))
    if any(one.left_out for one in found.losses):
        table.add_row("skipped steps, left out above", *(f"{one.left_out:,}" for one in found.losses))
    if any(one.nonfinite for one in found.losses):
        table.add_row("losses that are not finite, left out", *(f"{one.nonfinite:,}" for one in found.losses))
    return table


def said(found: Comparison) -> list[str]:
    """Say of each run but the first where its losses part from the first one's, and by how much in the end."""
    lines = []
    first, unit = LETTERS[0], UNITS[found.axis]
    for index, parting in enumerate(found.partings, 1):
        letter = LETTERS[index]
        if parting.alike_until is None:
            begin = "steps have other numbers of tokens, and only averages compare"
        elif parting.alike_until == 0:
            begin = "losses differ from the first step on"
        else:
            begin = f"losses are the same to the last bit up to step {parting.alike_until:,}"
        lines.append(f"{letter} against {first}: {begin}")
        indent = " " * len(f"{letter} against {first}: ")
        if parting.end is None or parting.end_error is None:
            few = (
                "they have no loss in common"
                if parting.alike_until is None
                else "too few steps to tell noise from more"
            )
            lines.append(f"{indent}{few}")
            continue
        if parting.parts_at is None:
            lines.append(f"{indent}they do not part beyond their noise")
        else:
            lines.append(
                f"{indent}they part beyond their noise at {quantity(parting.parts_at)} {unit} "
                f"(step {parting.parts_at_step:,} of {letter})"
            )
        way = "above" if parting.end > 0 else "below"
        lines.append(
            f"{indent}in the end {letter} is {abs(parting.end):.4f} ± {parting.end_error:.4f} nats {way} {first}; "
            f"a single difference varies by {parting.noise:.4f}"
        )
        lower, higher = (index, 0) if parting.end < 0 else (0, index)
        clear = abs(parting.end) > 3 * parting.end_error
        share = share_to_reach(found.losses[lower], found.losses[higher]) if clear else None
        if share is not None:
            lines.append(
                f"{indent}{LETTERS[lower]} is as low as {LETTERS[higher]} in the end after {share:.0%} of {unit}"
            )
    return lines


def _plots(found: Comparison, width: int, colored: bool) -> list[RenderableType]:
    """Draw the losses, and below them the differences from the first run."""
    window = longest(found.losses) / max(10, min(width, 200))
    curves = [Line(LETTERS[index], *smooth(one, window), index) for index, one in enumerate(found.losses)]
    curves = [line for line in curves if len(line.x) > 1]
    if not curves:
        return [Text("no losses to draw")]
    top = max(float(line.y[len(line.y) // 20]) for line in curves)
    shown_from = [Line(line.letter, line.x, np.where(line.y <= top, line.y, np.nan), line.color) for line in curves]
    unit = UNITS[found.axis]
    pictures: list[RenderableType] = [
        Text(),
        plot(shown_from, width, _HEIGHT, colored, "loss, nats, averaged; from a twentieth on", unit),
    ]
    differences = [
        Line(LETTERS[index], parting.windows, parting.difference, index)
        for index, parting in enumerate(found.partings, 1)
        if len(parting.windows) > 1
    ]
    if differences:
        called = f"loss less that of {LETTERS[0]}, nats, averaged"
        pictures += [Text(), plot(differences, width, _HEIGHT // 2 + 2, colored, called, unit)]
    return pictures


def _end(losses: Losses) -> float | None:
    found = smooth(losses, longest([losses]) / 20)[1]
    return float(found[-1]) if len(found) else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:{form}}"


def _commit(code: str) -> str:
    """Shorten a commit to what tells it apart."""
    commit, plus, changes = code.partition("+")
    return commit[:12] + plus + changes


def _short(value: Any) -> str:
    """Write the value of a setting, cut where it is long."""
    text = "null" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
