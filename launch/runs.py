"""Run folders, listed: how each run is, how far it has come, how fast, and what it can go on from (`deepnarrow runs`).

Of a run with a million steps no more than the last records are read, and checkpoints are not opened: thousands of runs
on a network disk are a matter of seconds.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from launch.run_folder import RunFolder, found_below
from launch.run_state import ACTIVE, Condition, State, age, seconds_of, state_of
from launch.tables import of_numbers, rendered
from model.problems import BadInput
from train.log_lines import as_duration
from train.strict_json import dumps

RUNS = Path("runs")
READERS = 32
"""Folders that are read at a time: a network disk answers each after milliseconds."""
PIPE_WIDTH = 10_000
"""Characters of a line that no terminal breaks."""
_GAP = 2
_FEWEST = 10
"""Steps since a checkpoint by which a pace is told."""
_STYLES = {
    Condition.RUNNING: "green",
    Condition.STARTING: "green",
    Condition.RESTARTING: "yellow",
    Condition.COMPLETE: "",
    Condition.STOPPED: "cyan",
    Condition.DIVERGED: "red",
    Condition.FAILED: "red",
    Condition.SILENT: "yellow",
    Condition.NEVER: "dim",
}


@dataclass(frozen=True)
class Listed:
    """A run as it is listed; what is not known is None.

    Attributes:
        path: the folder.
        name: its last part, or where there are several such, as much of the path as tells them apart.
        state: how it is.
        step, steps: the last step that was taken, and the whole length.
        tokens, whole_tokens: trained on so far, and in all.
        loss: of the last step, in nats; NaN where it was not finite.
        val_loss: as last measured, in nats.
        tokens_per_second: over the last records; of a run that has ended over all of its last start.
        mfu: model FLOPs utilisation over the last records, causal attention halved.
        seconds_left: at the pace of late, validations and saves included.
        checkpoint: the step of the newest one that can be resumed from.
        checkpoint_age: seconds since it was written.
        restarts: how often the run was started again after a failure.
        changed: when its records were last written to, in seconds since 1970.
        wandb: where W&B has it.
        faults: what of its folder could not be read.
    """

    path: Path
    name: str
    state: State
    step: int | None
    steps: int | None
    tokens: float | None
    whole_tokens: float | None
    loss: float | None
    val_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    seconds_left: float | None
    checkpoint: int | None
    checkpoint_age: float | None
    restarts: int
    changed: float | None
    wandb: dict[str, Any]
    faults: list[str]


def run(options: argparse.Namespace) -> int:
    """List the runs of folders, once or again and again.

    Raises:
        BadInput: a folder is not there, or what is to be watched is no terminal.
    """
    given: list[Path] = options.folders or [RUNS]
    missing = [
        f"{folder}: no such folder{_instead(folder, options.folders)}" for folder in given if not folder.is_dir()
    ]
    if options.watch is not None and options.watch <= 0:
        missing.append(f"--watch={options.watch:g}: no time above 0; --watch=5 would work")
    if options.watch and not sys.stdout.isatty():
        missing.append("--watch: the output is no terminal; watch -n 5 deepnarrow runs, or a terminal, would work")
    if missing:
        raise BadInput(missing)
    if options.watch:
        return _watch(given, options.watch)
    listed = list_runs(given)
    if options.json:
        print(dumps([as_json(one) for one in listed], indent=2))
    elif sys.stdout.isatty():
        Console(highlight=False).print(shown(listed, given, Console().width))
    else:
        print(rendered(shown(listed, given, PIPE_WIDTH), width=PIPE_WIDTH))
    return 0


def list_runs(folders: Sequence[Path], now: float | None = None) -> list[Listed]:
    """List all runs in folders: those that have ended first, then what is under way, each in the order of its changes.

    Args:
        folders: in which, at any depth, run folders are; or run folders themselves.
        now: seconds since 1970; the present by default.
    """
    at = time.time() if now is None else now
    paths = found_below(folders)
    names = distinct_names(paths)
    with ThreadPoolExecutor(READERS) as pool:
        listed = list(pool.map(lambda path: _listed(path, names[path], at), paths))
    return sorted(listed, key=lambda one: (one.state.condition in ACTIVE, one.changed or 0.0, one.name))


def distinct_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Name each path by its last part; those that share it by as many parts as tell them all apart."""
    names = {path: path.absolute().name for path in paths}
    count = 2
    while twice := {name for name, times in Counter(names.values()).items() if times > 1}:
        changed = {path: "/".join(path.absolute().parts[-count:]) for path, name in names.items() if name in twice}
        if all(names[path] == name for path, name in changed.items()):
            break  # one folder, given twice
        names |= changed
        count += 1
    return names


