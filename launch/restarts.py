"""Restarts of a run: what it has failed with, whether it is worth another start, and what it cost, in events.jsonl."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass

from train.events import EventFile

WITHIN = 24 * 3600.0
"""Seconds over which restarts are counted."""
LONGEST_WAIT = 300.0
SAME = 3
"""So many failures alike at one step end a run."""


@dataclass(frozen=True)
class Failure:
    """What a run has failed with.

    Attributes:
        cause: in a clause, the same for the same cause.
        rank, host: where; None where that is not known.
        step: the furthest that a rank had come to; 0 before the first.
        doing: what the rank was doing.
        by_itself: whether the program ended itself, by an error; not so where something killed it or held it up.
        noticed_after: seconds from the last sign of the run until this was seen.
    """

    cause: str
    rank: int | None
    host: str | None
    step: int
    doing: str
    by_itself: bool
    noticed_after: float

    def __str__(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank} " + (f"on {self.host} " if self.host else "")
        return f"{who}{self.cause}" + (f", at {self.doing}" if self.doing else "")


class Restarts:
    """Decides after each failure whether the run is started again, and when.

    Args:
        most: restarts within 24 hours.
        clock: seconds that only rise.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic):
        self.count = 0
        """Restarts so far."""
        self._most, self._clock = most, clock
        self._times: deque[float] = deque()
        self._alike: Counter[tuple[str, int]] = Counter()
        self._furthest, self._in_vain, self._has_trained = 0, 0, False

    def after(self, failure: Failure) -> float | str:
        """Return the seconds to wait before the next start, or in a clause why there is none."""
        self._has_trained |= failure.step > 0
        if self._most == 0:
            return "launch.restarts=0"
        if failure.by_itself and not self._has_trained:
            return "it has failed by itself before its first step, and would again"
        self._alike[failure.cause, failure.step] += 1
        if self._alike[failure.cause, failure.step] >= SAME:
            return f"it has failed alike {SAME} times at step {failure.step:,}"
        now = self._clock()
        while self._times and now - self._times[0] > WITHIN:
            self._times.popleft()
        if len(self._times) >= self._most:
            return f"it has been started again {len(self._times)} times within 24 hours (launch.restarts={self._most})"
        self._in_vain = 0 if failure.step > self._furthest else self._in_vain + 1
        self._furthest = max(self._furthest, failure.step)
        self._times.append(now)
        self.count += 1
        return min(2.0**self._in_vain, LONGEST_WAIT)


@dataclass
class Recovery:
    """The way back from a failure to a step beyond it, by the clock of the watchdog.

    Attributes:
        failure: that it began with.
        noticed: when the failure was seen.
        loading: when the ranks of the next start began to load.
        training: when they took their first step.
    """

    failure: Failure
    noticed: float
    loading: float | None = None
    training: float | None = None

    def seconds(self, now: float) -> dict[str, float]:
        """Split what was lost: until it was noticed, to start again, to load, to compute again what was not saved."""
        loading = self.loading or now
        training = self.training or now
        parts = {
            "noticing": self.failure.noticed_after,
            "restarting": loading - self.noticed,
            "loading": training - loading,
            "recomputing": now - training,
        }
        return {name: round(value, 3) for name, value in {**parts, "lost": sum(parts.values())}.items()}


class Events(EventFile):
    """events.jsonl of a run folder: an object per failure, restart, recovery and giving up."""

    def failed(self, failure: Failure, then: float | str) -> None:
        """Write that a run has failed, and what follows: seconds until it is started again, or why it is not."""
        follows = {"restart_in_seconds": then} if isinstance(then, float) else {"not_restarted": then}
        self.write({"event": "failed", **asdict(failure), **follows})

    def recovered(self, recovery: Recovery, now: float, restarts: int) -> dict[str, float]:
        """Write that a run has come beyond the step that it failed at, and what that has cost; return the seconds."""
        seconds = recovery.seconds(now)
        failure = recovery.failure
        where = {"cause": failure.cause, "rank": failure.rank, "host": failure.host, "step": failure.step}
        self.write({"event": "recovered", **where, "restarts": restarts, "seconds": seconds})
        return seconds
