"""The section `uptraining`: what fewer heads cost in quality, and whether the paper's orderings come out.

The losses are of held-out documents right after a conversion and after growing shares alpha of the original tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch.study.part import SIZE, Found, Part
from launch.study.plan import ORIGINAL, Original, Plan, Uptraining
from launch.study.results import Results
from launch.study.seeds import claim, difference, line_of, ordering, said, spread
from launch.study.settings import PLAIN
from launch.tables import of_numbers, rendered
from launch.trainings.wandb_of_study import Table
from model.regroup import Method
from train.palette import look_of

CLOSE = 0.01
"""The share by which GQA's loss may be higher for it to count as close to MHA."""
LITTLE = 0.1
"""The gain beyond alpha = 0.1 counts as little below this share of the gain up to there."""
_LINES = {ORIGINAL: "-", "mean": "-", "first": "--", "random": ":"}


def _runs(study: Plan) -> list[Uptraining]:
    found: list[Uptraining] = []
    for seed in study.settings.seeds:
        for n in study.kv_heads:
            found += study.compared(Original(seed), n)
            if n != study.model.n_kv_heads:
                for method in study.settings.methods[1:]:
                    found += study.by_share(Original(seed), n, method, study.settings.alpha)
    return found


def _findings(results: Results, _: Mapping[str, Found]) -> dict[str, Any]:
    study, alpha = results.study, f"{results.study.settings.alpha:g}"
    models: list[dict[str, Any]] = []
    for n in study.kv_heads:
        shape = results.model(n)
        methods: Sequence[Method | None] = [None] if n == study.model.n_kv_heads else study.settings.methods
        val_loss = {}
        for method in methods:
            by_seed = [results.by_share(seed, n, method) for seed in results.seeds]
            val_loss[method.value if method else ORIGINAL] = {
                f"{share:g}": spread([losses[share] for losses in by_seed if share in losses]) for share in by_seed[0]
            }
        model = {"attention": shape.attention_name, "kv_heads": n, "parameters": shape.num_params}
        models.append({**model, "val_loss": val_loss})
    found = {"alpha": alpha, "seeds": results.seeds, "models": models}
    return {**found, "orderings": orderings(found)}


def losses_of(model: Found) -> dict[str, Any]:
    """Return the losses of a model by share, by the first method."""
    first: dict[str, Any] = next(iter(model["val_loss"].values()))
    return first


def orderings(found: Found) -> list[dict[str, Any]]:
    """Return the orderings of arXiv 2305.13245, sections 3.2 and 3.3, and whether they were reproduced, over seeds."""
    original, *others = found["models"]
    alpha, name, seeds = found["alpha"], original["attention"], range(len(found["seeds"]))

    def loss(model: Found, share: str, seed: int) -> float:
        return float(losses_of(model)[share]["values"][seed])

    def gap(model: Found, share: str, seed: int) -> float:
        """Return how much higher the loss is than that of the original after as many more tokens."""
        return loss(model, share, seed) - loss(original, share, seed)

    claims = []
    ranks = [method.value for method in PLAIN]
    for share, when in (("0", "right after conversion"), (alpha, f"after alpha = {alpha}")):
        by_seed: list[dict[str, tuple[bool, str]]] = []
        for seed in seeds:
            parts = {}
            for model in others:
                kinds = model["val_loss"]
                losses = [kinds[method][share]["values"][seed] for method in ranks if method in kinds]
                if len(losses) > 1:
                    ordered = all(one < two for one, two in pairwise(losses))
                    parts[model["attention"]] = ordered, " ".join(f"{value:.4f}" for value in losses)
            by_seed.append(parts)
        claims.append(
            claim(f"mean better than first better than random, {when}", by_seed, "one method alone was taken")
        )

    mqa = next((model for model in others if model["attention"] == "MQA"), None)
    grouped = [model for model in others if model is not mqa]
    by_seed = []
    for seed in seeds if mqa and grouped else ():
        gaps = {model["attention"]: gap(model, "0", seed) for model in others}
        evidence = ", ".join(f"{attention} {nats:+.4f}" for attention, nats in gaps.items())
        by_seed.append({"MQA": (max(gaps, key=lambda attention: gaps[attention]) == "MQA", evidence)})
    claims.append(claim("MQA worst right after conversion", by_seed, "MQA and a GQA are needed"))

    by_seed = []
    for seed in seeds:
        shares = {model["attention"]: gap(model, alpha, seed) / loss(original, alpha, seed) for model in grouped}
        by_seed.append({attention: (share < CLOSE, f"{share:+.2%}") for attention, share in shares.items()})
    text = f"GQA close to {name} (within {CLOSE:.0%} of its loss) after alpha = {alpha}"
    return [*claims, claim(text, by_seed, "no GQA was taken"), _little(found, gap)]


