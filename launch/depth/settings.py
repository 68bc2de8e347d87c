"""The settings of `deepnarrow depth-study`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from math import inf
from typing import Any


class Equal(Enum):
    """What all models of a comparison have the same of."""

    params = "params"
    flops = "flops"


ASPECTS = tuple(map(Fraction, ("8", "4", "2", "1", "1/2", "1/4", "1/8")))
"""What is compared where nothing else is asked for, as far as there are shapes."""


@dataclass
class DepthSettings:
    """The settings ``depth.…``; every other override belongs to each run."""

    aspects: list[str] | None = None
    """Aspects d_model / n_layers as multiples of the preset's, such as [4,2,1,1/2,1/4]: above 1 is shallower and wider.
    null is 8, 4, 2, 1, 1/2, 1/4 and 1/8, as far as there are shapes; those without are said. 1, the preset itself, is
    always among them."""
    equal: list[Equal] = field(default_factory=lambda: list(Equal))
    """What models are made equal by: params, their parameters without embedding and head; flops, their FLOPs a token,
    forward and backward, with the head and causal attention. A shape that is both is trained once."""
    lrs: list[float] | None = None
    """Peak learning rates to try for every shape with the first seed; the other seeds take the best of each shape. null
    is a quarter and a half of optimizer.lr, that, and twice that; a single one is every shape's."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Values of train.seed, each a run of every shape at its rate. An ordering is stated where it holds for each."""
    pp: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    """Pipeline stages that bubble and balance are predicted for."""
    micro_batches: int = 32
    """Micro-batches of the step that bubbles are predicted for."""
    decode_context: int | None = None
    """Tokens in the caches when decoding is timed; null is model.max_seq_len."""
    decode_batch: int = 1
    """Sequences that are decoded together when it is timed."""
    parallel_runs: int | None = None
    """Runs at a time on this machine; null is as many as its cores, or GPUs, allow."""
    dir: str | None = None
    """The folder of the study; null is runs/depth-NAME, by the recipe."""


def aspects_of(settings: DepthSettings) -> tuple[list[Fraction], list[str]]:
    """Read the aspects, the shallowest first and 1 among them; and say in a sentence each which are none."""
    if settings.aspects is None:
        return list(ASPECTS), []
    found, problems = [Fraction(1)], []
    for text in settings.aspects:
        try:
            aspect = Fraction(text)
            if aspect <= 0:
                raise ValueError
        except (ValueError, ZeroDivisionError):
            problems.append(f"depth.aspects: {text} is no number above 0; 4 or 1/4 would work")
            continue
        if aspect not in found:
            found.append(aspect)
        elif aspect != 1 or settings.aspects.count(text) > 1:
            problems.append(f"depth.aspects: {text} stands there twice; once would work")
    if not problems and len(found) == 1:
        problems.append("depth.aspects: nothing to compare the preset with; [4,1,1/4] would work")
    return sorted(found, reverse=True), problems


def problems(settings: DepthSettings) -> list[str]:
    """Say what cannot be, one sentence each with what would work."""
    found = aspects_of(settings)[1]
    found += _listed("equal", [one.value for one in settings.equal], "[params,flops]")
    if settings.lrs is not None:
        found += _numbers("lrs", settings.lrs, least=1e-300, what="above 0", works="null")
    found += _numbers("seeds", settings.seeds, least=0, what="from 0 up", works="[1]")
    found += _numbers("pp", settings.pp, least=2, what="from 2 up", works=None)
    for key in ("micro_batches", "decode_batch", "decode_context"):
        if (value := getattr(settings, key)) is not None and value < 1:
            found.append(f"depth.{key}={getattr(settings, key)}: must be at least 1")
    if settings.parallel_runs is not None and settings.parallel_runs < 1:
        found.append(f"depth.parallel_runs={settings.parallel_runs}: must be at least 1, or null for all cores or GPUs")
    return found


def _numbers(key: str, values: Sequence[float], least: float, what: str, works: str | None) -> list[str]:
    if wrong := [value for value in values if not least <= value < inf]:
        shown = ", ".join(f"{value:g}" for value in values)
        return [f"depth.{key}=[{shown}]: {wrong[0]:g} is not a number {what}"]
    return _listed(key, values, works)


def _listed(key: str, values: Sequence[Any], works: str | None) -> list[str]:
    """Judge a list that may not repeat itself, nor, where it says what would work, be empty."""
    if not values and works:
        return [f"depth.{key}=[]: at least one; {works} would work"]
    if twice := [value for at, value in enumerate(values) if value in values[:at]]:
        return [f"depth.{key}: {twice[0]} stands there twice; once would work"]
    return []
