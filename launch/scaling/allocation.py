"""The best model and tokens by compute, and the loss they reach, from IsoFLOP runs (arXiv 2401.02954, section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.scaling.fits import IsoFlop, PowerLaw, Residuals, bootstrap, isoflop, loss_law, power_law
from launch.scaling.outcomes import Outcome, by_budget
from launch.scaling.rates import law_as_found

Interval = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """The runs of one compute.

    Attributes:
        compute: in FLOPs.
        m, losses: of the runs that have a loss, (n,).
        parabola: through them; None where they have no minimum.
        why: the reason why there is none.
    """

    compute: float
    m: NDArray[np.float64]
    losses: NDArray[np.float64]
    parabola: IsoFlop | None
    why: str | None

    @property
    def lowest(self) -> float:
        """The lowest loss at this compute: the parabola's, where that lies between sizes, else the best run's."""
        return self.parabola.loss if self.parabola and self.parabola.measured else float(self.losses.min())

    def again(self, losses: NDArray[np.float64]) -> "Curve":
        """Return the curve with other losses."""
        return _curve(self.compute, self.m, losses)


def curves_of(outcomes: Sequence[Outcome]) -> list[Curve]:
    """Return a curve for each compute of which a run has a loss, the smallest first."""
    found = []
    for budget, own in by_budget(outcomes).items():
        finite = [one for one in own if np.isfinite(one.loss)]
        if finite:
            m = np.array([one.setting.m for one in finite], float)
            found.append(_curve(budget, m, np.array([one.loss for one in finite])))
    return found


def _curve(compute: float, m: NDArray[np.float64], losses: NDArray[np.float64]) -> Curve:
    try:
        return Curve(compute, m, losses, isoflop(compute, m, losses), None)
    except ValueError as error:
        return Curve(compute, m, losses, None, str(error))


@dataclass(frozen=True)
class _Drawn:
    """Curves of which the same figures are taken as measured and as drawn.

    Attributes:
        curves: all of them.
        laws: the indices of those that M and D are fitted to: whose minimum lies between the sizes measured.
    """

    curves: list[Curve]
    laws: list[int]

    def model_law(self) -> PowerLaw:
        """Fit M by compute."""
        chosen = [self.curves[at].parabola for at in self.laws]
        if None in chosen:
            raise ValueError("drawn losses have no minimum")
        return power_law([one.compute for one in chosen if one], [one.m for one in chosen if one])

    def loss_figures(self) -> list[float]:
        """Return floor, scale and exponent of the loss law, of all computes."""
        law = loss_law([one.compute for one in self.curves], [one.lowest for one in self.curves])
        return [law.floor, law.scale, law.exponent]

    def predicted(self) -> list[float]:
        """Predict the loss at the largest compute from the others, without a floor, and with one where that can be."""
        before, largest = self.curves[:-1], self.curves[-1].compute
        computes, losses = [one.compute for one in before], [one.lowest for one in before]
        found = [power_law(computes, losses).at(largest)]
        return [*found, loss_law(computes, losses).at(largest)] if len(before) > 2 else found

    def figures(self) -> list[float]:
        """Return all figures that intervals are wanted of, in the order in which `as_found` takes them."""
        law = self.model_law() if len(self.laws) > 1 else None
        of_law = [law.coefficient, law.exponent] if law else []
        return [*of_law, *([*self.loss_figures(), *self.predicted()] if len(self.curves) > 2 else [])]


def as_found(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what the IsoFLOP runs say, for JSON.

    Returns:
        ``curves``, a list with ``compute``, ``sizes``, ``m``, ``tokens`` and ``loss`` of the minimum (null where there
        is none), ``curvature``, ``measured`` (whether it lies between the sizes), ``lowest`` and ``why``; ``m`` and
        ``tokens``, the laws M_opt and D_opt as `rates.law_as_found` has them, null where fewer than two computes have
        a minimum between their sizes; ``loss``, with floor, scale, exponent and their intervals; ``held_out``, the
        largest ``compute``, the loss ``measured`` there, and ``predictions``, a list with ``law``, ``loss``,
        ``interval`` and ``error``, the prediction's share above what was measured; ``spread``, the standard deviation
        of a loss around its parabola, in nats; ``draws_without_a_fit``, of 1,000.
    """
    curves = curves_of(outcomes)
    found: dict[str, Any] = {"curves": [_curve_as_found(one) for one in curves]}
    empty = {"m": None, "tokens": None, "loss": None, "held_out": None, "spread": None, "draws_without_a_fit": 0}
    if len(curves) < 2:
        return {**found, **empty}
    measured = _Drawn(curves, [at for at, one in enumerate(curves) if one.parabola and one.parabola.measured])
    intervals, residuals, without = _intervals(measured)
    of = iter(intervals) if intervals else iter([None] * len(measured.figures()))
    found |= empty | {"spread": residuals and residuals.spread, "draws_without_a_fit": without}
    if len(measured.laws) > 1:
        found |= _laws(measured, [next(of), next(of)])
    if len(curves) > 2:
        names = ("floor", "scale", "exponent")
        values = dict(zip(names, measured.loss_figures(), strict=True))
        found["loss"] = {**values, **{f"{name}_interval": next(of) for name in names}}
        found["held_out"] = _held_out(measured, [*of])
    return found


