"""The planner's predictions of steps that others have measured: row by row, by source, and the layouts it would choose.

Nothing is measured here, and nothing is fitted: `launch/bench/published.csv` is what others measured, and the constants
are those of `conf/clusters/`. A ratio is predicted over published seconds: below 1 the prediction is too fast.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from launch.bench.common import kendall_tau
from launch.bench.published import Row, parts, predicted, rows
from launch.tables import rendered
from model.problems import BadInput
from parallel.plan.steps import StepTime

FAR = 0.3
"""The relative error beyond which a row is counted as far off."""


def measure(overrides: Sequence[str]) -> dict[str, Any]:
    """Predict every published step.

    Args:
        overrides: none are taken: rows have settings of their own.

    Raises:
        BadInput: there are overrides.
    """
    if overrides:
        raise BadInput([f"{overrides[0]}: published steps have settings of their own; none would work"])
    found = [(row, *predicted(row)) for row in rows()]
    sources = list(dict.fromkeys(row.source for row, _, _ in found))
    groups = list(dict.fromkeys(row.group for row, _, _ in found if row.group))
    return {
        "rows": [_row(row, taken, time) for row, taken, time in found],
        "sources": [
            _summary(source, [(row, time) for row, _, time in found if row.source == source]) for source in sources
        ]
        + [_summary("all", [(row, time) for row, _, time in found])],
        "choices": [_choice(group, [(row, time) for row, _, time in found if row.group == group]) for group in groups],
    }


def _row(row: Row, taken: Row, time: StepTime) -> dict[str, Any]:
    return {
        "source": row.source,
        "gpus": f"{row.gpus} {row.cluster}",
        "model": f"{row.layers}x{row.d_model}",
        "layout": taken.layout,
        "guessed": [name for name in ("micro_batch", "virtual") if not getattr(row, name)],
        "schedule": taken.schedule,
        "recompute": row.recompute,
        "published": row.seconds,
        "predicted": time.seconds,
        "ratio": time.seconds / row.seconds,
        "parts": parts(time),
    }


def _summary(source: str, found: Sequence[tuple[Row, StepTime]]) -> dict[str, Any]:
    ratios = [time.seconds / row.seconds for row, time in found]
    errors = [abs(ratio - 1) for ratio in ratios]
    return {
        "source": source,
        "rows": len(ratios),
        "error": statistics.mean(errors),
        "mean_ratio": statistics.mean(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "far": sum(error > FAR for error in errors),
    }


def _choice(group: str, found: Sequence[tuple[Row, StepTime]]) -> dict[str, Any]:
    """Return how well layouts of a model are ranked, and what choosing the fastest by prediction would have cost."""
    measured = [row.seconds for row, _ in found]
    expected = [time.seconds for _, time in found]
    best, chosen = measured.index(min(measured)), expected.index(min(expected))
    return {
        "group": group,
        "layouts": len(found),
        "spearman": spearman(measured, expected),
        "kendall": kendall_tau(measured, expected),
        "best": found[best][0].layout,
        "chosen": found[chosen][0].layout,
        "regret": measured[chosen] / measured[best] - 1,
    }


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the rank correlation of two lists; equal values share the mean of their ranks."""
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    return "\n".join(rendered(table) for table in (_rows_table(found), _sources_table(found), _choices_table(found)))


def _rows_table(found: dict[str, Any]) -> Table:
    columns = ["GPUs", "layers x width", "layout", "schedule", "recompute", "published s", "predicted s", "ratio"]
    table = Table("source", *columns, title_justify="left")
    table.title = "steps that others have measured; micro-batch and v are guessed (*) where a source does not say"
    for row in found["rows"]:
        layout = row["layout"] + " *" * bool(row["guessed"])
        table.add_row(
            *(row["source"], row["gpus"], row["model"], layout, row["schedule"], row["recompute"]),
            *(f"{row['published']:.2f}", f"{row['predicted']:.2f}", f"{row['ratio']:.2f}"),
        )
    return table


def _sources_table(found: dict[str, Any]) -> Table:
    table = Table("source", "rows", "mean error", "mean ratio", "least", "most", f"beyond {FAR:.0%}")
    for one in found["sources"]:
        table.add_row(
            *(one["source"], str(one["rows"]), f"{one['error']:.1%}", f"{one['mean_ratio']:.2f}"),
            *(f"{one['least']:.2f}", f"{one['most']:.2f}", str(one["far"])),
        )
    return table


def _choices_table(found: dict[str, Any]) -> Table:
    columns = ["layouts", "rank correlation", "Kendall's tau", "fastest measured", "chosen", "slower by"]
    table = Table("model", *columns, title="the layout that is predicted fastest", title_justify="left")
    for one in found["choices"]:
        table.add_row(
            *(one["group"], str(one["layouts"]), f"{one['spearman']:.2f}", f"{one['kendall']:.2f}"),
            *(one["best"], one["chosen"], f"{one['regret']:.1%}"),
        )
    return table
