"""A run kept going: watched, ended where it does not move, and started again from its newest sound checkpoint."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from conf.alert_settings import AlertLevel, AlertsConfig
from conf.launch_settings import LaunchConfig
from launch.restarts import Events, Failure, Recovery, Restarts
from launch.stacks import STALLS, collect, innermost
from launch.supervise import PassedOn, completion
from launch.watchdog import HOST_LOST, Stall, Watchdog, described, heartbeats_folder, remove_heartbeats
from parallel.heartbeat import FOLDER, Phase
from parallel.layout import Layout
from train.alerts import Alerts
from train.events import EVENTS, RESTART
from train.records import is_over

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_BAD_INPUT = 2
_FINAL = (0, _BAD_INPUT, 3)
"""Exit codes after which nothing is to be started again: complete or stopped, bad input, diverged."""


@dataclass
class Persistence:
    """What keeps a run going.

    Attributes:
        layout: the rank grid.
        run_dir: of the run.
        settings: how often, and when a run does not move.
        again: the arguments of the script at every further start, where they are not those of the first.
        shrink: is told of each failure, and returns another layout where the next start is to have one.
        alerting: who is told of a failure, and how.
    """

    layout: Layout
    run_dir: Path
    settings: LaunchConfig
    again: Sequence[str]
    shrink: Callable[[Failure], Layout | None] = lambda failure: None
    alerting: AlertsConfig = field(default_factory=AlertsConfig)
    _restarts: Restarts = field(init=False)
    _events: Events = field(init=False)
    _alerts: Alerts = field(init=False)
    _recovery: Recovery | None = field(init=False, default=None)

    def run(self, start: Callable[..., int], arguments: Sequence[str], signals: PassedOn) -> int:
        """Start the run until it has ended for good; return its exit code.

        Args:
            start: starts it once, and returns its exit code: `launch.supervise.start_once` on arguments, environment
                and look.
            arguments: of the script at the first start.
            signals: to this process; one ends the run for good.
        """
        self._restarts, self._events = Restarts(self.settings.restarts), Events(self.run_dir)
        # Of what it alerts the events have the failure already.
        self._alerts = Alerts(self.alerting, self.run_dir, lambda event: None, lambda text, level: _say(text))
        try:
            return self._keep_going(start, arguments, signals)
        finally:
            self._alerts.close(at_once=signals.fatal is not None)
            if lacking := self._events.close():
                _say(f"{self.run_dir / EVENTS} lacks {lacking} lines: its disk has not taken them")

    def _keep_going(self, start: Callable[..., int], arguments: Sequence[str], signals: PassedOn) -> int:
        while True:
            watch = _Watch(self)
            try:
                code = start(arguments, environment=watch.environment(self._restarts.count), look=watch.look)
                if code == _BAD_INPUT and self._restarts.count:  # at the first start, someone is there who reads it
                    said = f"restart {self._restarts.count} was refused as bad input, and the run is not started again"
                    refused = Failure("was refused as bad input", None, None, watch.dog.step, "", True, 0.0)
                    self._events.failed(refused, f"restart {self._restarts.count} cannot work as it is")
                    self._tell("not started again", said, AlertLevel.error, watch.dog.step)
                if code in _FINAL or signals.first is not None or watch.has_ended(code):
                    self.progress(watch.dog, ended=code == 0)
                    return code
                failure = watch.failure(code)
            finally:
                remove_heartbeats(watch.folder)
            then = self._restarts.after(failure)
            self._events.failed(failure, then)
            if isinstance(then, str):
                said = f"{failure}: the run has failed, and is not started again: {then}"
                self._tell("not started again", said, AlertLevel.error, failure.step)
                return code
            said = (f"{failure}: the run has failed, and goes on from its newest sound checkpoint in {then:g} s "
                    f"(restart {self._restarts.count}, launch.restarts={self.settings.restarts})")  # fmt: skip
            self._tell("stalled" if watch.has_stalled else "failed", said, AlertLevel.warn, failure.step)
            self._recovery = Recovery(failure, watch.noticed())
            end = time.monotonic() + then
            while time.monotonic() < end and signals.fatal is None:
                time.sleep(0.1)
            if signals.fatal is not None:
                return 128 + signals.fatal
            self.layout = self.shrink(failure) or self.layout
            if watch.dog.came_to(Phase.LOAD):  # the folder is cleared by then of what this run does not go on from
                arguments = self.again

    def _tell(self, title: str, text: str, level: AlertLevel, step: int) -> None:
        _say(text)
        self._alerts.send(title, text, level, step)

    def progress(self, dog: Watchdog, ended: bool = False) -> None:
        """Note how far a run that was started again has come."""
        recovery, now = self._recovery, time.monotonic()
        if recovery is None:
            return
        if recovery.loading is None and dog.came_to(Phase.LOAD):
            recovery.loading = now
        if recovery.training is None and dog.step:
            recovery.training = now
        if dog.step > recovery.failure.step or ended:
            seconds = self._events.recovered(recovery, now, self._restarts.count)
            lost = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "lost")
            _say(f"beyond step {recovery.failure.step:,} again: {seconds['lost']:.1f} s lost ({lost})")
            self._recovery = None


class _Watch:
    """The watch over one start of a run.

    Args:
        of: what keeps it going.
    """

    def __init__(self, of: Persistence):
        self.folder = heartbeats_folder()
        self.dog = Watchdog(self.folder, of.layout, of.settings.stall_seconds)
        self._of = of
        self._stall: Stall | None = None
        self._stalled_at = 0.0
        self._completed_before = completion(of.run_dir)

    def environment(self, restarts: int) -> dict[str, str]:
        """Return what the ranks find in their environment, besides that of this process."""
        made = dict(os.environ)
        made[FOLDER] = str(self.folder)
        if restarts:
            made[RESTART] = str(restarts)
        return {key: value for key, value in made.items() if os.environ.get(key) != value}

    def look(self) -> bool:
        """Look at the ranks; whether they are to be ended at once, since they do not move."""
        if self._stall is not None:  # what follows is what has been done about it
            return True
        stall = self.dog.look()
        self._of.progress(self.dog)
        if stall is None:
            return False
        self._stall, self._stalled_at = stall, time.monotonic()
        stalls = self._of.run_dir / STALLS
        stacks = collect(stall.beats, self.folder, stall.verdict.culprits, stalls)
        lines = described(stall)
        for rank in stall.verdict.culprits[:4]:
            if frames := innermost(stacks[rank]):
                lines += [f"rank {rank}, innermost first:", *[f"  {frame}" for frame in frames]]
        path = stalls / f"step-{self.dog.step:08d}-{int(time.time())}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            whole = [f"\n---- rank {rank}: {stall.beats[rank]} ----\n{text}" for rank, text in stacks.items()]
            path.write_text("\n".join([*lines, *whole]), encoding="utf-8")
            lines.append(f"stacks of all ranks: {path}")
        except OSError as error:
            lines.append(f"the stacks of all ranks could not be kept ({error})")
        _say("\n".join(lines))
        return True

    @property
    def has_stalled(self) -> bool:
        """Whether the run was ended since it did not move."""
        return self._stall is not None

    def has_ended(self, code: int) -> bool:
        """Tell whether the run has come to its end in this start, whatever it lacks.

        One whose launcher was killed has not: its ranks are then told to stop, and save, though nobody asked for it.

        Args:
            code: its exit code.
        """
        if completion(self._of.run_dir) in (None, self._completed_before):
            return False
        return code - 128 not in (signal.SIGKILL, *_CRASHES) or is_over(self._of.run_dir)

    def noticed(self) -> float:
        """Return when the failure was noticed, by `time.monotonic`: before stacks are collected and ranks are ended."""
        if self._stall is not None:
            return self._stalled_at
        return self.dog.gone_at if self.dog.gone_at is not None else time.monotonic()

    def failure(self, code: int) -> Failure:
        """Say what the run has failed with.

        Args:
            code: its exit code.
        """
        step = self.dog.step
        if self._stall is not None:
            verdict = self._stall.verdict
            rank = verdict.culprits[0] if verdict.culprits and verdict.certain else None
            word = self._stall.halted.get(rank, "held up the others") if rank is not None else "the run does not move"
            return self._of_rank(rank, f"was {word}" if word.startswith("stopped") else word, step, self._stall.seconds)
        # Of a rank whose launcher has asked for its exit code already, that of all is taken.
        of_all = 128 - code if code > 128 else code
        codes = {gone.beat.rank: of_all if gone.code is None else gone.code for gone in self.dog.gone}
        failures = self.dog.failures()
        lost = bool(failures) and failures[0][0] == HOST_LOST  # others end since it is
        # Whoever fails, or ends since another one has, says so first; one that does not was the first itself.
        said = [rank for _, rank, *_ in failures]
        silent = [rank for rank, own in codes.items() if own and rank not in said and not lost]
        if silent and (own := codes[silent[0]]) < 0:
            return self._of_killed(silent[0], -own, step)
        if silent:
            cause = f"ended with exit code {own} and without a word"
            return self._of_rank(silent[0], cause, step, self._after(silent[0]), by_itself=True)
        if failures:
            _, rank, reason, by_itself = failures[0]
            return self._of_rank(rank, f"failed ({reason})", step, self._after(rank), by_itself)
        how = f"was ended by {_signal_name(code - 128)}" if code > 128 else f"ended with exit code {code}"
        after = time.monotonic() - self.dog.moved
        return Failure(f"DeepSpeed's launcher {how}", None, None, step, "", code <= 128, after)

    def _of_killed(self, rank: int, number: int, step: int) -> Failure:
        hint = " (as a system does that is out of memory)" if number == signal.SIGKILL else ""
        cause = f"was ended by {_signal_name(number)}{hint}"
        return self._of_rank(rank, cause, step, self._after(rank), by_itself=number in _CRASHES)

    def _of_rank(self, rank: int | None, cause: str, step: int, after: float, by_itself: bool = False) -> Failure:
        beat = self.dog.beats[rank] if rank is not None else None
        host, doing = (beat.host, str(beat)) if beat else (None, "")
        return Failure(cause, rank, host, step, doing, by_itself, round(after, 3))

    def _after(self, rank: int) -> float:
        """Return the seconds from the last heartbeat of a rank until its end was seen."""
        beat = self.dog.beats[rank]
        return self.noticed() - beat.time if beat else 0.0


def _signal_name(number: int) -> str:
    """Name a signal; those for real time have no names."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr, flush=True)
