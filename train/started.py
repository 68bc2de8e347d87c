"""A note in the run folder of its last start: on which host, by which process, how far it is to go, how it has ended.

It is written when rank 0 has locked the folder, completed when the run is open, and once more when rank 0 ends; whoever
finds the folder can then tell a run that is starting, or on another host, from one that was killed.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from model.problems import BadInput
from train.events import RESTART, now
from train.strict_json import dumps

STARTED = "started.json"
LOCK = ".lock"
"""In a run folder, the file that rank 0 holds locked (`flock`) while it trains there."""

log = logging.getLogger(__name__)


@contextmanager
def noted(run_dir: Path) -> Iterator[None]:
    """Note, for the time of this context, that this process trains in a run folder; at its end how it has ended.

    A process that is killed leaves ``ended`` at null. What the disk does not take is said, and costs nothing else.

    Args:
        run_dir: the run folder, locked by this process.
    """
    note = {
        "time": now(),
        "host": socket.gethostname(),
        "boot": boot(),
        "pid": os.getpid(),
        "restart": int(os.environ.get(RESTART, 0)),
        "ended": None,
    }
    _write(run_dir, note)
    reason: str | None = "ended without a word"
    try:
        yield
        reason = None
    except SystemExit as error:
        reason = None if not error.code else f"exit code {error.code}"
        raise
    except BadInput as error:
        reason = error.problems[0]
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        _write(run_dir, {**(read(run_dir) or note), "ended": {"time": now(), "reason": reason}})


def complete(run_dir: Path, **facts: Any) -> None:
    """Add facts to the note of a run that is open: ``steps`` and ``tokens`` of its whole length, layout, device, code.

    Args:
        run_dir: the run folder.
        facts: values that JSON can hold.
    """
    if (note := read(run_dir)) is not None:  # else the disk has not taken it, which was said
        _write(run_dir, {**note, **facts})


def read(run_dir: Path) -> dict[str, Any] | None:
    """Read the note of a run folder; None where there is none, or none that is whole."""
    try:
        note = json.loads((run_dir / STARTED).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


@cache
def boot() -> str | None:
    """Read which start of which machine's system this is: two processes with the same one share their file locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:  # no Linux
        return None


def _write(run_dir: Path, note: dict[str, Any]) -> None:
    unfinished = run_dir / f"{STARTED}.tmp"
    try:
        unfinished.write_text(dumps(note, indent=2) + "\n", "utf-8")
        unfinished.rename(run_dir / STARTED)
    except OSError as error:
        log.warning("%s could not be written (%s): `deepnarrow runs` cannot tell how this run is", STARTED, error)
