"""The sections `heads`, `long_range` and `roofline`: measurements on trained weights, over seeds, and on devices."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.clusters import cluster_of
from launch.study.heads import draw_heads, head_findings, head_table
from launch.study.long_range import MEASURES, long_range_findings
from launch.study.long_range_pictures import TITLES, draw_long_range, long_range_tables
from launch.study.part import Found, Part, no_runs
from launch.study.plan import Plan, Uptraining
from launch.study.results import Results
from launch.study.roofline import command, pictures, tables
from launch.study.roofline.counts import ceilings_of
from launch.study.roofline.findings import roofline_findings
from launch.study.roofline.measured import measured_findings
from launch.study.seeds import difference, ordering, said, spread
from launch.study.training import uptrainings_of
from launch.tables import of_numbers, rendered
from launch.trainings.wandb_of_study import Table
from model.weights import Weights


def _runs(study: Plan) -> list[Uptraining]:
    return [run for seed in study.settings.seeds for run in uptrainings_of(study, seed) if run.kv_heads in study.few]


# ---- what heads hold ----

CONVERTED, UPTRAINED = "converted", "uptrained"


def _models_of_heads(results: Results, seed: int) -> dict[str, Weights]:
    original, *fewer = results.study.few
    models: dict[str, Weights] = {results.name_of(original): results.uptrained(seed, original)}
    for n in fewer:
        models[f"{results.name_of(n)}, {CONVERTED}"] = results.converted(seed, n)
        models[f"{results.name_of(n)}, {UPTRAINED}"] = results.uptrained(seed, n)
    return models


def _heads(results: Results, _: Mapping[str, Found]) -> dict[str, Any]:
    by_seed = []
    for seed in results.seeds:
        results.say(f"what heads hold, seed {seed}")
        found = head_findings(_models_of_heads(results, seed), results.batches, lambda text: None)
        by_seed.append(found)
    for found in by_seed[1:]:  # matrices of one seed are drawn
        for model in found["models"]:
            for layer in model["layers"]:
                del layer["similarity"]
    return {"alpha": f"{results.study.settings.alpha:g}", "by_seed": by_seed}


def _over_seeds(found: Found) -> tuple[list[str], list[list[Any]]]:
    """Return the table of heads, with figures over seeds where cells are numbers."""
    (columns, rows), *others = [head_table(one) for one in found["by_seed"]]
    combined = []
    for at, row in enumerate(rows):
        cells = [[row[column], *(other[1][at][column] for other in others)] for column in range(len(row))]
        combined.append([spread(values) if all(isinstance(value, float) for value in values) else values[0]
                         for values in cells])  # fmt: skip
    return columns, combined


def _text_of_heads(found: Found, facts: Found) -> str:
    columns, rows = _over_seeds(found)
    parts = [columns[:7], [columns[0], *columns[7:]]]
    shown = []
    for part in parts:
        table = of_numbers([name.replace(", ", ",\n") for name in part], (0,))
        for row in rows:
            cells = dict(zip(columns, row, strict=True))
            table.add_row(*(_cell(cells[name]) for name in part))
        shown.append(table)
    return rendered(*shown) + "\n" + "\n".join(_heads_say(found))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return said(value, ".3f")
    return "" if value is None else str(value)


def _heads_say(found: Found) -> list[str]:
    """Say by rule what becomes of the number of patterns and of values."""
    first = found["by_seed"][0]
    lines = []
    for key, what in (("patterns", "attention patterns"), ("values", "values")):
        figures = {
            model["name"]: spread([one["models"][at]["mean"][key] for one in found["by_seed"]])
            for at, model in enumerate(first["models"])
        }
        original = first["models"][0]
        lines.append(
            f"{original['name']}: its {original['heads']} query heads and {original['kv_heads']} key/value heads hold "
            f"{said(figures[original['name']], '.2f')} different {what} a layer."
        )
        for name, figure in list(figures.items())[1:]:
            above = difference(figure, figures[original["name"]])
            lines.append(f"{name} against it: different {what} {ordering(above, 'fewer', 'more', '+.3f')}.")
        for name, figure in figures.items():
            before = name.replace(UPTRAINED, CONVERTED)
            if before != name:
                above = difference(figure, figures[before])
                judged = ordering(above, "fewer", "more", "+.3f")
                lines.append(f"{name} against {CONVERTED}: different {what} {judged}.")
    return lines


def _tables_of_heads(found: Found) -> dict[str, Table]:
    columns, rows = _over_seeds(found)
    return {
        "head_figures": (columns, [[cell["mean"] if isinstance(cell, dict) else cell for cell in row] for row in rows])
    }


def _draw_heads(found: Found, facts: Found, folder: Path) -> list[Path]:
    return draw_heads(found["by_seed"], folder)


HEADS = Part("How many different patterns heads hold", _runs, _heads, _text_of_heads, _tables_of_heads, _draw_heads)

# ---- long range ----


def _long_range(results: Results, _: Mapping[str, Found]) -> dict[str, Any]:
    by_seed = []
    end = results.study.prepared.data.eos_id
    for seed in results.seeds:
        results.say(f"long range, seed {seed}")
        models = {results.name_of(n): results.uptrained(seed, n) for n in results.study.few}
        by_seed.append(long_range_findings(models, results.batches, seed, lambda text: None, never={end}))
    return {"alpha": f"{results.study.settings.alpha:g}", "by_seed": by_seed}


def _text_of_long_range(found: Found, facts: Found) -> str:
    first, shown = found["by_seed"][0], []
    for title, (columns, rows) in long_range_tables(found["by_seed"]).items():
        table = of_numbers(columns, (0,), title)
        for row in rows:
            table.add_row(row[0], *("" if value is None else f"{value:.3f}" for value in row[1:]))
        shown.append(table)
    sizes = (
        f"{first['rows']} held-out rows of {first['context']:,} tokens; {first['prompts']} sequences of "
        f"{first['pairs']} pairs, chance {first['chance']['accuracy']:.3f}; {first['passages']} passages of "
        f"{first['passage']} tokens"
    )
    return sizes + "\n" + rendered(*shown) + "\n" + "\n".join(_long_range_says(found))


def _long_range_says(found: Found) -> list[str]:
    """Say by rule how models compare near and far: at the first and the last point of each measure."""
    first, lines = found["by_seed"][0], []
    original = first["models"][0]["name"]
    for measure in MEASURES:
        points = first["points"][measure]
        for at, model in enumerate(first["models"][1:], 1):
            parts = []
            for point, where in dict.fromkeys([(0, "nearest"), (len(points) - 1, "farthest")]):
                values = [one["models"][at][measure][point]["above"] for one in found["by_seed"]]
                if all(value is not None and not math.isnan(value) for value in values):
                    parts.append(f"{ordering(spread(values), form='+.3f')} at the {where} ({points[point]:,})")
            if parts:
                lines.append(f"{model['name']} against {original}, {TITLES[measure]}: {'; '.join(parts)}.")
    return lines


def _tables_of_long_range(found: Found) -> dict[str, Table]:
    rows = [
        [measure, model["name"], seed, point, value["mean"], value["error"]]
        for seed, one in enumerate(found["by_seed"])
        for model in one["models"]
        for measure in MEASURES
        for point, value in zip(one["points"][measure], model[measure], strict=True)
    ]
    return {"long_range": (["measure", "model", "seed_number", "point", "mean", "error"], rows)}


def _draw_long_range(found: Found, facts: Found, folder: Path) -> list[Path]:
    return draw_long_range(found["by_seed"], folder)


LONG_RANGE = Part(
    "What becomes of long range",
    _runs,
    _long_range,
    _text_of_long_range,
    _tables_of_long_range,
    _draw_long_range,
)

# ---- when it pays ----


def _roofline(results: Results, _: Mapping[str, Found]) -> dict[str, Any]:
    from launch.bench.common import RandomWeights, device_here

    study = results.study
    cluster = cluster_of(study.settings.device)
    width = 2 if cluster.has_gpus else 4
    ceilings = ceilings_of(cluster, width)
    counted = roofline_findings(study.model, study.few, command.BATCHES, command.CONTEXTS, ceilings, 1, width)
    shapes: dict[int, Weights] = {n: RandomWeights(results.model(n), device=device_here()[0]) for n in study.few}
    measured = measured_findings(shapes, command.MEASURED_BATCHES, command.MEASURED_CONTEXTS, results.say)
    return {"device": counted, "here": measured}


def _text_of_roofline(found: Found, facts: Found) -> str:
    return f"{tables.as_text(found['device'])}\n\nmeasured on this machine: {tables.as_text(found['here'])}"


def _tables_of_roofline(found: Found) -> dict[str, Table]:
    keys = ("phase", "batch", "context", "intensity", "seconds", "measured_seconds")
    rows: list[Sequence[Any]] = [
        [one["device"]["name"], model["attention"], *(point.get(key) for key in keys)]
        for one in (found["device"], found["here"])
        for model in one["models"]
        for point in model["points"]
    ]
    return {"roofline_points": (["device", "attention", *keys], rows)}


def _draw_roofline(found: Found, facts: Found, folder: Path) -> list[Path]:
    return [*pictures.draw(found["device"], folder), *pictures.draw(found["here"], folder, "measured")]


ROOFLINE = Part("When fewer heads pay", no_runs, _roofline, _text_of_roofline, _tables_of_roofline, _draw_roofline)
