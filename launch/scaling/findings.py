"""The results of a scaling study: fitted laws beside the paper's, and what is to be known before they are believed."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np

from conf.schema import Config
from launch.scaling import allocation, laws, rates
from launch.scaling.fits import BAND, PowerLaw
from launch.scaling.ladder import embedding_share
from launch.scaling.outcomes import Outcome
from launch.scaling.plan import Laws, Plan
from train.data.sources import PreparedSources, shares

FURTHER = 10.0
"""How many times the largest compute the laws are asked for, besides."""
ROUNDED = 1.01
"""How far outside of what was tried a rate may lie for it to be taken for the end of that."""
FEW_SIZES = 5
"""Fewer sizes of a compute are said to be few."""
_OF_GRID = {"lr": "rate", "batch_tokens": "batch"}
PAPER = {
    "lr": (laws.LEARNING_RATE, laws.RATE_FITTED),
    "batch_tokens": (laws.BATCH_TOKENS, laws.RATE_FITTED),
    "m": (laws.M_OPT, laws.ALLOCATION_FITTED),
    "tokens": (laws.D_OPT, laws.ALLOCATION_FITTED),
}


def findings(
    study: Plan, grid: Sequence[Outcome], isoflop: Sequence[Outcome], by: Laws | None, data: PreparedSources
) -> dict[str, Any]:
    """Return all numbers of a study.

    Args:
        study: the plan.
        grid, isoflop: what came of its runs.
        by: the laws that the IsoFLOP runs were trained by; None without a grid.
        data: the corpora.

    Returns:
        A dict for JSON: the data and the shape of sequences; ``runs``, one for each; ``rates``, as
        `launch.scaling.rates.as_found` has it, null without a grid; ``allocation``, as
        `launch.scaling.allocation.as_found`; ``paper``, its laws under the same names; ``further``, what the laws give
        at `FURTHER` times the largest compute; ``notes``, what is to be known before any of it is believed.
    """
    config = study.config
    all_runs = [*grid, *isoflop]

    @cache
    def epochs(tokens: int, global_batch: int) -> float:
        return epochs_of(config, tokens, global_batch, data)

    found: dict[str, Any] = {
        "data": ", ".join(config.data.sources) or config.data.source.name,
        "train_tokens": data.num_train_tokens,
        "vocab_size": config.model.vocab_size,
        "seq_len": config.train.seq_len,
        "schedule": config.schedule.decay.name,
        "runs": [_run(study, one, epochs(one.setting.tokens, one.setting.global_batch)) for one in all_runs],
        "rates": rates.as_found(grid),
        "allocation": allocation.as_found(isoflop),
        "paper": {
            key: {"coefficient": law.coefficient, "exponent": law.exponent, "fitted": list(fitted)}
            for key, (law, fitted) in PAPER.items()
        },
    }
    found["further"] = _further(found, FURTHER * max(study.settings.budgets))
    return {
        **found,
        "notes": [*_scale(found, study), *_of_rates(found, study, by), *_of_allocation(found), *_of_runs(found)],
    }


def law_of(found: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return one of the four laws ``lr``, ``batch_tokens``, ``m``, ``tokens``; None where it was not fitted."""
    section = found["rates"] if name in ("lr", "batch_tokens") else found["allocation"]
    law: dict[str, Any] | None = section and section[name]
    return law


def as_power_law(law: dict[str, Any]) -> PowerLaw:
    """Return a law of the findings."""
    return PowerLaw(law["coefficient"], law["exponent"])


def epochs_of(config: Config, tokens: int, global_batch: int, data: PreparedSources) -> float:
    """Return how often a run sees its data, of weighted sources the one that it sees most often.

    Args:
        config: of the recipe.
        tokens, global_batch: of the run, in tokens and in sequences.
        data: its corpora.
    """
    if not config.data.sources:
        return tokens / max(data.num_train_tokens, 1)
    train = replace(config.train, total_tokens=tokens, global_batch=global_batch, max_steps=None)
    return max(share.epochs for share in shares(replace(config, train=train), data))


