"""The section `warm_starts`: other ways from many heads to few, against the mean of neighbours after as many tokens.

Heads are grouped by what they hold (`model.head_groups`, `model.head_merge`), or step by step, each time to the next
smaller number of heads and with a part of the tokens in between.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.study.part import SIZE, Found, Part
from launch.study.plan import Original, Plan, Uptraining
from launch.study.results import Results
from launch.study.seeds import BEYOND, beyond_spread, difference, ordering, said, spread
from launch.study.training import uptrainings_of
from launch.tables import of_numbers, rendered
from launch.trainings.wandb_of_study import Table
from model.regroup import Method, shares_of, steps_of
from train.palette import color_of

STEPWISE = "step by step"


def chain_of(study: Plan, seed: int, kv_heads: int) -> list[Uptraining]:
    """Return the uptrainings that group step by step, together as long as a single one; none where one step does it."""
    numbers = steps_of(study.model.n_kv_heads, kv_heads)
    lengths = shares_of(study.step_of(study.settings.alpha), len(numbers))
    if len(numbers) < 2 or min(lengths) < 1:
        return []
    chain: list[Uptraining] = []
    for n, steps in zip(numbers, lengths, strict=True):
        before = chain[-1] if chain else None
        alphas, method = (study.settings.alpha,), study.settings.methods[0]
        chain.append(Uptraining(Original(seed), n, method, alphas, (steps,), before=before, chain=lengths))
    return chain


def methods_of(study: Plan, kv_heads: int) -> list[Method]:
    """Return the methods that are compared: of one head, which all are merged into, similar is the mean itself."""
    same = kv_heads == 1 and study.settings.methods[0] is Method.mean
    return [method for method in study.settings.warm_starts if not (same and method is Method.similar)]


def _fewer(study: Plan) -> list[int]:
    return [n for n in study.few if n != study.model.n_kv_heads]


def _runs(study: Plan) -> list[Uptraining]:
    found: list[Uptraining] = []
    for seed in study.settings.seeds:
        found += [run for run in uptrainings_of(study, seed) if run.kv_heads != study.model.n_kv_heads]
        for n in _fewer(study):
            found += [study.uptraining(Original(seed), n, method) for method in methods_of(study, n)]
            found += chain_of(study, seed, n)
    return found


def _findings(results: Results, _: Mapping[str, Found]) -> dict[str, Any]:
    study, alpha = results.study, results.study.settings.alpha

    def by_method(n: int, method: Method) -> dict[str, Any]:
        by_seed = [results.losses(study.uptraining(Original(seed), n, method)) for seed in results.seeds]
        return {"converted": spread([one[0.0] for one in by_seed]), "val_loss": spread([one[alpha] for one in by_seed])}

    models = []
    for n in _fewer(study):
        base = {"converted": results.loss(n, 0.0), "val_loss": results.loss(n, alpha)}
        ways = {method.value: by_method(n, method) for method in methods_of(study, n)}
        if chain_of(study, results.seeds[0], n):
            last = [results.losses(chain_of(study, seed, n)[-1])[alpha] for seed in results.seeds]
            ways[STEPWISE] = {"converted": None, "val_loss": spread(last)}
        for way in ways.values():
            way["above"] = difference(way["val_loss"], base["val_loss"])
        models.append({"attention": results.name_of(n), "kv_heads": n, "base": base, "ways": ways})
    return {"alpha": f"{alpha:g}", "base": study.settings.methods[0].value, "models": models}


def conclusions(found: Found) -> list[str]:
    """Say which ways beat the base, one sentence each model and one in all.

    A way beats it beyond the spread where its loss is lower with every seed, and by more than twice the standard
    deviation of the difference between seeds.
    """
    lines, better = [], []
    for model in found["models"]:
        parts = [f"{name} {ordering(way['above'])}" for name, way in model["ways"].items()]
        lines.append(f"{model['attention']}, loss against that of the {found['base']}: {'; '.join(parts)}.")
        better += [f"{name} for {model['attention']}" for name, way in model["ways"].items()
                   if way["above"]["mean"] < 0 and beyond_spread(way["above"])]  # fmt: skip
    rule = f"(every seed, and more than {BEYOND:g} standard deviations of the difference)"
    if not any(way["above"]["n"] > 1 for model in found["models"] for way in model["ways"].values()):
        return [*lines, "Of one seed there is no spread, and nothing is said to beat another."]
    if better:
        return [*lines, f"Better than the {found['base']} of neighbours beyond the spread {rule}: {', '.join(better)}."]
    return [*lines, f"None is better than the {found['base']} of neighbours beyond the spread {rule}."]


def _text(found: Found, facts: Found) -> str:
    columns = ["", "heads by", "loss, converted", f"alpha = {found['alpha']}", f"against {found['base']}"]
    table = of_numbers(columns, (0, 1))
    for model in found["models"]:
        base = model["base"]
        table.add_row(model["attention"], f"{found['base']}", said(base["converted"]), said(base["val_loss"]), "")
        for name, way in model["ways"].items():
            converted = said(way["converted"]) if way["converted"] else ""
            table.add_row(model["attention"], name, converted, said(way["val_loss"]), said(way["above"], "+.4f"))
    return rendered(table) + "\n" + "\n".join(conclusions(found))


def _tables(found: Found) -> dict[str, Table]:
    rows = []
    for model in found["models"]:
        ways = {found["base"]: model["base"], **model["ways"]}
        for name, way in ways.items():
            converted = way["converted"]["mean"] if way["converted"] else None
            above = way["above"]["mean"] if "above" in way else 0.0
            rows.append([model["attention"], name, converted, way["val_loss"]["mean"], way["val_loss"]["sd"], above])
    return {"warm_starts": (["attention", "heads_by", "converted", "val_loss", "sd", "above"], rows)}


def _draw(found: Found, facts: Found, folder: Path) -> list[Path]:
    """Draw how much higher or lower the loss is than by the base, a group for each model; dots are seeds."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for model in found["models"] for name in model["ways"]))
    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        color = color_of(index + 1)
        for at, model in enumerate(found["models"]):
            if name in model["ways"]:
                above, x = model["ways"][name]["above"], at + (index - (len(names) - 1) / 2) * width
                first = all(name not in earlier["ways"] for earlier in found["models"][:at])
                axes.bar(x, above["mean"], width * 0.9, color=color, alpha=0.6, label=name if first else None)
                axes.plot([x] * above["n"], above["values"], ".", color="black", markersize=5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(found["models"])), [model["attention"] for model in found["models"]])
    axes.set_ylabel(f"loss above that of the {found['base']}, nats, alpha = {found['alpha']}")
    axes.set_title("better below; a dot is a seed", fontsize="medium")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small")
    path = folder / "warm-starts.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return [path]


PART = Part("Warm starts: groups by similarity, and step by step", _runs, _findings, _text, _tables, _draw)
