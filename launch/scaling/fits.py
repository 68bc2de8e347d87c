"""Power laws and parabolas through measured losses, and how far each can be trusted.

Compute C is in FLOPs, M in non-embedding FLOPs a token, so that C = M D for D tokens (arXiv 2401.02954, section 3.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Row = TypeVar("Row")
BAND = 0.0025
"""The share above the best loss up to which settings count as near-optimal (section 3.1)."""
RESAMPLES = 1000


@dataclass(frozen=True)
class PowerLaw:
    """The law y = coefficient C^exponent.

    Attributes:
        coefficient, exponent: of the law.
    """

    coefficient: float
    exponent: float

    def at(self, compute: float) -> float:
        """Return y at a compute."""
        return self.coefficient * compute**self.exponent

    def __str__(self) -> str:
        return f"{self.coefficient:.4g} C^{self.exponent:.4f}"


@dataclass(frozen=True)
class IsoFlop:
    """The parabola of losses against log M of runs that have cost the same compute.

    Attributes:
        compute: of each run.
        m: where the loss is least.
        loss: the least loss.
        measured: whether `m` lies between the smallest and the largest M that were measured.
        curvature: of the loss by (ln M)^2.
    """

    compute: float
    m: float
    loss: float
    measured: bool
    curvature: float

    @property
    def tokens(self) -> float:
        """The tokens that go with `m`."""
        return self.compute / self.m

    def at(self, m: float) -> float:
        """Return the loss of the parabola at an M."""
        return self.loss + self.curvature * float(np.log(m / self.m)) ** 2


@dataclass(frozen=True)
class LossLaw:
    """The law loss = floor + scale C^-exponent.

    Attributes:
        floor: the loss that no compute goes below, in the unit of the losses.
        scale, exponent: of what is above it.
    """

    floor: float
    scale: float
    exponent: float

    def at(self, compute: float) -> float:
        """Return the loss at a compute."""
        return self.floor + self.scale * compute**-self.exponent


def power_law(compute: ArrayLike, values: ArrayLike) -> PowerLaw:
    """Fit a power law by least squares of the logarithms.

    Args:
        compute: at least two different ones, (n,).
        values: above 0, (n,).

    Raises:
        ValueError: fewer than two computes.
    """
    x, y = np.log(np.asarray(compute, float)), np.log(np.asarray(values, float))
    if len(np.unique(x)) < 2:
        raise ValueError("a power law needs two computes; one more budget would work")
    exponent, intercept = np.polyfit(x, y, 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def near_optimal(losses: ArrayLike, band: float = BAND) -> NDArray[np.bool_]:
    """Tell which losses are within a share of the best; one that is not finite never is."""
    found = np.asarray(losses, float)
    finite = np.isfinite(found)
    return finite & (found <= (1 + band) * found[finite].min()) if finite.any() else finite


def isoflop(compute: float, m: ArrayLike, losses: ArrayLike) -> IsoFlop:
    """Fit the parabola of runs of one compute.

    Args:
        compute: of each run.
        m: of each run, at least three different ones, (n,).
        losses: (n,); runs whose loss is not finite are left out.

    Raises:
        ValueError: there are fewer than three, or the losses have no minimum: the parabola opens downwards.
    """
    x, y = np.log(np.asarray(m, float)), np.asarray(losses, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(np.unique(x)) < 3:
        raise ValueError(f"{compute:.3g} FLOPs: {len(np.unique(x))} sizes have a loss; three or more would work")
    middle = x.mean()  # so that the terms are of one size
    curvature, slope, intercept = np.polyfit(x - middle, y, 2)
    if curvature <= 0:
        raise ValueError(
            f"{compute:.3g} FLOPs: the losses have no minimum between the sizes; sizes farther apart would work"
        )
    lowest = -slope / (2 * curvature)
    at = middle + lowest
    least = intercept + slope * lowest / 2
    return IsoFlop(compute, float(np.exp(at)), float(least), bool(x.min() <= at <= x.max()), float(curvature))


def loss_law(compute: ArrayLike, losses: ArrayLike) -> LossLaw:
    """Fit loss = floor + scale C^-exponent by least squares of what is above the floor, over the floors that can be.

    Args:
        compute: at least three different ones, (n,).
        losses: above 0, (n,).

    Raises:
        ValueError: fewer than three computes.
    """
    x, y = np.log(np.asarray(compute, float)), np.asarray(losses, float)
    if len(np.unique(x)) < 3:
        raise ValueError("a loss law needs three computes; another budget would work")

    def of_floors(floors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        above = np.log(y[:, None] - floors)
        slopes = (x - x.mean()) @ above / np.square(x - x.mean()).sum()
        intercepts = above.mean(0) - slopes * x.mean()
        off = floors + np.exp(intercepts + np.outer(x, slopes)) - y[:, None]
        return np.square(off).sum(0), slopes, intercepts

    low, high = 0.0, float(y.min()) * (1 - 1e-6)
    for _ in range(6):  # a grid, and finer ones around the best of it
        floors = np.linspace(low, high, 41)
        squares, slopes, intercepts = of_floors(floors)
        best = int(squares.argmin())
        low, high = floors[max(best - 1, 0)], floors[min(best + 1, len(floors) - 1)]
    return LossLaw(float(floors[best]), float(np.exp(intercepts[best])), float(-slopes[best]))


def with_replacement(rows: Sequence[Row], random: np.random.Generator) -> Sequence[Row]:
    """Draw as many rows as there are, with replacement (Efron, 1979)."""
    return [rows[at] for at in random.integers(len(rows), size=len(rows))]


def within(key: Callable[[Row], object]) -> Callable[[Sequence[Row], np.random.Generator], Sequence[Row]]:
    """Return a way to draw with replacement within the rows of each key, so that every draw has some of each."""

    def draw(rows: Sequence[Row], random: np.random.Generator) -> Sequence[Row]:
        by_key: dict[object, list[Row]] = {}
        for row in rows:
            by_key.setdefault(key(row), []).append(row)
        return [row for own in by_key.values() for row in with_replacement(own, random)]

    return draw


@dataclass(frozen=True)
class Residuals:
    """Draws of measured losses: fitted ones, and what was off, drawn anew (Efron and Tibshirani, 1993, section 9.4).

    Of the few sizes of a compute a draw with replacement would often leave too few different ones for a parabola; this
    keeps every size, and draws what its loss could as well have been. What is off is pooled over all computes, and
    raised by what the parabolas have followed of it, sqrt(n / (n - 3 k)) for n losses and k parabolas.

    Attributes:
        fitted: the losses by the parabolas, (n,).
        off: what the measured ones are above them, centred and raised, (n,).
    """

    fitted: NDArray[np.float64]
    off: NDArray[np.float64]

    @staticmethod
    def of(fitted: ArrayLike, losses: ArrayLike, parabolas: int) -> "Residuals":
        """Compare losses with parabolas.

        Raises:
            ValueError: the losses are no more than the parabolas have coefficients, so that nothing is off.
        """
        by_fit, measured = np.asarray(fitted, float), np.asarray(losses, float)
        free = len(measured) - 3 * parabolas
        if free < 1:
            raise ValueError("three sizes a compute leave no residuals to draw from; four or more would work")
        off = (measured - by_fit) * np.sqrt(len(measured) / free)
        return Residuals(by_fit, off - off.mean())

    def draw(self, random: np.random.Generator) -> NDArray[np.float64]:
        """Draw losses, (n,)."""
        return self.fitted + self.off[random.integers(len(self.off), size=len(self.off))]

    @property
    def spread(self) -> float:
        """The standard deviation of a loss around its parabola."""
        return float(np.sqrt(np.square(self.off).mean()))


def bootstrap(
    rows: Sequence[Row],
    fit: Callable[[Sequence[Row]], Sequence[float]],
    resamples: int = RESAMPLES,
    seed: int = 1,
    level: float = 0.95,
    draw: Callable[[Sequence[Row], np.random.Generator], Sequence[Row]] = with_replacement,
) -> tuple[list[tuple[float, float]], int]:
    """Return the confidence intervals of what is fitted, by fits to rows drawn from those measured.

    Args:
        rows: measured.
        fit: returns the figures of a fit; raises ValueError where drawn rows allow none.
        resamples: the number of draws.
        seed: of the draws.
        level: of confidence.
        draw: draws rows.

    Returns:
        The ends of each figure's interval, by percentiles, and the number of draws that allowed no fit.

    Raises:
        ValueError: none of the draws allowed one.
    """
    random = np.random.default_rng(seed)
    found, without = [], 0
    for _ in range(resamples):
        try:
            found.append(list(fit(draw(rows, random))))
        except ValueError:
            without += 1
    if not found:
        raise ValueError("no draw of the rows allows a fit; more runs would work")
    ends = np.quantile(np.array(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [(float(low), float(high)) for low, high in ends.T], without
