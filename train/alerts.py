"""Alerts: what befalls a run is sent to those who are elsewhere, by a program of theirs that runs beside training."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from conf.alert_settings import AlertLevel, AlertsConfig, command_of
from conf.paths import expanded
from train.background import Background
from train.events import now

Say = Callable[[str, int], object]
ROOM = 100
"""The most alerts that wait for the command; those beyond are counted."""
SHARE_OF = 100
"""The steps of which `alerts.skipped_percent` are too many."""
DISK_EVERY = 60.0
"""Seconds from one look at the disk to the next."""
BYTES_PER_PARAMETER = 12
"""Of a checkpoint: a master weight and two moments in fp32."""
_TAIL = 4096
_VARIABLE = 2**14


def problems(settings: AlertsConfig) -> list[str]:
    """Say that the program of `alerts.command` is not on this machine."""
    try:
        command = command_of(settings)
    except ValueError:  # said with the other settings
        return []
    if not command or _found(command[0]):
        return []
    why = "is no program that can be run" if expanded(command[0]).exists() else "is not there"
    works = "the path of one that is, or null, would work"
    return [f"alerts.command={settings.command}: {command[0]} {why} on {socket.gethostname()}; {works}"]


def _found(program: str) -> str | None:
    return shutil.which(str(expanded(program)) if program.startswith("~") else program)


class Alerts:
    """Sends the alerts of one process that watches a run, and limits how many there are of a kind.

    Args:
        settings: what to run, for which levels, and how often.
        run_dir: of the run.
        write: writes an object to events.jsonl.
        say: writes a line to the log.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        settings: AlertsConfig,
        run_dir: Path,
        write: Callable[[dict[str, Any]], object],
        say: Say,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._settings, self._run_dir, self._write, self._say, self._clock = settings, run_dir, write, say, clock
        self._sent: dict[str, float] = {}
        self._held_back: Counter[str] = Counter()
        self._background = Background("alerts", ROOM, clock)
        self._under_way: subprocess.Popen[bytes] | None = None
        self._failures = self._dropped = 0
        self._is_closed = False

    def send(self, title: str, text: str, level: AlertLevel, step: int) -> str | None:
        """Write an alert to events.jsonl, and have the command run with it, unless one of its title was just sent.

        Args:
            title: of its kind.
            text: a sentence.
            level: of it.
            step: that the run has come to.

        Returns:
            The text that whoever else is alerted gets; None where it is held back, or its level is not asked for.
        """
        alert = {"title": title, "text": text, "level": level.name, "step": step}
        self._write({"event": "alert", **alert})
        if level not in self._settings.levels:
            return None
        at = self._clock()
        if title in self._sent and at - self._sent[title] < 60 * self._settings.every_minutes:
            self._held_back[title] += 1
            return None
        self._sent[title] = at
        if count := self._held_back.pop(title, 0):
            text += f" ({count:,} more of the kind since the last alert)"
        if command := command_of(self._settings):
            where = {"run": self._run_dir.name, "run_dir": str(self._run_dir), "host": socket.gethostname()}
            told = {**alert, "text": text, **where, "time": now()}
            if not self._background.call(lambda: self._run(command, told)):
                self._dropped += 1
        return text

    def close(self, at_once: bool = False) -> None:
        """Wait for alerts under way, and say what of them has come to nothing.

        Args:
            at_once: whether this does not wait; else it does as long as the command may take for one alert.
        """
        if not self._background.wait(0.0 if at_once else self._settings.timeout_seconds):
            self._is_closed = True
            self._dropped += self._background.clear()
            if (process := self._under_way) is not None:
                _kill(process)
            self._background.wait(1.0)
        if self._failures > 1:
            self._say(f"alerts.command has failed {self._failures:,} times", logging.WARNING)
        if self._dropped:
            self._say(f"alerts.command was not run for {self._dropped:,} alerts, which found no time", logging.WARNING)

    def _run(self, command: list[str], alert: dict[str, Any]) -> None:
        """Run the command to its end, in the thread of the alerts."""
        if (failure := self._failure(command, alert)) is None:
            return
        self._failures += 1
        if self._failures == 1:
            more = "; further failures are counted, and not said before the end"
            self._say(f"alerts.command {failure}, for the alert {alert['title']!r}{more}", logging.WARNING)

    def _failure(self, command: list[str], alert: dict[str, Any]) -> str | None:
        names = ("title", "text", "level", "run", "step")
        of_alert = {f"DEEPNARROW_ALERT_{name.upper()}": _as_variable(str(alert[name])) for name in names}
        limit, pipe = self._settings.timeout_seconds, subprocess.PIPE
        try:
            process = subprocess.Popen(
                [_found(command[0]) or command[0], *command[1:]],
                env={**os.environ, **of_alert},
                stdin=pipe,
                stdout=subprocess.DEVNULL,
                stderr=pipe,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"could not be started ({error})"
        self._under_way = process
        if self._is_closed:  # while it was started
            _kill(process)
        said: deque[bytes] = deque(maxlen=1)
        talk = threading.Thread(target=_talk, args=(process, json.dumps(alert).encode(), said), daemon=True)
        talk.start()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()
            return f"was killed: it has not ended within {limit:g} s (alerts.timeout_seconds)"
        finally:
            self._under_way = None
        if code == 0:
            return None
        talk.join(1.0)  # what it has started may keep its standard error open
        last = b"".join(said).decode("utf-8", "replace").strip().splitlines()[-1:]
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return how + (f" ({last[0][:200]})" if last else "")


def _as_variable(text: str) -> str:
    """Cut a text to what Linux takes as an environment variable, 128 KiB, and say so in it; the JSON has the whole."""
    text = text.replace("\0", "")
    return text if len(text) <= _VARIABLE else f"{text[:_VARIABLE]}… ({len(text) - _VARIABLE:,} more characters)"


def _talk(process: "subprocess.Popen[bytes]", told: bytes, said: deque[bytes]) -> None:
    """Give a program its input, and keep the end of what it says on its standard error."""
    given, heard = process.stdin, process.stderr
    assert given is not None and heard is not None
    with suppress(OSError, ValueError), given:
        given.write(told)
    end = b""
    with suppress(OSError, ValueError), heard:
        while part := os.read(heard.fileno(), 2**16):
            end = (end + part)[-_TAIL:]
            said.append(end)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a program and what it has started, which are a group of their own."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


class SkipWatch:
    """Tells when too many updates are skipped, in a row or of the last hundred.

    Args:
        settings: how many are too many.
    """

    def __init__(self, settings: AlertsConfig):
        self._most, self._percent = settings.skipped_in_a_row, settings.skipped_percent
        self._last: deque[bool] = deque(maxlen=SHARE_OF)
        self._in_a_row = 0

    def news(self, skipped: bool) -> str | None:
        """Judge the steps up to one more; say in a clause what is too much, where this one makes it so."""
        self._last.append(skipped)
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if not skipped:
            return None
        if self._in_a_row == self._most:
            return f"{self._in_a_row} updates in a row were skipped (alerts.skipped_in_a_row)"
        count = sum(self._last)
        if self._percent is not None and 100 * count > self._percent * SHARE_OF:
            return f"{count} of the last {len(self._last)} updates were skipped (alerts.skipped_percent)"
        return None


class DiskWatch:
    """Tells when the disk of a run folder has less room than the run will need.

    Args:
        settings: of alerts.
        run_dir: on the disk.
        checkpoints: returns how many more checkpoints the disk will have to hold soon; 0 where none are saved.
        size: bytes that a checkpoint is expected to have.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        settings: AlertsConfig,
        run_dir: Path,
        checkpoints: Callable[[], int],
        size: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.size = size
        """Bytes of a checkpoint."""
        self._least, self._run_dir, self._checkpoints, self._clock = settings.disk_free_gib, run_dir, checkpoints, clock
        self._looked, self._is_low = -DISK_EVERY, False

    def news(self) -> str | None:
        """Look at the disk, once a minute; return a warning where it has less room than needed, once until it has."""
        at = self._clock()
        if at - self._looked < DISK_EVERY:
            return None
        self._looked = at
        try:
            free = shutil.disk_usage(self._run_dir).free
        except OSError:  # of a folder that was deleted, which is said
            return None
        if self._least is not None:
            needed, why = self._least * 2**30, "alerts.disk_free_gib"
        else:
            count = self._checkpoints()
            needed, why = count * self.size, f"for the next {count} checkpoints of {self.size / 2**30:,.2f} GiB"
        was_low, self._is_low = self._is_low, free < needed
        if was_low or not self._is_low:
            return None
        return f"{self._run_dir}: {free / 2**30:,.2f} GiB are free, and {needed / 2**30:,.2f} are needed ({why})"
