"""The settings of alerts: whom a run tells of what has befallen it, and what it watches for that."""

import shlex
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import Any


class AlertLevel(Enum):
    """How bad it is what an alert is about."""

    info = "info"
    """The run is complete."""
    warn = "warn"
    """The run goes on: started again after a failure, steps skipped, the disk nearly full."""
    error = "error"
    """The run has ended, or has lost something: diverged, not started again, not saved, files deleted."""


@dataclass
class AlertsConfig:
    """Alerts of a run that diverges, fails or stalls, skips steps, cannot save, loses files, or whose disk fills.

    Each is in the log and in events.jsonl; W&B and a command get those of some levels. Of failures and stalls
    `deepnarrow train` and `deepnarrow launch` tell the command, and W&B hears of them at the next start.
    """

    command: Any = None
    """A program with arguments that is run for each alert, beside training, such as [/home/me/notify,--urgent] or
    'curl -s -d @- https://example.org/hook': a text is split as a shell does, and no shell reads it (one that does is
    [sh,-c,'…']). It gets the alert as a JSON object on its standard input, with title, text, level (info, warn, error),
    run (the name of the run folder), run_dir, step, host and time, and title, text, level, run and step as the
    environment variables DEEPNARROW_ALERT_TITLE, _TEXT, _LEVEL, _RUN and _STEP too. Null runs none."""
    levels: list[AlertLevel] = field(default_factory=lambda: [AlertLevel.warn, AlertLevel.error])
    """The levels of alerts that W&B and the command get: info, warn, error."""
    every_minutes: float = 10.0
    """Minutes from one alert to the next with the same title; those between are counted in it. 0 sends all."""
    timeout_seconds: float = 30.0
    """Seconds that the command may take for one alert; then it is killed, with what it has started. The end of a run
    waits as long for alerts that are under way."""
    skipped_in_a_row: int | None = 3
    """Steps in a row whose updates were skipped (train.spike_sigmas, or not finite) that are alerted; null does not."""
    skipped_percent: float | None = 5.0
    """The percentage of the last 100 steps that may be skipped before it is alerted; null does not."""
    disk_free_gib: float | None = None
    """Free space of the run folder's disk, in GiB, below which it is alerted; null takes what the next checkpoints
    need: two, and more as long as fewer than checkpoint.keep_last are there, of the size of the last (before the first,
    12 bytes per parameter)."""


def command_of(settings: AlertsConfig) -> list[str]:
    """Return the program and its arguments; empty where there is none.

    Raises:
        ValueError: the text or list is no command.
    """
    given = settings.command
    if given is None:
        return []
    words = shlex.split(given) if isinstance(given, str) else given
    if not isinstance(words, list) or not all(isinstance(word, str | int | float) for word in words):
        raise ValueError("is neither a text nor a list of texts")
    words = [str(word) for word in words]
    if not words or not words[0]:
        raise ValueError("names no program")
    if any("\0" in word for word in words):
        raise ValueError("has a null character in it")
    return words


def problems(settings: AlertsConfig) -> list[str]:
    """Say what cannot be, one sentence each with what would work."""
    found = []
    try:
        command_of(settings)
    except ValueError as error:
        reason = str(error)[:1].lower() + str(error)[1:]
        works = "[/path/of/program,argument], or null, would work"
        found.append(f"alerts.command={settings.command}: {reason}; {works}")
    if not 0 <= settings.every_minutes < inf:
        found.append(f"alerts.every_minutes={settings.every_minutes}: not a time from 0 up; 10 would work")
    if not 0 < settings.timeout_seconds < inf:
        found.append(f"alerts.timeout_seconds={settings.timeout_seconds}: not a time above 0; 30 would work")
    if settings.skipped_in_a_row is not None and settings.skipped_in_a_row < 1:
        works = "at least 1, or null for none, would work"
        found.append(f"alerts.skipped_in_a_row={settings.skipped_in_a_row}: {works}")
    if settings.skipped_percent is not None and not 0 <= settings.skipped_percent <= 100:
        works = "a percentage from 0 to 100, or null for none, would work"
        found.append(f"alerts.skipped_percent={settings.skipped_percent}: {works}")
    if settings.disk_free_gib is not None and not 0 <= settings.disk_free_gib < inf:
        works = "a size from 0 up, or null for that of the next checkpoints, would work"
        found.append(f"alerts.disk_free_gib={settings.disk_free_gib}: {works}")
    return found
