"""Trains the runs of a study, several at a time, and goes on with what was stopped."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from conf.compose import quoted
from launch.supervise import PassedOn, shell_code
from launch.trainings.starts import Started, Starter, Starts, log_tail, starter
from launch.trainings.written import say_aside
from model.problems import BadInput
from parallel.layout import Layout
from train.preflight import PreparedRun, preflight
from train.records import METRICS, SUMMARY, is_over, records
from train.strict_json import with_nan

LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Training:
    """One run of a study.

    Attributes:
        name: of the run, also in W&B.
        run_dir: its folder.
        overrides: what it is configured by, besides name and folder.
        may_diverge: whether a loss that is not finite is a result, as at a learning rate that is too high.
    """

    name: str
    run_dir: Path
    overrides: tuple[str, ...]
    may_diverge: bool = False

    @property
    def arguments(self) -> list[str]:
        """All overrides."""
        return [*self.overrides, f"name={quoted(self.name)}", f"hydra.run.dir={quoted(self.run_dir.absolute())}"]

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to train."""
        return is_over(self.run_dir) if self.may_diverge else is_complete(self.run_dir)


def is_complete(run_dir: Path) -> bool:
    """Tell whether the run in a folder has been trained to its end."""
    try:
        return bool(json.loads((run_dir / SUMMARY).read_text("utf-8"))["complete"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def val_losses(run_dir: Path) -> dict[int, float]:
    """Read the validation losses of a run in nats, by step; NaN where one was not finite."""
    found = map(with_nan, records(run_dir / METRICS))
    return {record["step"]: record["val_loss"] for record in found if "val_loss" in record}


def last_record(run_dir: Path) -> dict[str, Any]:
    """Read the last whole record of a run's metrics; empty where there is none."""
    last: dict[str, Any] = {}
    for record in records(run_dir / METRICS):
        last = record
    return with_nan(last)


def problems_of(trainings: Sequence[Training]) -> list[str]:
    """Check every training that is not done, and prepare its data; return what stands in the way, each said once."""
    found: list[str] = []
    for training in trainings:
        if not training.is_done:
            try:
                preflight(training.arguments)
            except BadInput as error:
                found += [problem for problem in error.problems if problem not in found]
    return found


def train_all(
    trainings: Sequence[Training],
    *,
    at_once: int | None = None,
    say: Callable[[str], None] = say_aside,
    start: Starts = starter,
    failed: Callable[[Training], None] = lambda training: None,
) -> int | None:
    """Train all that is not done, in this order, and wait for it.

    A first signal has those that run save and end; a second ends them at once. Where one fails, no other is begun, and
    those that run save and end.

    Args:
        trainings: the runs.
        at_once: runs at a time; None is as many as the cores, or GPUs, allow.
        say: reports progress.
        start: makes what starts them.
        failed: is told which one has failed.

    Returns:
        None where all are done; 0 where they were stopped, and the same command goes on; 128 + N where a second signal
        N ended them at once; else the exit code for the shell of the one that failed, also while it was being stopped.

    Raises:
        BadInput: a training cannot work; those before it have been trained.
    """
    left = [training for training in trainings if not training.is_done]
    if not left:
        return None
    first = preflight(left[0].arguments)
    with PassedOn() as signals, start(_most_ranks(left, first), at_once) as starts:
        under_way = _UnderWay(starts.slots)
        signals.to(under_way)
        return _train(left, len(trainings), starts, under_way, signals, say, failed)


@dataclass
class _Run:
    training: Training
    started: Started
    began: float


class Trains(Protocol):
    """What trains the runs of a study, as `train_all` does."""

    def __call__(self, trainings: Sequence[Training], *, at_once: int | None) -> int | None:
        """Train all that is not done; return None where all are done, else the exit code."""


class _UnderWay:
    """The trainings that run, by slot."""

    def __init__(self, slots: int):
        self.runs: dict[int, _Run] = {}
        self.slots = slots

    def free(self) -> Iterator[int]:
        """Yield the slots that are free."""
        return (slot for slot in range(self.slots) if slot not in self.runs)

    def signal(self, number: int) -> bool:
        """Send a signal to all; return whether there are any."""
        return any([run.started.signal(number) for run in list(self.runs.values())])

    def kill(self) -> None:
        """End all at once."""
        for run in list(self.runs.values()):
            run.started.kill()

    def ended(self) -> list[tuple[_Run, int]]:
        """Return those that have ended since, each with its exit code."""
        codes = {slot: run.started.poll() for slot, run in self.runs.items()}
        return [(self.runs.pop(slot), code) for slot, code in codes.items() if code is not None]


def _train(
    left: Sequence[Training],
    total: int,
    starts: Starter,
    under_way: _UnderWay,
    signals: PassedOn,
    say: Callable[[str], None],
    tell: Callable[[Training], None],
) -> int | None:
    waiting, done, failed = list(left), total - len(left), 0
    try:
        while under_way.runs or (waiting and not failed and signals.first is None):
            if not failed and signals.first is None and waiting and (slot := next(under_way.free(), None)) is not None:
                training = waiting.pop(0)
                prepared = preflight(training.arguments)
                if signals.first is None:
                    under_way.runs[slot] = _Run(training, starts.start(prepared, slot), time.monotonic())
                    # A signal meanwhile has told the others, or found nobody to tell and is the end of all.
                    if signals.fatal is not None:
                        under_way.kill()
                    elif signals.first is not None:
                        under_way.runs[slot].started.signal(signal.SIGTERM)
                continue
            for run, code in under_way.ended():
                if run.training.is_done:
                    done += 1
                    say(_said(run, done, total))
                elif not failed and _has_failed(code, signals):
                    failed = shell_code(code) or 1
                    what = f"ended with {code}" if code else "ended without an error, and is not complete"
                    say(f"{run.training.name}: {what} ({run.training.run_dir}); it said last:\n"
                        f"{log_tail(run.training.run_dir)}")  # fmt: skip
                    tell(run.training)
                    under_way.signal(signal.SIGTERM)
            time.sleep(LOOK_SECONDS)
    except (BadInput, OSError, RuntimeError):  # one cannot be started
        under_way.signal(signal.SIGTERM)
        while under_way.runs:
            under_way.ended()
            time.sleep(LOOK_SECONDS)
        raise
    if signals.fatal is not None:
        return 128 + signals.fatal
    if failed:
        return failed
    if signals.first is not None:
        say(f"stopped after {done} of {total} trainings; the same command goes on")
        return 0
    return None


def _has_failed(code: int, signals: PassedOn) -> bool:
    """Tell whether a training that is not done has failed; one that was told to stop ends with 0 once it has saved."""
    if signals.fatal is not None:
        return False
    return signals.first is None or code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


def _said(run: _Run, done: int, total: int) -> str:
    losses = val_losses(run.training.run_dir)
    loss = f", validation loss {list(losses.values())[-1]:.4f}" if losses else ""
    diverged = "" if is_complete(run.training.run_dir) else ", diverged"
    return f"{done} of {total} trained: {run.training.name}{loss}{diverged}, {time.monotonic() - run.began:.0f} s"


def _most_ranks(left: Sequence[Training], first: PreparedRun) -> int:
    """Return the ranks of the largest training: all are alike where their layouts say the same."""
    own = [text for text in left[0].overrides if text.startswith("parallel.")]
    ranks = first.layout.world_size
    layouts: dict[tuple[str, ...], Layout] = {tuple(own): first.layout}
    for training in left[1:]:
        said = tuple(text for text in training.overrides if text.startswith("parallel."))
        if said not in layouts:
            layouts[said] = preflight(training.arguments, writes=False).layout
            ranks = max(ranks, layouts[said].world_size)
    return ranks
