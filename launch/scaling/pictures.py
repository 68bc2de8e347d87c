"""The pictures of a scaling study, as figures 2 to 5 of arXiv 2401.02954 draw the same."""

from pathlib import Path
from typing import Any

import numpy as np

from launch.scaling.findings import as_power_law, law_of
from launch.scaling.fits import PowerLaw
from train.palette import SCALE, SERIES

HEIGHT = 4.2
"""Inches, at 150 dots each."""


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the grids, the laws of rate and batch, the IsoFLOP curves with their laws, and the loss, as PNG files.

    Args:
        found: the result of `launch.scaling.findings.findings`.
        folder: the folder of the files.

    Returns:
        The files: ``grid.png`` and ``rates.png`` where a grid was tried, ``isoflop.png`` and ``loss.png`` where an
        IsoFLOP run has a loss.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    tried = [_grids(found, folder / "grid.png"), _rates(found, folder / "rates.png")] if found["rates"] else []
    if not found["allocation"]["curves"]:
        return tried
    return [*tried, _isoflop(found, folder / "isoflop.png"), _loss(found, folder / "loss.png")]


def _grids(found: dict[str, Any], path: Path) -> Path:
    """Draw the loss over rate and batch at each compute (figure 2)."""
    from matplotlib import pyplot

    budgets = found["rates"]["budgets"]
    figure, many = pyplot.subplots(
        1, len(budgets), figsize=(4.6 * len(budgets), HEIGHT), layout="constrained", squeeze=False
    )
    for axes, budget in zip(many[0], budgets, strict=True):
        losses = _mean_losses(found, budget["compute"])
        rates, batches = sorted({lr for lr, _ in losses}), sorted({batch for _, batch in losses})
        values = np.array([[losses.get((lr, batch), np.nan) for lr in rates] for batch in batches])
        finite = values[np.isfinite(values)]
        best = float(finite.min()) if finite.size else 1.0
        shown = axes.imshow(100 * (values / best - 1), origin="lower", aspect="auto", cmap=f"{SCALE}_r", vmin=0)
        for row, column in np.ndindex(values.shape):
            value = values[row, column]
            near = value <= (1 + found["rates"]["band"]) * best
            said = f"{value:.3f}" + ("*" if near else "") if np.isfinite(value) else "diverged"
            color = "black" if shown.norm(100 * (value / best - 1)) < 0.5 else "white"  # the best are bright
            axes.text(column, row, said, ha="center", va="center", fontsize="x-small", color=color)
        axes.set_facecolor("0.4")
        axes.set_xticks(range(len(rates)), [f"{lr:.3g}" for lr in rates])
        axes.set_yticks(range(len(batches)), [f"{batch:,}" for batch in batches])
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("batch, tokens")
        axes.set_title(f"{budget['compute']:.3g} FLOPs, {budget['shape']}", fontsize="medium")
        figure.colorbar(shown, ax=axes, label="% above the least loss (*: near-optimal)")
    return _saved(figure, path)


def _mean_losses(found: dict[str, Any], compute: float) -> dict[tuple[float, int], float]:
    seeds: dict[tuple[float, int], list[float]] = {}
    for run in found["runs"]:
        if run["kind"] == "rate" and run["budget"] == compute:
            seeds.setdefault((run["lr"], run["batch_tokens"]), []).append(run["loss"])
    return {key: float(np.mean(losses)) for key, losses in seeds.items()}


def _rates(found: dict[str, Any], path: Path) -> Path:
    """Draw what is near-optimal against compute, with the fitted law and the paper's (figure 3)."""
    from matplotlib import pyplot

    figure, many = pyplot.subplots(1, 2, figsize=(9.2, HEIGHT), layout="constrained")
    budgets = found["rates"]["budgets"]
    for axes, (name, said) in zip(many, (("batch_tokens", "batch, tokens"), ("lr", "peak learning rate")), strict=True):
        at = 0 if name == "lr" else 1
        for budget in budgets:
            losses = _mean_losses(found, budget["compute"])
            least = min((loss for loss in losses.values() if np.isfinite(loss)), default=np.nan)
            near = [key[at] for key, loss in losses.items() if loss <= (1 + found["rates"]["band"]) * least]
            axes.plot([budget["compute"]] * len(near), near, "o", color="grey", alpha=0.6)
        computes = [budget["compute"] for budget in budgets]
        _laws(axes, found, name, computes)
        _labels(axes, said, computes)
    return _saved(figure, path)


