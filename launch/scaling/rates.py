"""The best learning rate and batch by compute, from a grid at small computes (arXiv 2401.02954, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from launch.scaling.fits import BAND, PowerLaw, bootstrap, near_optimal, power_law, within
from launch.scaling.outcomes import Outcome, by_budget
from launch.scaling.plan import Laws
from model.problems import BadInput


@dataclass(frozen=True)
class Tried:
    """A rate and a batch that were tried at a compute.

    Attributes:
        budget: what the runs were asked to cost, in FLOPs.
        lr, batch_tokens: of the setting.
        loss: the mean over its seeds; NaN where one of them diverged.
        near: whether the loss is within `fits.BAND` of the budget's best.
    """

    budget: float
    lr: float
    batch_tokens: int
    loss: float
    near: bool


def tried_of(outcomes: Sequence[Outcome]) -> list[Tried]:
    """Return what was tried, by budget, and which of it is near-optimal."""
    found = []
    for budget, own in by_budget(outcomes).items():
        seeds: dict[tuple[int, float], list[Outcome]] = {}
        for outcome in own:
            seeds.setdefault((outcome.setting.global_batch, outcome.setting.lr), []).append(outcome)
        means = {key: fmean(outcome.loss for outcome in some) for key, some in seeds.items()}
        for near, (key, some) in zip(near_optimal(list(means.values())), seeds.items(), strict=True):
            setting = some[0].setting
            batch = setting.global_batch * setting.seq_len
            found.append(Tried(budget, setting.lr, batch, means[key], bool(near)))
    return found


def laws_of(tried: Sequence[Tried]) -> Laws:
    """Fit both power laws through what is near-optimal.

    Raises:
        ValueError: that is of fewer than two computes.
    """
    near = [one for one in tried if one.near]
    compute = [one.budget for one in near]  # what rounding to steps of other batches changes of it is no other compute
    return Laws(power_law(compute, [one.lr for one in near]), power_law(compute, [one.batch_tokens for one in near]))


def laws_of_grid(outcomes: Sequence[Outcome]) -> Laws:
    """Fit the laws that the IsoFLOP runs are trained by.

    Raises:
        BadInput: not two computes have runs that did not diverge.
    """
    try:
        return laws_of(tried_of(outcomes))
    except ValueError:
        without = [f"{budget:g}" for budget, own in by_budget(outcomes).items() if not any(o.loss < 1e9 for o in own)]
        raise BadInput(
            [f"scaling.rate_budgets: every run of {', '.join(without)} FLOPs diverged; lower scaling.rates would work"]
        ) from None


def as_found(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Return what the grid says, for JSON; None where there is none.

    Returns:
        ``band``; ``budgets``, a list with ``compute``, ``shape``, ``m``, ``tokens``, ``best`` (lr, batch_tokens, loss),
        ``near_optimal`` (how many settings are), ``tried`` (how many were), ``diverged``, and ``edges``, what of the
        best one lies at the end of what was tried; ``lr`` and ``batch_tokens``, each a law with ``coefficient``,
        ``exponent``, their 95 % intervals, and ``fitted``, the smallest and the largest compute. Intervals are null
        where fewer than two computes have several near-optimal values: what is drawn anew would be the same again.
    """
    if not outcomes:
        return None
    tried = tried_of(outcomes)
    laws, near = laws_of(tried), [one for one in tried if one.near]

    def both(drawn: Sequence[Tried]) -> list[float]:
        drawn_laws = laws_of(drawn)
        return [value for law in (drawn_laws.lr, drawn_laws.batch_tokens) for value in (law.coefficient, law.exponent)]

    intervals, _ = bootstrap(near, both, draw=within(lambda one: one.budget))
    fitted = [min(one.budget for one in near), max(one.budget for one in near)]
    budgets = []
    for budget, own in by_budget(outcomes).items():
        here = [one for one in tried if one.budget == budget]
        setting = own[0].setting
        finite = [one for one in here if one.loss < float("inf")]
        best = min(finite, key=lambda one: one.loss, default=None)
        budgets.append(
            {
                "compute": budget,
                "shape": str(setting.shape),
                "m": setting.m,
                "tokens": setting.tokens,
                "best": best and {"lr": best.lr, "batch_tokens": best.batch_tokens, "loss": best.loss},
                "near_optimal": sum(one.near for one in here),
                "tried": len(here),
                "diverged": len(here) - len(finite),
                "edges": _edges(best, finite) if best else [],
            }
        )
    return {
        "band": BAND,
        "budgets": budgets,
        "lr": law_as_found(laws.lr, intervals[:2] if _varies(near, "lr") else None, fitted),
        "batch_tokens": law_as_found(
            laws.batch_tokens, intervals[2:] if _varies(near, "batch_tokens") else None, fitted
        ),
    }


def _varies(near: Sequence[Tried], key: str) -> bool:
    """Tell whether two computes or more have several near-optimal values of a key."""
    values: dict[float, set[float]] = {}
    for one in near:
        values.setdefault(one.budget, set()).add(getattr(one, key))
    return sum(len(own) > 1 for own in values.values()) > 1


def law_as_found(law: PowerLaw, intervals: Sequence[tuple[float, float]] | None, fitted: list[float]) -> dict[str, Any]:
    """Return a power law for JSON.

    Args:
        law: as fitted.
        intervals: of coefficient and exponent; None where they are not known.
        fitted: the smallest and the largest compute.
    """
    return {
        "coefficient": law.coefficient,
        "exponent": law.exponent,
        "coefficient_interval": intervals and list(intervals[0]),
        "exponent_interval": intervals and list(intervals[1]),
        "fitted": fitted,
    }


def _edges(best: Tried, tried: Sequence[Tried]) -> list[str]:
    """Say which of the best rate and batch is the smallest or the largest that was tried, where several were."""
    found = []
    for key, name in (("lr", "rate"), ("batch_tokens", "batch")):
        values = sorted({getattr(one, key) for one in tried})
        value = getattr(best, key)
        if len(values) > 1 and value in (values[0], values[-1]):
            found.append(f"{'smallest' if value == values[0] else 'largest'} {name}")
    return found
