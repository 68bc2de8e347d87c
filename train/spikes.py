"""Spikes: steps whose loss or gradient norm is far above those of the steps before, and what is known of skipped steps.

The update of such a step is skipped, as by the skip-step optimizers of OLMo-core: it is a spike where the loss or the
norm is more than `train.spike_sigmas` standard deviations above the mean of a window of the steps before. The limits
are known before a step begins; the engine compares with them on the device, and the host waits for nothing more.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from conf.ranges import joined
from parallel.engine import Limits, StepResult
from train.log_lines import CALMER, EVERY_SECONDS
from train.patient_file import PatientFile
from train.records import SKIPPED
from train.strict_json import dumps_flagged

WINDOW = 128
"""The most steps that a window holds; OLMo-core's default."""
LEAST = 64
"""The steps that a window holds before it limits anything."""

Kind = list[Any]
"""What makes steps comparable, as JSON: global batch, sequence length, and the shares of the sources."""


class SpikeWindow:
    """The losses and gradient norms of the last steps of one kind, and the limits that follow from them.

    A step of another kind begins a new window: the noise of a loss goes with the batch, and its level with the data. A
    step above a limit enters the window as that limit. So a single spike, however high, blinds the window to no other,
    and a level that rises for good is followed: each step that is skipped for it widens the limit by an eighth or so.
    The state is the same on every rank, as the figures are, and so are the limits: the sums are exactly rounded.

    Args:
        sigmas: standard deviations above the mean at which a step is a spike; None sets no limit.
        state: from `as_json` of the window that a checkpoint holds; None for an empty one.
    """

    def __init__(self, sigmas: float | None, state: Mapping[str, Any] | None = None):
        self._sigmas = sigmas
        self._kind: Kind | None = state["kind"] if state else None
        self._losses: deque[float] = deque(state["loss"] if state else (), WINDOW)
        self._norms: deque[float] = deque(state["grad_norm"] if state else (), WINDOW)

    def __len__(self) -> int:
        return len(self._losses)

    def limits(self, kind: Kind) -> Limits:
        """Return the limits of the next step, which is of a kind; infinite while the window holds too few steps."""
        if kind != self._kind:
            self._kind = kind
            self._losses.clear()
            self._norms.clear()
        if self._sigmas is None or len(self) < LEAST:
            return Limits()
        return Limits(_above(self._losses, self._sigmas), _above(self._norms, self._sigmas))

    def add(self, result: StepResult, limits: Limits) -> None:
        """Add the step that was taken with these limits; one whose figures are not finite is left out."""
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            self._losses.append(min(result.loss, limits.loss))
            self._norms.append(min(result.grad_norm, limits.grad_norm))

    def as_json(self) -> dict[str, Any]:
        """Return the state, with which a resumed run decides as the one that it goes on from."""
        return {"kind": self._kind, "loss": list(self._losses), "grad_norm": list(self._norms)}


def _above(values: Sequence[float], sigmas: float) -> float:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean + sigmas * math.sqrt(variance)