def _isoflop(found: dict[str, Any], path: Path) -> Path:
    """Draw the losses of each compute by M with their parabolas, and the best M and tokens by compute (figure 4)."""
    from matplotlib import colormaps, pyplot

    figure, (curves, models, tokens) = pyplot.subplots(1, 3, figsize=(13.8, HEIGHT), layout="constrained")
    found_curves = found["allocation"]["curves"]
    for curve, share in zip(found_curves, np.linspace(0, 0.85, len(found_curves)), strict=True):
        color = colormaps[SCALE](share)
        runs = [run for run in found["runs"] if run["kind"] == "isoflop" and run["budget"] == curve["compute"]]
        m = np.array([run["m"] for run in runs])
        curves.plot(m, [run["loss"] for run in runs], "o", color=color, label=f"{curve['compute']:.3g}")
        if curve["m"]:
            line = np.geomspace(m.min(), m.max(), 60)
            curves.plot(line, curve["loss"] + curve["curvature"] * np.log(line / curve["m"]) ** 2, color=color)
        if curve["measured"]:
            curves.plot(curve["m"], curve["loss"], "x", color=color, markersize=9)
            for axes, key in ((models, "m"), (tokens, "tokens")):
                axes.plot(curve["compute"], curve[key], "o", color=color)
    curves.set_xscale("log")
    curves.set_xlabel("M, non-embedding FLOPs a token")
    curves.set_ylabel("validation loss, nats")
    curves.grid(alpha=0.3)
    curves.legend(title="C, FLOPs", fontsize="x-small")
    for axes, name, said in ((models, "m", "best M, FLOPs a token"), (tokens, "tokens", "best tokens")):
        computes = [curve["compute"] for curve in found_curves]
        _laws(axes, found, name, computes)
        _labels(axes, said, computes)
    return _saved(figure, path)


def _loss(found: dict[str, Any], path: Path) -> Path:
    """Draw every run's loss by its compute, the least ones, and the largest as the others predict it (figure 5)."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, HEIGHT), layout="constrained")
    allocated = found["allocation"]
    runs = [run for run in found["runs"] if run["kind"] == "isoflop"]
    axes.plot([run["budget"] for run in runs], [run["loss"] for run in runs], ".", color="0.7", label="runs")
    curves, held = allocated["curves"], allocated["held_out"]
    axes.plot(
        [one["compute"] for one in curves], [one["lowest"] for one in curves], "o", color=SERIES[0], label="least loss"
    )
    if held:
        last = held["predictions"][0]
        before = PowerLaw(*_through(curves[:-1]))
        line = np.geomspace(curves[0]["compute"], held["compute"], 60)
        axes.plot(
            line, [before.at(compute) for compute in line], "--", color=SERIES[1], label="C^-a, without the largest"
        )
        for one, marker in zip(held["predictions"], "*P", strict=False):
            off = f"{one['error']:+.2%}"
            axes.plot(
                held["compute"], one["loss"], marker, color=SERIES[1], markersize=10, label=f"by {one['law']}: {off}"
            )
        if last["interval"]:
            axes.vlines(held["compute"], *last["interval"], color=SERIES[1], alpha=0.5)
    if law := allocated["loss"]:
        line = np.geomspace(curves[0]["compute"], 2 * curves[-1]["compute"], 60)
        axes.plot(
            line, law["floor"] + law["scale"] * line ** -law["exponent"], color=SERIES[0], label="floor + C^-a, all"
        )
    _labels(axes, "validation loss, nats", [curve["compute"] for curve in curves], log=False)
    return _saved(figure, path)


def _through(curves: list[dict[str, Any]]) -> tuple[float, float]:
    exponent, intercept = np.polyfit(
        np.log([one["compute"] for one in curves]), np.log([one["lowest"] for one in curves]), 1
    )
    return float(np.exp(intercept)), float(exponent)


def _laws(axes: Any, found: dict[str, Any], name: str, computes: list[float]) -> None:
    """Draw a law over the computes, as it was fitted and the paper's beyond what that was fitted on."""
    line = np.geomspace(min(computes), max(computes), 60)
    if law := law_of(found, name):
        label = f"{law['coefficient']:.3g} C^{law['exponent']:.3f}"
        axes.plot(line, [as_power_law(law).at(compute) for compute in line], color=SERIES[0], label=label)
    paper = as_power_law(found["paper"][name])
    axes.plot(line, [paper.at(c) for c in line], ":", color="black", label=f"the paper's {paper}, extrapolated")


def _labels(axes: Any, said: str, computes: list[float], log: bool = True) -> None:
    axes.set_xscale("log")
    axes.minorticks_off()  # within two decades matplotlib writes numbers of minor ticks over each other
    axes.set_xticks(computes, [f"{compute:.3g}" for compute in computes])
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("compute C = M D, FLOPs")
    axes.set_ylabel(said)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="x-small")


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
