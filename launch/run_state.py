"""How a run is, by what is in its folder: running, complete, failed and why; or what cannot be known from here.

The sign of life is the lock that rank 0 holds on the folder (`train.started.LOCK`). Held, the run is alive, whichever
host it is on. Free, it is over if it was started on this machine. Of a run on another host over a shared disk that
keeps locks to itself, a free lock says nothing: there the age of metrics.jsonl is all that there is, and what follows
from it is said with a question mark.
"""

import fcntl
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from launch.run_folder import RunFolder
from train.records import SUMMARY
from train.started import LOCK, boot

QUIET = 120.0
"""Seconds without a step that mean nothing: a validation, or a network disk that tells of files a minute later."""
TIMES_A_STEP = 10
"""So many median steps without one mean nothing either."""
LATE = 120.0
"""Seconds that a restart may take to begin, beyond the wait that the command has said."""


class Condition(str, Enum):
    """What a run is doing, or how it has ended."""

    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    COMPLETE = "complete"
    STOPPED = "stopped"
    DIVERGED = "diverged"
    FAILED = "failed"
    SILENT = "silent"
    NEVER = "no step"


ACTIVE = (Condition.STARTING, Condition.RUNNING, Condition.RESTARTING)


@dataclass(frozen=True)
class State:
    """How a run is.

    Attributes:
        condition: what it does, or how it has ended.
        why: a clause; empty where there is nothing to add.
        certain: whether that is known; else it is what the age of its files suggests.
    """

    condition: Condition
    why: str = ""
    certain: bool = True

    def __str__(self) -> str:
        """The condition in a word, with a question mark where it is not known."""
        return self.condition.value + ("" if self.certain else "?")


def state_of(run: RunFolder, now: float | None = None) -> State:
    """Tell how a run is.

    Args:
        run: its folder.
        now: seconds since 1970; the present by default.
    """
    now = time.time() if now is None else now
    if (ended := _by_summary(run)) and not _stale(run):
        return ended
    locked, started = is_locked(run.path), run.started
    here = started.get("boot") is not None and started["boot"] == boot()
    over = bool(started.get("ended")) or (locked is False and here)
    if locked:
        return _moving(run, now)
    if (failure := _failure(run)) is not None:
        return _after(failure, now)
    if over:
        return State(Condition.FAILED, _last_words(started))
    return _by_age(run, now)


def is_locked(run_dir: Path) -> bool | None:
    """Tell whether a process trains in a run folder, by its lock; None where there is none or the disk has no locks.

    The lock is taken as one of many readers for an instant: whoever would train there just then waits for it.
    """
    try:
        handle = os.open(run_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def age(seconds: float) -> str:
    """Say how long something is or was, roughly: 40 s, 12 min, 3 h, 2 d."""
    for length, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def told(failure: Mapping[str, Any]) -> str:
    """Say in a clause what a run has failed with: a `failed` event of events.jsonl."""
    where = "" if failure.get("rank") is None else f"rank {failure['rank']} "
    where += f"on {failure['host']} " if where and failure.get("host") else ""
    step = failure.get("step")
    return f"{where}{failure.get('cause') or 'of a cause that is not known'}" + (
        f", step {step:,}" if isinstance(step, int) and step else ""
    )


def _by_summary(run: RunFolder) -> State | None:
    """Tell how a run has come to its end, where its summary says so."""
    if not run.summary:
        return None
    missing = run.summary.get("missing_records")
    lost = f"{missing:,} records are missing" if isinstance(missing, int) and missing else ""
    if run.summary.get("diverged"):
        return State(Condition.DIVERGED, str(run.summary.get("reason") or "of a cause that is not known"))
    return State(Condition.COMPLETE if run.summary.get("complete") else Condition.STOPPED, lost)


def _stale(run: RunFolder) -> bool:
    """Tell whether the summary is that of the start before, which the next one has not removed yet."""
    begun, written = seconds_of(run.started.get("time")), run.modified(SUMMARY)
    return begun is not None and written is not None and written < begun


def _moving(run: RunFolder, now: float) -> State:
    """Tell how a run is whose process is there."""
    begun = seconds_of(run.started.get("time"))
    if not _has_stepped(run):
        loaded = "before its first step" if "steps" in run.started else "preparing"
        return State(Condition.STARTING, loaded + (f" for {age(now - begun)}" if begun is not None else ""))
    still = now - (run.changed or now)
    return State(Condition.RUNNING, f"no step for {age(still)}" if still > _quiet(run) else "")


def _has_stepped(run: RunFolder) -> bool:
    """Tell whether a run has taken a step since its last start."""
    last = run.last.get("step") if run.last else None
    if not run.started:
        return last is not None
    return "steps" in run.started and isinstance(last, int) and last > (run.started.get("resumed") or 0)


def _failure(run: RunFolder) -> Mapping[str, Any] | None:
    """Return the event with which the last start of a run has failed; None where it has not."""
    last = next((one for one in reversed(run.events) if one.get("event") == "failed"), None)
    begun = seconds_of(run.started.get("time"))
    when = seconds_of(last.get("time")) if last else None
    return None if begun is not None and (when is None or when < begun) else last


def _after(failure: Mapping[str, Any], now: float) -> State:
    """Tell how a run is that has failed, and has not been started since."""
    if (refused := failure.get("not_restarted")) is not None:
        return State(Condition.FAILED, f"{told(failure)}; not started again: {refused}")
    wait, when = failure.get("restart_in_seconds"), seconds_of(failure.get("time"))
    if not isinstance(wait, int | float) or when is None:
        return State(Condition.FAILED, told(failure))
    late = now - when - wait
    if late <= LATE:
        due = f"in {age(-late)}" if late < 0 else "now"
        return State(Condition.RESTARTING, f"{due}, after: {told(failure)}")
    return State(
        Condition.FAILED,
        f"{told(failure)}; it was to be started again {age(late)} ago, and may be waiting for a host",
        certain=False,
    )


def _last_words(started: Mapping[str, Any]) -> str:
    """Say why the process of a run is not there any more."""
    ended = started.get("ended")
    if isinstance(ended, dict) and ended.get("reason"):
        return str(ended["reason"])
    return f"process {started.get('pid')} on {started.get('host')} is gone without a word, as one that was killed"


def _by_age(run: RunFolder, now: float) -> State:
    """Guess how a run is of which no sign but its files is there."""
    begun = seconds_of(run.started.get("time"))
    latest = max((when for when in (run.changed, begun) if when is not None), default=None)
    host = f" on {run.started['host']}" if run.started.get("host") else ""
    if latest is None:
        return State(Condition.NEVER, "")
    still = now - latest
    if still <= _quiet(run):
        return State(Condition.RUNNING if _has_stepped(run) else Condition.STARTING, host.strip(), certain=False)
    return State(Condition.SILENT, f"for {age(still)}{host}", certain=False)


def _quiet(run: RunFolder) -> float:
    """Return the seconds for which a run may say nothing."""
    seconds = [one["seconds"] for one in run.tail if isinstance(one.get("seconds"), int | float)]
    return max(QUIET, TIMES_A_STEP * statistics.median(seconds) if seconds else 0.0)


def seconds_of(written: Any) -> float | None:
    """Read a time in ISO 8601 as seconds since 1970; None for what is none."""
    try:
        return datetime.fromisoformat(written).timestamp()
    except (TypeError, ValueError):
        return None