@dataclass(frozen=True)
class SkippedStep:
    """A step whose update was skipped.

    Attributes:
        step: its number.
        reason: ``not finite``, ``loss`` or ``grad_norm``, the figure that was above its limit.
        why: the same in a clause.
        loss, grad_norm: of the step.
        loss_limit, grad_norm_limit: in force; None where there were none yet.
        seq_len: tokens of its sequences.
        samples: places in the order of the run, first and last, which `train.skip_samples_at` takes.
        places: of each source, the places of its samples in the source's own order, first and last of each stretch.
        sequences: of each source, which of its sequences those are, in the order of the places.
    """

    step: int
    reason: str
    why: str
    loss: float
    grad_norm: float
    loss_limit: float | None
    grad_norm_limit: float | None
    seq_len: int
    samples: list[list[int]]
    places: dict[str, list[list[int]]]
    sequences: dict[str, list[int]]

    @staticmethod
    def of(
        step: int,
        result: StepResult,
        limits: Limits,
        numbers: NDArray[Any],
        seq_len: int,
        names: Sequence[str],
        places: NDArray[Any],
        sequences: NDArray[Any],
    ) -> "SkippedStep":
        """Describe a step that was skipped.

        Args:
            step: its number.
            result: of the engine.
            limits: that it was taken with.
            numbers: (n,) places of its samples in the order of the run.
            seq_len: tokens of each.
            names, places, sequences: of each sample: its source, its place in the order of that, and the sequence.
        """
        reason, why = _reason(result, limits)
        of_source = {name: [i for i, one in enumerate(names) if one == name] for name in dict.fromkeys(names)}
        return SkippedStep(
            step=step,
            reason=reason,
            why=why,
            loss=result.loss,
            grad_norm=result.grad_norm,
            loss_limit=limits.loss if math.isfinite(limits.loss) else None,
            grad_norm_limit=limits.grad_norm if math.isfinite(limits.grad_norm) else None,
            seq_len=seq_len,
            samples=stretches(numbers.tolist()),
            places={name: stretches(places[chosen].tolist()) for name, chosen in of_source.items()},
            sequences={name: sequences[chosen].tolist() for name, chosen in of_source.items()},
        )

    @property
    def figures(self) -> dict[str, Any]:
        """What of it stands in the record of the step."""
        limits = {"loss_limit": self.loss_limit, "grad_norm_limit": self.grad_norm_limit}
        return {"skipped": self.reason} | {key: limit for key, limit in limits.items() if limit is not None}


def stretches(numbers: Sequence[int]) -> list[list[int]]:
    """Join whole numbers to stretches of consecutive ones, first and last of each."""
    return [[one.start, one[-1]] for one in joined(range(number, number + 1) for number in numbers)]


def _reason(result: StepResult, limits: Limits) -> tuple[str, str]:
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        return "not finite", f"its loss or gradients are not finite (loss {result.loss}, norm {result.grad_norm})"
    above = [
        (name, said, value, limit)
        for name, said, value, limit in (
            ("loss", "loss", result.loss, limits.loss),
            ("grad_norm", "gradient norm", result.grad_norm, limits.grad_norm),
        )
        if value > limit
    ]
    said = " and ".join(f"its {said} of {value:.4g} is above {limit:.4g}" for _, said, value, limit in above)
    return above[0][0], f"{said}, train.spike_sigmas above the mean of the steps before"


class SkippedSteps:
    """Counter of the steps of a run whose updates were skipped, the file that lists them, and what to say of them.

    Attributes:
        total: so many in the run, those before it was resumed among them.
        said: whether anything has been said so far.
        file: the list; None until there is something to write.

    Args:
        run_dir: the run folder.
        clock: seconds that only rise.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic):
        self._path, self._clock, self._last = run_dir / SKIPPED, clock, -float("inf")
        self.total, self.said = 0, False
        self.file = PatientFile(self._path, clock) if self._path.exists() else None

    def add(self, skipped: SkippedStep) -> str | None:
        """Count and write down a step that was skipped.

        Returns:
            The warning to log of it, the first time and then at most once a minute.
        """
        self.total += 1
        self.file = self.file or PatientFile(self._path, self._clock)
        self.file.write(dumps_flagged(asdict(skipped)))
        now = self._clock()
        if now - self._last < EVERY_SECONDS:
            return None
        self._last, self.said = now, True
        samples = ", ".join(f"{first:,} to {last:,}" for first, last in skipped.samples)
        finite = skipped.reason != "not finite"
        helps = f"train.skip_steps=[{skipped.step}] and resume=… of an earlier checkpoint" if finite else CALMER
        return (
            f"step {skipped.step} was skipped: {skipped.why}, and the weights stay as they were; its batch is samples "
            f"{samples} of the order ({', '.join(skipped.places)}; {SKIPPED} has the sequences); where that goes on, "
            f"{helps} would help; skipped so far: {self.total:,}"
        )