def as_json(one: Listed) -> dict[str, Any]:
    """Return a run as plain values; a number that is not finite is written as null."""
    found = asdict(one)
    state = {"state": one.state.condition.value, "why": one.state.why, "certain": one.state.certain}
    return {"path": str(one.path), "name": one.name, **state, **{key: found[key] for key in found if key not in _WORDS}}


_WORDS = ("path", "name", "state")


def _listed(path: Path, name: str, now: float) -> Listed:
    folder = RunFolder(path)
    last, summary, facts = folder.last or {}, folder.summary, folder.started
    sound = next((one for one in folder.checkpoints if not one.kind), None)
    state = state_of(folder, now)
    tokens, whole = _number(last.get("tokens")), _number(facts.get("tokens"))
    steps = _whole(facts.get("steps"))
    if steps is None and summary.get("complete"):
        steps = _whole(summary.get("steps"))
    active = state.condition in ACTIVE
    ended_speed = None if active else _number(summary.get("tokens_per_second"))
    return Listed(
        path=path,
        name=name,
        state=state,
        step=_whole(last.get("step")),
        steps=steps,
        tokens=tokens,
        whole_tokens=whole,
        loss=_number(last.get("loss")),
        val_loss=folder.val_loss,
        tokens_per_second=ended_speed or _mean(folder, "tokens_per_second"),
        mfu=_mean(folder, "mfu"),
        seconds_left=_seconds_left(folder, tokens, whole) if active else None,
        checkpoint=sound.step if sound else None,
        checkpoint_age=now - sound.written if sound else None,
        restarts=sum("restart_in_seconds" in event for event in folder.events),
        changed=folder.changed or folder.modified(""),
        wandb=folder.wandb,
        faults=folder.faults,
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _mean(folder: RunFolder, key: str) -> float | None:
    """Average a figure over the last records, by the seconds that their steps took."""
    of = [(one[key], one["seconds"]) for one in folder.tail if _number(one.get(key)) and _number(one.get("seconds"))]
    seconds = sum(took for _, took in of)
    return sum(value * took for value, took in of) / seconds if seconds else None


def _seconds_left(folder: RunFolder, tokens: float | None, whole: float | None) -> float | None:
    """Extrapolate the pace since a checkpoint of this start, validations and saves included, or else of the steps."""
    last, changed = folder.last, folder.changed
    if tokens is None or whole is None or last is None or changed is None:
        return None
    steps = [one for one in folder.tail if all(_number(one.get(key)) for key in ("step", "seconds", "tokens"))]
    if len(steps) < 2 or steps[-1]["step"] <= steps[0]["step"] or steps[-1]["tokens"] <= steps[0]["tokens"]:
        return None
    per_step = (steps[-1]["tokens"] - steps[0]["tokens"]) / (steps[-1]["step"] - steps[0]["step"])
    pace = sum(one["seconds"] for one in steps) / len(steps)
    begun = seconds_of(folder.started.get("time")) or 0.0
    for one in reversed(folder.checkpoints):  # the oldest that is of this start
        since = steps[-1]["step"] - one.step
        if not one.kind and one.written > begun and since >= _FEWEST and changed > one.written:
            pace = (changed - one.written) / since
            break
    return pace * (whole - tokens) / per_step


@dataclass(frozen=True)
class _Column:
    """A column of the table.

    Attributes:
        heading: above it.
        of: writes a cell; empty where a run has nothing to say.
        left_out: where there is no room, columns with the highest number go first; those with 0 stay.
        text: whether it is text, and not a number.
    """

    heading: str
    of: Callable[[Listed], str]
    left_out: int
    text: bool = False


def _step(one: Listed) -> str:
    if one.step is None:
        return ""
    return f"{one.step:,}" + (f"/{one.steps:,}" if one.steps is not None else "")


def quantity(value: float | None) -> str:
    """Write a number with three digits and a letter for its size: 12.9M, 2T."""
    if value is None:
        return ""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # or 999,999 would be 1e+03k
            return f"{value / size:.3g}{letter}" if abs(value) < 999.5 * size else f"{value / size:,.0f}{letter}"
    return f"{value:.3g}"


def _checkpoint(one: Listed) -> str:
    if one.checkpoint is None or one.checkpoint_age is None:
        return ""
    return f"{one.checkpoint:,} ({age(one.checkpoint_age)})"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


_COLUMNS = (
    _Column("run", lambda one: one.name, 0, text=True),
    _Column("state", lambda one: str(one.state), 0, text=True),
    _Column("step", _step, 1),
    _Column("tokens", lambda one: quantity(one.tokens), 5),
    _Column("loss", lambda one: _loss(one.loss), 2),
    _Column("val loss", lambda one: _loss(one.val_loss), 4),
    _Column("tokens/s", lambda one: quantity(one.tokens_per_second), 6),
    _Column("MFU", lambda one: "" if one.mfu is None else f"{one.mfu:.1%}", 7),
    _Column("ETA", lambda one: "" if one.seconds_left is None else as_duration(one.seconds_left), 3),
    _Column("checkpoint (age)", _checkpoint, 8),
    _Column("restarts", lambda one: str(one.restarts or ""), 9),
    _Column("W&B", lambda one: str(one.wandb.get("url") or ""), 10, text=True),
)


def shown(listed: Sequence[Listed], folders: Sequence[Path], width: int, most: int | None = None) -> RenderableType:
    """Show runs as a table of the columns that fit, with counts and what is to be said of each below.

    Args:
        listed: the runs.
        folders: in which they were looked for.
        width: characters of a line.
        most: rows to show, the last ones; None for all.
    """
    if not listed:
        return Text(f"no runs in {', '.join(map(str, folders))}")
    rows = listed if most is None else listed[-most:]
    columns = [column for column in _COLUMNS if any(column.of(one) for one in rows)]
    left_out = []
    while _width(columns, rows) > width and (dropped := max(columns, key=lambda one: one.left_out)).left_out:
        columns.remove(dropped)
        left_out.append(dropped.heading)
    table = of_numbers([column.heading for column in columns], [column.heading for column in columns if column.text])
    for one in rows:
        styles = ["" if column.heading != "state" else _STYLES[one.state.condition] for column in columns]
        table.add_row(*(Text(column.of(one), style) for column, style in zip(columns, styles, strict=True)))
    return Group(table, *map(Text, [*_said(rows), *_counted(listed, rows, left_out)]))


def _width(columns: Sequence[_Column], rows: Sequence[Listed]) -> int:
    """Return the characters that a table takes."""
    return _GAP + sum(max(len(column.heading), *(len(column.of(one)) for one in rows)) + _GAP for column in columns)


def _said(rows: Sequence[Listed]) -> list[str]:
    """Say why runs are as they are, and what of their folders could not be read."""
    lines = []
    for one in rows:
        why = [f"{one.state}, {one.state.why}"] if one.state.why else []
        lines += [f"{one.name}: {text}" for text in [*why, *one.faults]]
    return lines


def _counted(listed: Sequence[Listed], rows: Sequence[Listed], left_out: Sequence[str]) -> list[str]:
    """Say how many runs there are, and what is not shown."""
    counts = Counter(str(one.state) for one in listed)
    runs = "1 run" if len(listed) == 1 else f"{len(listed):,} runs"
    hidden = f", of which the last {len(rows):,} are shown" if len(rows) < len(listed) else ""
    lines = [f"{runs}{hidden}: {', '.join(f'{count:,} {word}' for word, count in counts.most_common())}"]
    if left_out:
        lines.append(f"not shown, for want of room: {', '.join(left_out)} (--json has all)")
    return lines


def _instead(folder: Path, given: Sequence[Path]) -> str:
    """Say what would work in the place of a folder that is not there."""
    if not given:
        return " here; a folder with runs in it as an argument would work"
    if folder.exists():
        return ", but a file; its folder would work"
    return f"; {RUNS} would work" if RUNS.is_dir() else "; a folder that holds runs would work"


def _watch(folders: Sequence[Path], seconds: float) -> int:
    """List runs again and again, until Ctrl-C."""
    console = Console(highlight=False)
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            listed = list_runs(folders)
            live.update(shown(listed, folders, console.width, most=max(1, console.height - 8)), refresh=True)
            time.sleep(seconds)
    return 0
