"""What has befallen a run, from events.jsonl, which the command that has started it writes: told by the next start."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.tracking import Tracker

EVENTS = "events.jsonl"
RESTART = "DEEPNARROW_RESTART"
"""Environment variable: how often this command has started the run again; not set at its first start."""


def tell_of_restart(tracker: "Tracker", run_dir: Path, environment: Mapping[str, str]) -> None:
    """Say in log, W&B and the record of the next step that this run was started again, and after what.

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
    tracker.alert("restarted", text, "WARN")
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
