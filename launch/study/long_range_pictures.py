"""The tables and pictures of `launch.study.long_range`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.palette import look_of

TITLES = {
    "loss": "loss by tokens before, nats",
    "accuracy": "recall of a pair, share right",
    "advantage": "recall of a pair, nats above other values",
    "gain": "gain by a passage's first reading, nats per token",
}


def long_range_tables(by_seed: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Return the columns of a table of each measure, and a row for each model.

    Args:
        by_seed: `launch.study.long_range.long_range_findings` of the same models and sizes for each seed, at least one:
            numbers are means over the seeds, None where one has none.
    """
    first, tables = by_seed[0], {}
    for measure, title in TITLES.items():
        rows = []
        for at, model in enumerate(first["models"]):
            means = _over_seeds(by_seed, at, measure).tolist()
            rows.append([model["name"], *(None if math.isnan(mean) else mean for mean in means)])
        tables[title] = ["model", *map(str, first["points"][measure])], rows
    return tables


def draw_long_range(by_seed: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw loss by position, and recall and the gain by a passage against distance, a line for each model.

    Args:
        by_seed: as for `long_range_tables`. Lines are means over seeds, and bars reach from the least to the most; of
            one seed, a standard error to either side.
        folder: the folder of the files, ``loss-by-position.png`` and ``long-range.png``.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    first = by_seed[0]
    of_first = f"loss less that of {first['models'][0]['name']}, nats"
    by_position = [("loss", "mean", "loss, nats"), ("loss", "above", of_first)]
    by_distance = [(measure, "mean", TITLES[measure]) for measure in ("accuracy", "advantage", "gain")]
    paths = [folder / "loss-by-position.png", folder / "long-range.png"]
    _draw(by_seed, by_position, "tokens before, from", paths[0])
    _draw(by_seed, by_distance, "distance, tokens", paths[1])
    return paths


def _over_seeds(
    by_seed: Sequence[Mapping[str, Any]], at: int, measure: str, value: str = "mean", how: Any = np.mean
) -> np.ndarray:
    """Return a value of each point of a model's measure, over seeds; NaN where a seed has none."""
    series = [[point[value] for point in one["models"][at][measure]] for one in by_seed]
    return how(np.array(series, dtype=float), axis=0)


def _draw(by_seed: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str, str]], below: str, path: Path) -> None:
    """Draw a panel for each measure, value and title of the vertical axis."""
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, NullFormatter

    first = by_seed[0]
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(4.8 * len(panels), 4.4), layout="constrained")
    for axes, (measure, value, title) in zip(all_axes, panels, strict=True):
        points = first["points"][measure]
        for at, model in enumerate(first["models"]):
            mean = _over_seeds(by_seed, at, measure, value)
            if len(by_seed) > 1:
                least, most = (_over_seeds(by_seed, at, measure, value, how) for how in (np.min, np.max))
            else:
                error = _over_seeds(by_seed, at, measure, "error" if value == "mean" else f"{value}_error")
                least, most = mean - error, mean + error
            bars = np.nan_to_num(np.maximum([mean - least, most - mean], 0))
            axes.errorbar(
                points, mean, bars, linewidth=1.2, markersize=4, capsize=2, label=model["name"], **look_of(at)
            )
        if value == "mean" and measure in first["chance"]:
            axes.axhline(first["chance"][measure], color="black", linewidth=0.8, linestyle=":", label="chance")
        elif value == "above":
            axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(below)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    all_axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
