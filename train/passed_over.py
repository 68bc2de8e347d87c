"""What a run passes over on purpose: steps (`train.skip_steps`) and samples (`train.skip_samples_at`) of bad data."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from conf.ranges import below, joined, minus, ranges_of, said
from conf.schema import Config
from train.checkpoint.manifest import Manifest
from train.length import Consumed, Length

if TYPE_CHECKING:
    from train.data.mixed_order import MixedOrder

STEPS, SAMPLES = "skip_steps", "skip_samples_at"


def last_step_problems(config: Config, length: Length) -> list[str]:
    """Say that a run may not pass over its last step, in a sentence."""
    ranges = ranges_of(config.train.skip_steps)
    last = next((one for one in ranges if length.steps in one), None)
    if last is None:
        return []
    end = last.start - 1
    return [
        f"train.skip_steps={said(ranges)}: step {length.steps:,} is the last of the run, which is validated and saved; "
        + (f"train.max_steps={end} would end before it" if end else "a longer run would work")
    ]


def warnings(config: Config, length: Length) -> list[str]:
    """Warn of steps that the run does not have, in a sentence."""
    late = minus(ranges_of(config.train.skip_steps), [range(length.steps + 1)])
    return [f"train.skip_steps={said(late)}: never reached, the run ends with step {length.steps:,}"] if late else []


def announced(config: Config, order: "MixedOrder", length: Length) -> list[str]:
    """Say which samples the run passes over, with those of each source, and which it never reaches."""
    samples = length.samples_after(length.steps)
    lines = []
    for places, of in order.passed_over(samples):
        sources = ", ".join(f"{len(each):,} of {name}, {_ends(each)} of its order" for name, each in of.items())
        lines.append(f"train.skip_samples_at: samples {_ends(places)} are passed over: {sources}")
    late = minus(ranges_of(config.train.skip_samples_at), [range(order.consumed(length, length.steps).place)])
    lines += [f"train.skip_samples_at={said(late)}: never reached before the run ends"] if late else []
    return lines


def _ends(one: range) -> str:
    return f"{one.start:,} to {one[-1]:,}"


def problems(
    config: Config, found: Manifest, now: Consumed, earlier: Iterable[tuple[Path, Manifest, Consumed]] = ()
) -> list[str]:
    """Say why a checkpoint is no place to go on from: what is to be passed over was trained on, or the other way.

    Args:
        config: of the run.
        found: the checkpoint.
        now: what was trained on and passed over by its step.
        earlier: checkpoints before it with their paths and what was trained on by then, newest first, of which one may
            be the place.
    """
    lines = []
    conflicts = _conflicts(config, found, now)
    suited = (path for path, one, by_then in earlier if not _trained(config, one, by_then))
    back = next(suited, None) if any(trained for trained, _ in conflicts.values()) else None
    for key, (trained, dropped) in conflicts.items():
        asked = ranges_of(getattr(config.train, key))
        what = "steps" if key == STEPS else "samples"
        if trained:
            works = f"resume={back} goes back before that" if back else "resume=never would start again"
            without = said(minus(asked, trained))
            lines.append(
                f"train.{key}={said(asked)}: the checkpoint of step {found.step:,} has trained on {what} "
                f"{said(trained)[1:-1]}; {works}, or train.{key}={without} to go on with what they did"
            )
        if dropped:
            both = joined([*asked, *dropped])
            lines.append(
                f"train.{key}={said(asked)}: the run has passed over {what} {said(dropped)[1:-1]} by step "
                f"{found.step:,}, on which the places of all others rest; train.{key}={said(both)} would work"
            )
    return lines


def _trained(config: Config, found: Manifest, now: Consumed) -> bool:
    """Tell whether a checkpoint has trained on anything that is to be passed over."""
    return any(trained for trained, _ in _conflicts(config, found, now).values())


def _conflicts(config: Config, found: Manifest, now: Consumed) -> dict[str, tuple[list[range], list[range]]]:
    """Return by key the ranges that were trained on and are to be passed over, and those that are no longer to be.

    Steps that were passed over stay so whatever the settings say: they say nothing of what comes.
    """
    conflicts = {}
    for key, end in ((STEPS, found.step + 1), (SAMPLES, now.place)):
        asked = below(ranges_of(getattr(config.train, key)), end)
        then = below(ranges_of(found.config["train"].get(key, [])), end)
        conflicts[key] = minus(asked, then), minus(then, asked) if key == SAMPLES else []
    return conflicts
