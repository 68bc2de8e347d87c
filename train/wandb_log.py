"""What a run logs to Weights & Biases, whose process and server may leave it, or stop to answer, at any time."""

import atexit
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.alert_settings import command_of
from conf.schema import Config, to_jsonable
from train.background import Background
from train.names import GROUPED, grouped, groups
from train.records import METRICS, records
from train.strict_json import with_nan
from train.version import code_version
from train.wandb_run import end_wandb, start_wandb, wandb_id, wandb_mode

Say = Callable[[str, int], object]
ROOM = 4096
"""The most records, pictures and the like that wait for W&B; of more records, it gets those of the file afterwards."""
KILLED = 10.0
"""Seconds for calls to come back once W&B's process, which they wait for, is killed."""
SLOW = 60.0
"""Seconds after which it is said that W&B does not take what it is given."""


class WandbLog:
    """The W&B run of a run folder.

    A run that goes on keeps its W&B run: records that this has already are not sent again. W&B is told in a thread of
    its own, in the order of what there is to tell: its client waits, without a limit, for a process that is stopped or
    has lost its disk. What of the records finds no room meanwhile is read from metrics.jsonl once W&B goes on.

    Args:
        config: all settings, logged with the run.
        run_dir: the run folder, in which W&B's files are.
        facts: what else identifies the run.
        say: says what W&B does not do.
        clock: seconds that only rise.

    Attributes:
        mode: online, offline or disabled.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        facts: dict[str, Any],
        say: Say,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run_dir, self._say, self._patience = run_dir, say, config.wandb.finish_seconds
        self._calls = Background("wandb", ROOM, clock)
        self._asked = self._taken = 0
        self._left_out = self._is_slow = self._lacks = self._is_kept = False
        self._id, self._url, self._folder = wandb_id(run_dir), None, run_dir / "wandb"
        self._settings = {
            "project": config.wandb.project,
            "entity": config.wandb.entity,
            "tags": config.wandb.tags,
            "name": config.name,
            "dir": run_dir,
            "config": {**_settings(config), **facts, "code": code_version()},
        }
        self._run: Any = None
        self.mode, self._logged = "disabled", -1
        self._start(wandb_mode(config.wandb))
        if self._run is not None:
            self._calls.call(lambda: self._tell(_draw_against_tokens))
            atexit.register(self._leave)  # before W&B's own hook, which waits for its process without a limit

    def log(self, record: dict[str, Any]) -> None:
        """Log a record, which metrics.jsonl has by now, under the names of `train.names`."""
        if self._run is None or record["step"] <= self._logged:  # taken and logged before, then lost with the process
            return
        if not self._calls.call(lambda: self._log(record)):
            self._left_out = True

    def catch_up(self) -> None:
        """Give W&B the records of metrics.jsonl that it does not have."""
        if self._run is not None:
            self._calls.call(self._catch_up, must=True)

    def picture(self, name: str, path: Path) -> None:
        """Log a picture, with the next record."""

        def tell(run: Any) -> None:
            import wandb

            run.log({GROUPED.get(name, name): wandb.Image(str(path))}, commit=False)

        self._tell_later(tell)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table, with the next record."""

        def tell(run: Any) -> None:
            import wandb

            made = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            run.log({GROUPED.get(name, name): made}, commit=False)

        self._tell_later(tell)

    def alert(self, title: str, text: str, level: str) -> None:
        """Send an alert; its level is INFO, WARN or ERROR."""
        self._tell_later(lambda run: run.alert(title, text, level=level))

    def news(self) -> str | None:
        """Return a warning where W&B has taken nothing for a minute, once, and word of its end."""
        slow = self._calls.busy_seconds >= SLOW
        if slow and not self._is_slow:
            self._is_slow = True
            return f"W&B has taken nothing for {SLOW:.0f} s; training goes on, and {METRICS} has what W&B misses"
        if self._is_slow and not slow:
            self._is_slow = False
            return "W&B takes records again, and gets those that it misses"
        return None

    def deleted(self) -> Path | None:
        """Return the folder of W&B's files if it was deleted while they are written."""
        gone = self._run is not None and self._is_kept and not self._folder.exists()
        return self._folder if gone else None

    def start_again(self) -> None:
        """Begin W&B's files anew, after they were deleted, with the records of metrics.jsonl."""
        self._is_kept = False
        self._calls.call(self._start_again, must=True)

    def wait(self, seconds: float) -> bool:
        """Wait until W&B has been told all, for at most so many seconds; return whether it has."""
        return self._calls.wait(seconds)

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the summary of the run, and end the W&B run, for which this waits `wandb.finish_seconds` at most.

        Offline it waits as long once more, for another part that takes what the first has not.
        """
        if self.mode == "disabled":
            return
        copied = dict(summary)
        self._calls.call(lambda: self._finish(copied), must=True)
        self._end_in_time()
        if self._lacks and self.mode == "offline":  # another part of the same run takes what the first has not
            self._calls.call(self._start_again, must=True)
            self._calls.call(lambda: self._finish(copied), must=True)
            self._end_in_time()
        if lost := self._asked - self._taken:
            self._say(f"W&B lacks {lost:,} pictures, tables or alerts, which it did not take", logging.WARNING)

    def where(self) -> dict[str, Any]:
        """Say where W&B has the run; a run that is not logged there has no folder and no id."""
        if self.mode == "disabled":
            return {"mode": self.mode}
        parts = len(list(self._folder.parent.glob(f"*run-*-{self._id}")))
        where = {"mode": self.mode, "dir": str(self._folder), "id": self._id, "parts": parts}
        where |= {"url": self._url} if self._url else {}
        return where | ({"lacks_records": True} if self._lacks else {})

    def _start(self, mode: Any) -> None:
        run, mode, logged = start_wandb(mode, self._id, **self._settings)
        if run is None:
            return
        self._folder, self._logged, self.mode, self._lacks = Path(run.dir).parent, logged, mode, False
        self._url = run.url if mode == "online" else None
        self._is_kept = mode == "offline" and self._folder.exists()
        self._run = run

    def _start_again(self) -> None:
        """Begin another offline part of the run, in the thread that tells W&B."""
        self._tell(lambda run: run.finish())
        self._start("offline")
        self._tell(_draw_against_tokens)
        self._catch_up()

    def _log(self, record: dict[str, Any]) -> None:
        if self._left_out:  # before this one
            self._left_out = False
            self._catch_up()
        self._send(record)

    def _catch_up(self) -> None:
        for record in map(with_nan, records(self._run_dir / METRICS)):
            self._send(record)

    def _send(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if step > self._logged:
            self._tell(lambda run: run.log(grouped(record), step=step, commit=True))
            self._logged = step

    def _finish(self, summary: dict[str, Any]) -> None:
        if self._left_out:
            self._catch_up()
        self._tell(lambda run: (run.summary.update(summary), run.finish()))
        self._run = None

    def _end_in_time(self) -> None:
        """Wait until W&B has ended its run; one that takes too long is ended, or Python would wait for it."""
        if self._calls.wait(self._patience):
            return
        self._lacks = True
        self._calls.clear()
        limit = f"{self._patience:g} s (wandb.finish_seconds)"
        self._say(f"W&B has not taken all records within {limit}, and its process is ended", logging.WARNING)
        end_wandb()
        self._calls.wait(min(self._patience, KILLED))

    def _leave(self) -> None:
        """End W&B's process, or one that does not answer, when Python ends, after a failure too."""
        self._calls.call(_teardown, must=True)
        if not self._calls.wait(self._patience):
            self._say(f"W&B does not answer, and its process is ended; {METRICS} has what it misses", logging.WARNING)
            end_wandb()
            self._calls.wait(min(self._patience, KILLED))

    def _tell_later(self, tell: Callable[[Any], object]) -> None:
        def act() -> None:
            self._taken += self._tell(tell)

        if self.mode != "disabled":
            self._asked += 1
            self._calls.call(act)

    def _tell(self, tell: Callable[[Any], object]) -> bool:
        """Call W&B, whose process a signal to all may have ended, which must not end the run; whether it was told."""
        if self._run is None:
            return False
        try:
            tell(self._run)
            return True
        except Exception as error:
            self._run, self._lacks = None, True
            _teardown()  # or it would try, and fail, to take leave of it when Python ends
            self._say(
                f"W&B has ended ({error}); {METRICS} has what it misses, and gives it to W&B on resuming",
                logging.WARNING,
            )
            return False


def _settings(config: Config) -> dict[str, Any]:
    """Return all settings, but of the alerts' command the program alone: its arguments may be somebody's key."""
    made = to_jsonable(asdict(config))
    if program := command_of(config.alerts)[:1]:
        made["alerts"]["command"] = f"{program[0]} …"
    return dict(made)


def _teardown() -> None:
    import wandb

    with suppress(Exception):
        wandb.teardown()


def _draw_against_tokens(run: Any) -> None:
    """Have W&B draw all charts against the tokens trained on, so that runs of different batches compare."""
    run.define_metric("tokens")
    for group in groups():
        run.define_metric(f"{group}/*", step_metric="tokens")