def _held_out(measured: _Drawn, intervals: Sequence[Interval | None]) -> dict[str, Any]:
    *before, largest = measured.curves
    predictions = [
        {"law": name, "loss": loss, "interval": interval, "error": loss / largest.lowest - 1}
        for name, loss, interval in zip(("C^-a", "floor + C^-a"), measured.predicted(), intervals, strict=False)
    ]
    return {
        "compute": largest.compute,
        "measured": largest.lowest,
        "fitted": [before[0].compute, before[-1].compute],
        "predictions": predictions,
    }


def _laws(measured: _Drawn, intervals: Sequence[Interval | None]) -> dict[str, Any]:
    """Return M_opt and D_opt: as M D = C, coefficients are inverse to each other and exponents add up to one."""
    law = measured.model_law()
    fitted = [measured.curves[at].compute for at in measured.laws]
    coefficient, exponent = intervals
    known = [coefficient, exponent] if coefficient and exponent else None
    other = [(1 / known[0][1], 1 / known[0][0]), (1 - known[1][1], 1 - known[1][0])] if known else None
    tokens = PowerLaw(1 / law.coefficient, 1 - law.exponent)
    ends = [fitted[0], fitted[-1]]
    return {"m": law_as_found(law, known, ends), "tokens": law_as_found(tokens, other, ends)}


def _intervals(measured: _Drawn) -> tuple[list[Interval] | None, Residuals | None, int]:
    """Return the 95 % intervals of all figures, of losses drawn around the parabolas; None where none can be drawn."""
    with_parabola = [one for one in measured.curves if one.parabola]
    losses = [loss for one in with_parabola for loss in one.losses]
    fitted = [one.parabola.at(m) for one in with_parabola for m in one.m if one.parabola]
    try:
        residuals = Residuals.of(fitted, losses, len(with_parabola))
    except ValueError:
        return None, None, 0

    def fit(drawn: Sequence[float]) -> list[float]:
        left, curves = iter(drawn), []
        for one in measured.curves:
            own = np.array([next(left) for _ in one.m]) if one.parabola else one.losses
            curves.append(one.again(own))
        return _Drawn(curves, measured.laws).figures()

    try:
        intervals, without = bootstrap(losses, fit, draw=lambda _, random: list(residuals.draw(random)))
    except ValueError:
        return None, residuals, 0
    return intervals, residuals, without


def _curve_as_found(curve: Curve) -> dict[str, Any]:
    parabola = curve.parabola
    return {
        "compute": curve.compute,
        "sizes": len(np.unique(curve.m)),
        "m": parabola and parabola.m,
        "tokens": parabola and parabola.tokens,
        "loss": parabola and parabola.loss,
        "curvature": parabola and parabola.curvature,
        "measured": bool(parabola and parabola.measured),
        "lowest": curve.lowest,
        "why": curve.why,
    }