def _little(found: Found, gap: Any) -> dict[str, Any]:
    """Judge diminishing returns, of the first seed where others are not trained on."""
    original, *others = found["models"]
    shares = losses_of(original)
    beyond = [share for share in shares if float(share) > 0.1]
    by_seed = []
    if "0.1" in shares and beyond and others:
        last = max(beyond, key=float)
        for seed in range(min(shares["0.1"]["n"], shares[last]["n"])):
            parts = {}
            for model in others:
                healed, further = (
                    gap(model, "0", seed) - gap(model, "0.1", seed),
                    gap(model, "0.1", seed) - gap(model, last, seed),
                )
                evidence = f"{healed:.4f} up to 0.1, {further:+.4f} from there to {last}"
                parts[model["attention"]] = further < LITTLE * healed, evidence
            by_seed.append(parts)
    before = f"the gap to {original['attention']} that closed before"
    text = f"little gain beyond alpha = 0.1 (less than {LITTLE:.0%} of {before})"
    return claim(text, by_seed, "0.1 and a larger share are needed")


def _text(found: Found, facts: Found) -> str:
    alpha, original = found["alpha"], found["models"][0]
    columns = ["", "parameters", "loss, converted", f"alpha = {alpha}", f"against {original['attention']}"]
    table = of_numbers(columns, (0,))
    lines = []
    for model in found["models"]:
        losses = losses_of(model)
        above = difference(losses[alpha], losses_of(original)[alpha])
        row = [model["attention"], f"{model['parameters']:,}", said(losses["0"]), said(losses[alpha])]
        table.add_row(*row, said(above, "+.4f") if model is not original else "")
        if model is not original:
            against = f"{original['attention']} trained on as long"
            lines.append(f"{model['attention']} after alpha = {alpha} against {against}: loss {ordering(above)}.")
    shares = list(losses_of(original))
    seeds = len(found["seeds"])

    def heading(share: str) -> str:
        alone = seeds > 1 and losses_of(original)[share]["n"] == 1
        return f"alpha = {share}" + (f"\nseed {found['seeds'][0]}" if alone else "")

    curves = of_numbers(["validation loss, nats", "heads by", *map(heading, shares)], (0, 1))
    for model in found["models"]:
        for method, losses in model["val_loss"].items():
            curves.add_row(model["attention"], method, *(said(losses[one]) if one in losses else "" for one in shares))
    lines += [line_of(one) for one in found["orderings"]]
    return rendered(table, curves) + "\n" + "\n".join(lines)


def _tables(found: Found) -> dict[str, Table]:
    columns = ["attention", "kv_heads", "method", "alpha", "seed", "val_loss"]
    rows = [
        [model["attention"], model["kv_heads"], method, float(share), seed, value]
        for model in found["models"]
        for method, losses in model["val_loss"].items()
        for share, figure in losses.items()
        for seed, value in zip(found["seeds"], figure["values"], strict=False)  # beyond alpha the first seed alone
    ]
    judged = [[one["claim"], str(one["held"]), one["seeds"], one["evidence"]] for one in found["orderings"]]
    return {"val_loss": (columns, rows), "orderings": (["claim", "held", "seeds", "evidence"], judged)}


def _draw(found: Found, facts: Found, folder: Path) -> list[Path]:
    """Draw loss against uptraining; bars are standard deviations between seeds."""
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    for index, model in enumerate(found["models"]):
        for method, losses in model["val_loss"].items():
            label = model["attention"] if method == ORIGINAL else f"{model['attention']}, {method}"
            x, y = [float(share) for share in losses], [one["mean"] for one in losses.values()]
            axes.errorbar(x, y, [one["sd"] or 0.0 for one in losses.values()], capsize=2, label=label,
                          **{**look_of(index), "linestyle": _LINES[method]}, markersize=4)  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("share of the original tokens uptrained on, alpha")
    axes.set_ylabel("validation loss, nats")
    axes.set_title(f"{facts['shape']}, {facts['tokens']:,} tokens", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    path = folder / "loss.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return [path]


PART = Part("What fewer key/value heads cost in quality", _runs, _findings, _text, _tables, _draw)
