"""What befalls a run, in events.jsonl: failures, which the command that has started it writes, and rank 0's alerts."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.alert_settings import AlertLevel
from train.patient_file import PatientFile

if TYPE_CHECKING:
    from train.tracking import Tracker

EVENTS = "events.jsonl"
RESTART = "DEEPNARROW_RESTART"
"""Environment variable: how often this command has started the run again; not set at its first start."""


class EventFile:
    """events.jsonl of a run folder, opened with the first event.

    Attributes:
        file: what is written to; None before.

    Args:
        run_dir: of the run; nothing is written before it is there.
        clock: seconds that only rise.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic):
        self.file: PatientFile | None = None
        self._run_dir, self._clock = run_dir, clock

    def write(self, event: Mapping[str, Any]) -> None:
        """Append an event: an object with its kind at ``event``; the time is added."""
        if self.file is None and self._run_dir.is_dir():
            self.file = PatientFile(self._run_dir / EVENTS, self._clock)
        if self.file is not None:
            self.file.write(json.dumps({"time": now(), **event}))

    def close(self) -> int:
        """Write what waits for the disk, close the file, and return how many lines it lacks."""
        return self.file.close() if self.file is not None else 0


def now() -> str:
    """Write the time of day, with its zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def tell_of_restart(tracker: "Tracker", run_dir: Path, environment: Mapping[str, str]) -> None:
    """Say in log, W&B and the record of the next step that this run was started again, and after what.

    The command of `alerts` has been told of the failure by whoever has started the run again.

    Args:
        tracker: of rank 0.
        run_dir: where the events are.
        environment: of this process.
    """
    if RESTART not in environment:
        return
    failure = last_failure(run_dir) or {}
    where = "" if failure.get("rank") is None else f"rank {failure['rank']} "
    where += f"on {failure['host']} " if failure.get("host") else ""
    cause = f"{where}{failure.get('cause', 'its cause is not known')}, step {failure.get('step', 0):,}"
    text = f"restart {environment[RESTART]}, after a failure: {cause}"
    tracker.say(text)
    tracker.alert_wandb("restarted", text, AlertLevel.warn)
    tracker.add_to_next({"restarts": int(environment[RESTART])})


def last_failure(run_dir: Path) -> dict[str, Any] | None:
    """Read the last failure of a run; None where none can be read."""
    found = None
    with suppress(OSError), open(run_dir / EVENTS, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                event = json.loads(line)
                found = event if event.get("event") == "failed" else found
    return found
