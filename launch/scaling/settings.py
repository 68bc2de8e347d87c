"""The settings of `deepnarrow scaling`."""

from dataclasses import dataclass, field
from math import inf

FEWEST_SIZES = 3
"""What a parabola needs."""


@dataclass
class ScalingSettings:
    """The settings ``scaling.…``; every other override belongs to each run."""

    budgets: list[float] = field(default_factory=lambda: [2.5e11, 6.3e11, 1.6e12, 4e12])
    """Computes C = M D of the IsoFLOP runs in FLOPs, three at least; four or more leave three to predict the largest
    by. Tokens are C / M, rounded to whole steps."""
    sizes: int = 5
    """Models of each budget. Their M span a decade around what the paper's law gives for it, 0.1715 C^0.5243."""
    shapes: list[str] = field(default_factory=list)
    """Models as layers x width, such as [2x32,4x64,6x96], in place of derived ones: all of them for each budget."""
    rates: list[float] = field(default_factory=lambda: [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2])
    """Peak learning rates of the grid."""
    batches: list[int] = field(default_factory=lambda: [4, 8, 16])
    """Batches of the grid in sequences, as train.global_batch."""
    rate_budgets: list[float] = field(default_factory=lambda: [2e11, 8e11])
    """Computes of the grid of rates and batches, two at least, each with the one model that the paper's law gives for
    it. The IsoFLOP runs take rate and batch from the power laws that are fitted to it, within what was tried. [] tries
    none: every run takes optimizer.lr and train.global_batch."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Values of train.seed, each a run of every setting."""
    parallel_runs: int | None = None
    """Runs at a time on this machine; null is as many as its cores, or GPUs, allow."""
    dir: str | None = None
    """The folder of the study; null is runs/scaling-NAME, by the recipe."""


def problems(settings: ScalingSettings) -> list[str]:
    """Say what cannot be, one sentence each with what would work."""
    found = []
    for key in ("budgets", "rates", "batches", "rate_budgets", "seeds"):
        values = getattr(settings, key)
        said = f"scaling.{key}=[{', '.join(f'{value:g}' for value in values)}]"
        least = 0 if key == "seeds" else 1e-300
        if wrong := [value for value in values if not least <= value < inf]:
            what = "a number from 0 up" if key == "seeds" else "a number above 0"
            found.append(f"{said}: {wrong[0]:g} is not {what}")
        elif twice := [value for at, value in enumerate(values) if value in values[:at]]:
            found.append(f"{said}: {twice[0]:g} stands there twice; once would work")
        elif len(values) < (fewest := _fewest(key, settings)):
            found.append(f"{said}: {_WHY[key].format(fewest=fewest)}")
    if settings.sizes < FEWEST_SIZES:
        found.append(f"scaling.sizes={settings.sizes}: a parabola needs {FEWEST_SIZES}; 5 would work")
    if settings.shapes and len(settings.shapes) < FEWEST_SIZES:
        works = "[] derives them, or three would work"
        found.append(f"scaling.shapes=[{','.join(settings.shapes)}]: a parabola needs {FEWEST_SIZES}; {works}")
    if settings.parallel_runs is not None and settings.parallel_runs < 1:
        found.append(
            f"scaling.parallel_runs={settings.parallel_runs}: must be at least 1, or null for all cores or GPUs"
        )
    return found


_WHY = {
    "budgets": "M and tokens are fitted through computes, of which three at least would work",
    "rates": "a grid needs {fewest} rates at least; scaling.rate_budgets=[] tries none",
    "batches": "a grid needs a batch at least; scaling.rate_budgets=[] tries none",
    "rate_budgets": "a power law needs two computes; another one would work, and [] tries no rates",
    "seeds": "at least one, such as [1]",
}


def _fewest(key: str, settings: ScalingSettings) -> int:
    tries = bool(settings.rate_budgets)
    return {"budgets": 3, "rates": 2 * tries, "batches": int(tries), "rate_budgets": 2 * tries, "seeds": 1}[key]
