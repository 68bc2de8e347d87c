"""Figures over seeds: their mean and spread, and orderings, which are stated only where all seeds have them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BEYOND = 2.0
"""A difference is beyond the spread where its mean is more than so many standard deviations of it between seeds."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return a figure over seeds, for JSON.

    Args:
        values: one of each seed.

    Returns:
        ``mean``, ``sd`` (the standard deviation of a sample, None of one value), ``n`` and ``values``.
    """
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values), "values": list(values)}


def said(figure: Mapping[str, Any], form: str = ".4f") -> str:
    """Write a figure of `spread`: ``3.3351 ± 0.0123``, without a spread where there is one seed."""
    sd = f" ± {figure['sd']:{form.lstrip('+')}}" if figure["sd"] is not None else ""
    return f"{figure['mean']:{form}}{sd}"


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return how much a figure is above another, seed by seed, as `spread` does."""
    return spread([mine - its for mine, its in zip(one["values"], other["values"], strict=True)])


def ordering(above: Mapping[str, Any], lower: str = "lower", higher: str = "higher", form: str = "+.4f") -> str:
    """State on which side of 0 a difference is, if all seeds agree, and that they do not, if not.

    Args:
        above: a `difference`.
        lower, higher: the words for below and above 0.
        form: of the figure.
    """
    values, figure = above["values"], said(above, form)
    for word, held in ((lower, sum(value < 0 for value in values)), (higher, sum(value > 0 for value in values))):
        if held == len(values):
            return f"{word} by {figure.lstrip('+-')} {_with(len(values))}"
    below = sum(value < 0 for value in values)
    return f"in no order ({lower} with {below} of {len(values)} seeds, {figure})"


def beyond_spread(above: Mapping[str, Any]) -> bool:
    """Tell whether a difference has one sign with all seeds, and is more than `BEYOND` of its standard deviations."""
    values = above["values"]
    same = all(value < 0 for value in values) or all(value > 0 for value in values)
    return above["sd"] is not None and same and abs(above["mean"]) > BEYOND * above["sd"]


def claim(text: str, by_seed: Sequence[Mapping[str, tuple[bool, str]]], without: str) -> dict[str, Any]:
    """Judge a claim over seeds.

    Args:
        text: the claim.
        by_seed: for each seed whether it holds, and the evidence, by model.
        without: what there is to say where no model can be judged.

    Returns:
        A dict for JSON: ``claim``; ``held``, whether it holds for each model with each seed, None where there is none;
        ``seeds``, how many; ``held_for``, the number of seeds with which it holds by model; and ``evidence``.
    """
    models = list(by_seed[0]) if by_seed else []
    held_for = {model: sum(one[model][0] for one in by_seed) for model in models}
    evidence = "; ".join(f"{model} {' | '.join(one[model][1] for one in by_seed)}" for model in models)
    return {
        "claim": text,
        "held": all(held == len(by_seed) for held in held_for.values()) if models else None,
        "seeds": len(by_seed),
        "held_for": held_for,
        "evidence": evidence or without,
    }


def line_of(claimed: Mapping[str, Any]) -> str:
    """Write a judged claim as a line."""
    seeds = claimed["seeds"]
    if claimed["held"] is None:
        return f"not measured: {claimed['claim']} ({claimed['evidence']})"
    if claimed["held"]:
        verdict = f"reproduced {_with(seeds)}"
    elif whole := [model for model, held in claimed["held_for"].items() if held == seeds]:
        verdict = f"reproduced {_with(seeds)} for {', '.join(whole)} only"
    elif any(claimed["held_for"].values()):
        some = ", ".join(f"{model} with {held}" for model, held in claimed["held_for"].items())
        verdict = f"in no order over seeds ({some} of {seeds})"
    else:
        verdict = f"NOT reproduced {_with(seeds)}"
    return f"{verdict}: {claimed['claim']} ({claimed['evidence']})"


def _with(seeds: int) -> str:
    return f"with each of {seeds} seeds" if seeds > 1 else "with the one seed"
