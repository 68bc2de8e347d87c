"""Progress of a run in its log: lines with loss, speed and ETA."""

import time
from collections.abc import Callable
from typing import Any

EVERY_SECONDS = 60.0
"""Seconds between two lines of one kind where no number of steps is set."""
CALMER = "a lower optimizer.lr, a longer schedule.warmup_steps or a smaller optimizer.clip"
"""What to try where losses or gradients are not finite."""


class StepLines:
    """Lines of a log file about steps: the first, the last, and some between.

    Args:
        steps: length of the run.
        every: steps from one line to the next (`train.log_every`); None makes it a minute.
        clock: seconds that only rise.
    """

    def __init__(self, steps: int, every: int | None, clock: Callable[[], float] = time.monotonic):
        self._steps, self._every, self._clock = steps, every, clock
        self._first: tuple[int, float] | None = None
        self._last = 0.0

    def line(self, record: dict[str, Any]) -> str | None:
        """Write the line of a step; None where the log has none.

        Args:
            record: of the step: step, loss, lr, seconds and tokens_per_second; predicted_seconds where known.
        """
        step, now = record["step"], self._clock()
        first = self._first is None
        if self._first is None:
            self._first = step, now
        regular = step % self._every == 0 if self._every else now - self._last >= EVERY_SECONDS
        if not (first or regular or step == self._steps):
            return None
        self._last = now
        speed = f"{record['tokens_per_second']:.0f} tokens/s"
        if predicted := record.get("predicted_seconds"):
            speed += f" ({predicted / record['seconds']:.0%} of what is predicted)"
        return (
            f"step {step}/{self._steps}  {loss_and_rate(record)}  {speed}  "
            f"eta {as_duration(self._seconds_left(step, now, record.get('seconds', 0.0)))}"
        )

    def _seconds_left(self, step: int, now: float, seconds: float) -> float:
        """Extrapolate the pace since the first step, evaluation and saves included; of the first step, its own."""
        assert self._first is not None
        first, began = self._first
        pace = (now - began) / (step - first) if step > first else seconds
        return pace * (self._steps - step)


def loss_and_rate(record: dict[str, Any]) -> str:
    """Format a step's loss and learning rate."""
    return f"loss {record['loss']:.4f}  lr {record['lr']:.2e}"


def as_duration(seconds: float) -> str:
    """Format a duration, as ``04:10:33``, or ``3 d 04:10`` from a day on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02}:{minute:02}" if days else f"{hour:02}:{minute:02}:{second:02}"