def _run(study: Plan, one: Outcome, epochs: float) -> dict[str, Any]:
    setting = one.setting
    model = study.ladder.model(setting.shape)
    return {
        **{key: value for key, value in asdict(setting).items() if key not in ("shape", "seq_len")},
        "name": setting.name,
        "shape": str(setting.shape),
        "parameters": model.num_params,
        "embedding_share": embedding_share(model),
        "head_flops_share": 3 * model.head_flops / model.flops_per_token(setting.seq_len),
        "batch_tokens": setting.global_batch * setting.seq_len,
        "steps": setting.steps,
        "tokens": setting.tokens,
        "epochs": epochs,
        "compute": setting.compute,
        "loss": one.loss,
        "bits_per_byte": one.bits_per_byte,
        "skipped_steps": one.skipped_steps,
    }


def _further(found: dict[str, Any], compute: float) -> dict[str, Any]:
    given = {name: (law := law_of(found, name)) and as_power_law(law).at(compute) for name in PAPER}
    return {"compute": compute, **given, "paper": {name: law.at(compute) for name, (law, _) in PAPER.items()}}


def _scale(found: dict[str, Any], study: Plan) -> list[str]:
    runs = found["runs"]
    shares, heads = [run["embedding_share"] for run in runs], [run["head_flops_share"] for run in runs]
    most, largest = max(run["epochs"] for run in runs), max(run["compute"] for run in runs)
    smallest = min(run["steps"] for run in runs)
    notes = []
    if largest < laws.RATE_FITTED[0]:
        notes.append(
            f"the largest run cost {largest:.2g} FLOPs, {laws.RATE_FITTED[0] / largest:,.0f} times less than the "
            "paper's smallest: laws of such small models say how the method works on these data, and little of "
            "models at any size that is used"
        )
    notes.append(
        f"embedding and head are {min(shares):.0%} to {max(shares):.0%} of the parameters, and the head "
        f"{min(heads):.0%} to {max(heads):.0%} of the FLOPs, which M does not count"
    )
    what = "the source that it repeats most" if study.config.data.sources else "its data"
    repeated = f"; the longest sees {what} {most:.1f} times" if most > 1 else ""
    notes.append(f"the shortest run has {smallest:,} steps{repeated}")
    return notes


def _of_rates(found: dict[str, Any], study: Plan, by: Laws | None) -> list[str]:
    if not found["rates"] or not by:
        return []
    notes = []
    for budget in found["rates"]["budgets"]:
        if budget["edges"]:
            notes.append(
                f"{budget['compute']:.3g} FLOPs: the best setting has the {' and the '.join(budget['edges'])} that was "
                "tried, and the optimum may lie outside"
            )
        if budget["best"] is None:
            notes.append(f"{budget['compute']:.3g} FLOPs: every run of the grid diverged, and the laws are without it")
    unknown = [said for key, said in _OF_GRID.items() if found["rates"][key]["exponent_interval"] is None]
    if unknown:
        notes.append(
            f"no intervals of the {' and the '.join(unknown)}: fewer than two computes have several near-optimal values"
        )
    settings = study.settings
    for budget in sorted(settings.budgets):
        held = []
        if not min(settings.rates) / ROUNDED <= by.lr.at(budget) <= max(settings.rates) * ROUNDED:
            held.append(f"the rate {by.lr.at(budget):.3g}")
        batch = by.batch_tokens.at(budget) / found["seq_len"]
        if not min(settings.batches) - study.unit / 2 <= batch <= max(settings.batches) + study.unit / 2:
            held.append(f"the batch {batch:.3g}")
        if held:
            notes.append(f"{budget:.3g} FLOPs: {' and '.join(held)} of the laws is held to what was tried")
    return notes


