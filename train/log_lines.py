"""Progress of a run in its log: lines with loss, norm, speed, the time that is left, and what the run costs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EVERY_SECONDS = 60.0
"""Seconds between two lines of one kind where no number of steps is set."""
CALMER = "a lower optimizer.lr, a longer schedule.warmup_steps or a smaller optimizer.clip"
"""What to try where losses or gradients are not finite."""
_DAY = 86_400.0


@dataclass(frozen=True)
class Cost:
    """What a run costs, by the hour.

    The steps of earlier starts count with their own seconds, at today's price and ranks; of this start, all of the time
    does, evaluation and saves too.

    Attributes:
        per_hour: of all ranks, in the currency of the cluster's price.
        seconds_before: of the steps of earlier starts.
    """

    per_hour: float
    seconds_before: float = 0.0

    def after(self, seconds: float) -> float:
        """Return what the run has cost after so many seconds of this start."""
        return (self.seconds_before + seconds) / 3600 * self.per_hour


class Pace:
    """The pace of a run since its first step in this process, evaluation and saves included.

    Args:
        steps: length of the run.
        cost: of it; None where no price is known.
        clock: seconds that only rise; the run has begun now.
    """

    def __init__(self, steps: int, cost: Cost | None = None, clock: Callable[[], float] = time.monotonic):
        self.steps, self._cost, self._clock, self._begun = steps, cost, clock, clock()
        self._first: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        self._first_at = self._last_at = self._begun

    def step(self, record: dict[str, Any]) -> None:
        """Take note of a step that was just taken: its record with step, tokens and seconds."""
        self._last, self._last_at = record, self._clock()
        if self._first is None:
            self._first, self._first_at = record, self._last_at

    @property
    def seconds_left(self) -> float:
        """The seconds that the other steps will take at this pace; after the first step, at its own."""
        return self._seconds_a_step() * (self.steps - self._last["step"])

    @property
    def tokens_per_day(self) -> float | None:
        """The tokens that a day at this pace is; None where one step alone has been taken, whose pace tells little."""
        if self._first is None or self._last_at <= self._first_at:
            return None
        return (self._last["tokens"] - self._first["tokens"]) / (self._last_at - self._first_at) * _DAY

    def said(self) -> list[str]:
        """Say tokens a day and what the run has cost and will have cost, as far as they are known."""
        lines = [] if self.tokens_per_day is None else [f"{as_count(self.tokens_per_day)} tokens/day"]
        if self._cost is not None:
            so_far = self._last_at - self._begun
            whole = self._cost.after(so_far + self.seconds_left)
            lines.append(f"cost {self._cost.after(so_far):,.2f}, at the end {whole:,.2f}")
        return lines

    def spent(self) -> str | None:
        """Say what the run has cost up to now, and how that is counted; None where no price is known."""
        if self._cost is None:
            return None
        seconds = self._clock() - self._begun
        before = self._cost.seconds_before
        earlier = f", and {as_duration(before)} of steps before" if before else ""
        hourly = f"at {self._cost.per_hour:,.2f} an hour"
        return f"{self._cost.after(seconds):,.2f}: {as_duration(seconds)} since this start{earlier}, {hourly}"

    def _seconds_a_step(self) -> float:
        assert self._first is not None
        steps = self._last["step"] - self._first["step"]
        return (self._last_at - self._first_at) / steps if steps else float(self._last.get("seconds", 0.0))


class StepLines:
    """Lines of a log file about steps: the first, the last, and some between.

    Args:
        pace: of the run.
        every: steps from one line to the next (`train.log_every`); None makes it a minute.
        clock: seconds that only rise.
    """

    def __init__(self, pace: Pace, every: int | None, clock: Callable[[], float] = time.monotonic):
        self._pace, self._every, self._clock = pace, every, clock
        self._last: float | None = None

    def line(self, record: dict[str, Any]) -> str | None:
        """Write the line of a step, of which the pace has been told; None where the log has none.

        Args:
            record: of the step: step, loss, grad_norm, lr, seconds and tokens_per_second; mfu and predicted_seconds
                where they are known.
        """
        step, now = record["step"], self._clock()
        regular = step % self._every == 0 if self._every else self._last is None or now - self._last >= EVERY_SECONDS
        if not (self._last is None or regular or step == self._pace.steps):
            return None
        self._last = now
        speed = f"{record['tokens_per_second']:.0f} tokens/s"
        if predicted := record.get("predicted_seconds"):
            speed += f" ({predicted / record['seconds']:.0%} of what is predicted)"
        left = f"eta {as_duration(self._pace.seconds_left)}"
        of_loss = [f"step {step}/{self._pace.steps}", *loss_and_norm(record), f"lr {record['lr']:.2e}"]
        return "  ".join([*of_loss, speed, *mfu(record), left, *self._pace.said()])


def loss_and_norm(record: dict[str, Any]) -> list[str]:
    """Format a step's loss and the norm of its gradients."""
    return [f"loss {record['loss']:.4f}", f"norm {record['grad_norm']:.3f}"]


def mfu(record: dict[str, Any]) -> list[str]:
    """Format a step's model FLOPs utilization, causal attention halved; nothing where the device's peak is unknown."""
    return [f"MFU {record['mfu']:.1%}"] if "mfu" in record else []


def on_bar(record: dict[str, Any]) -> str:
    """Format what a progress bar says of a step, beside the time that is left."""
    return "  ".join([*loss_and_norm(record), *mfu(record)])


def as_count(number: float) -> str:
    """Format a large number with three digits, as ``1.23 billion``."""
    for size, name in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + name
    return f"{number:,.0f}"


def as_duration(seconds: float) -> str:
    """Format a duration, as ``04:10:33``, or ``3 d 04:10`` from a day on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02}:{minute:02}" if days else f"{hour:02}:{minute:02}:{second:02}"