def _of_allocation(found: dict[str, Any]) -> list[str]:
    notes, allocated = [], found["allocation"]
    for curve in allocated["curves"]:
        if curve["why"]:
            notes.append(f"{curve['why']}; the law of M is without it")
        elif not curve["measured"]:
            runs = [run for run in found["runs"] if run["kind"] == "isoflop" and run["budget"] == curve["compute"]]
            beyond = curve["m"] > max(run["m"] for run in runs)
            notes.append(
                f"{curve['compute']:.3g} FLOPs: the least loss lies outside of what was measured, at M = "
                f"{curve['m']:.2g}, {'above the largest' if beyond else 'below the smallest'} size, and the law of M "
                f"is without it; {'larger' if beyond else 'smaller'} scaling.shapes would measure it"
            )
        if curve["sizes"] < FEW_SIZES:
            notes.append(f"{curve['compute']:.3g} FLOPs: {curve['sizes']} sizes are few for a parabola; 5 would work")
    lost = len({run["budget"] for run in found["runs"] if run["kind"] == "isoflop"}) - len(allocated["curves"])
    if not allocated["curves"]:
        works = "lower scaling.rates, or a lower optimizer.lr without a grid, would work"
        notes.append(
            f"every IsoFLOP run diverged: there are no laws of M, tokens and loss, and no pictures of them; {works}"
        )
        return notes
    best = sum(not curve["measured"] for curve in allocated["curves"])
    if best and allocated["loss"]:
        notes.append(
            f"loss law and held-out loss: of {best} of the {len(allocated['curves'])} computes the least loss is the "
            "best run's, as no parabola has its minimum between the sizes; another size might go below it"
        )
    if lost:
        notes.append(f"{lost} of the computes have no run that did not diverge, and are left out of all laws")
    if allocated["m"] is None:
        notes.append("no law of M and of tokens: fewer than two computes have their least loss between two sizes")
    if allocated["spread"] is None:
        notes.append("no intervals of M, tokens and loss: nothing is known of what is off the parabolas")
    elif (share := allocated["spread"] / allocated["curves"][-1]["lowest"]) > BAND / 2:
        notes.append(
            f"losses are {share:.2%} off their parabolas (standard deviation), beside {BAND:.2%} within which settings "
            "count as near-optimal; more seeds, or sizes closer together, would tell noise from shape"
        )
    if without := allocated["draws_without_a_fit"]:
        notes.append(f"of the 1,000 draws for the intervals {without} allowed no fit and are left out")
    return notes


def _of_runs(found: dict[str, Any]) -> list[str]:
    runs, notes = found["runs"], []
    if diverged := [run["name"] for run in runs if not np.isfinite(run["loss"])]:
        some = ", ".join(diverged[:3]) + (", …" if len(diverged) > 3 else "")
        notes.append(f"{len(diverged)} of {len(runs)} runs diverged and have no loss ({some})")
    if skipped := [run for run in runs if run["skipped_steps"] and np.isfinite(run["loss"])]:
        steps = sum(run["skipped_steps"] for run in skipped)
        notes.append(f"{len(skipped)} runs skipped the updates of {steps:,} steps, as spikes or not finite")
    rounding = max(abs(run["compute"] / run["budget"] - 1) for run in runs)
    notes.append(f"whole steps cost up to {rounding:.1%} more or less than the compute they count for")
    seeds = _spread_of_seeds(found)
    notes.append("one seed: what another would change is not known" if seeds is None else seeds)
    return notes


def _spread_of_seeds(found: dict[str, Any]) -> str | None:
    by_setting: dict[str, list[float]] = {}
    for run in found["runs"]:
        if np.isfinite(run["loss"]):
            by_setting.setdefault(run["name"].rpartition("-s")[0], []).append(run["loss"])
    several = [losses for losses in by_setting.values() if len(losses) > 1]
    if not several:
        return None
    share = float(np.mean([np.std(losses, ddof=1) / np.mean(losses) for losses in several]))
    return f"{max(map(len, several))} seeds: losses of one setting have a standard deviation of {share:.2%}"
