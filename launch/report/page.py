"""The page of the report: everything that it needs is in it, and nothing is loaded from elsewhere."""

import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from launch.report import tables, timelines
from launch.report.facts import quantity
from launch.report.panels import Shape, panels
from launch.report.plots import AXES, Plots, ShownRun
from train.palette import PASSES, PASSES_ON_DARK, SERIES, WAITING, WAITING_ON_DARK

HERE = Path(__file__).parent
AXIS_NAMES = {"tokens": "tokens", "step": "steps", "hours": "hours"}


def page(runs: Sequence[ShownRun], axis: str) -> str:
    """Write the page.

    Curves are drawn by plotly.js, whose whole script (4.8 MB) is put into the page: runs that are laid over one another
    ask for values under the pointer, for zooming into a spike in all plots at once, and for runs that come and go, all
    of which a picture of matplotlib's cannot do; and a page that loads its script from elsewhere is blank on a machine
    without a network, and when that place is gone.

    Args:
        runs: to show, in the order of their colours.
        axis: of `AXES`, what the curves are drawn against at first.
    """
    from plotly.offline import get_plotlyjs

    plots = Plots(runs)
    plots.make()
    names = ", ".join(run.name for run in runs)
    body = "".join(_sections(runs, plots))
    before, after = plots.points
    thinned = (
        f"Of {quantity(before)} points {after:,} are in this page: of each of some 1,100 stretches of a run the lowest "
        "and the highest, so that no spike is lost. " if after < before else ""
    )  # fmt: skip
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(names)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{_colors()}{_own('page.css')}</style>\n</head>\n"
        f"<body>\n{_bar(runs, axis)}<main>{body}"
        f'<p class="pale">{thinned}Made {escape(now)} by deepnarrow report.</p></main>\n'
        f'<script id="data" type="application/json">{_as_script(plots.as_json(axis))}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{_own('page.js')}</script>\n</body>\n</html>\n"
    )


def _bar(runs: Sequence[ShownRun], axis: str) -> str:
    """Make the bar that stays at the top: the runs by colour, each to be hidden, and what the curves are against."""
    shown = "".join(
        f'<button class="mark" data-run="{index}" data-color="{index}" aria-pressed="true" '
        f'title="hide or show this run">{escape(run.name)}</button>'
        for index, run in enumerate(runs)
    )
    axes = "".join(
        f'<button data-axis="{name}" aria-pressed="{"true" if name == axis else "false"}">{AXIS_NAMES[name]}</button>'
        for name in AXES
    )
    toggles = (
        '<button data-toggle="log" aria-pressed="false">logarithmic</button>'
        '<button data-toggle="single" aria-pressed="true">single steps</button>'
    )
    return (
        f'<header><div><h1>deepnarrow report</h1><div class="group"><span>runs</span>{shown}</div>'
        f'<div class="group"><span>against</span>{axes}{toggles}</div>'
        '<div class="group"><button data-theme-button>light or dark</button></div></div></header>\n'
    )


def _sections(runs: Sequence[ShownRun], plots: Plots) -> list[str]:
    """Make the sections of the page in their order; one without anything in it is left out."""
    drawn, said = [], []
    for index, run in enumerate(runs):
        figures, sentences = timelines.figures(run.folder.path, run.name if len(runs) > 1 else "")
        drawn += [figure.replace("<figure>", f'<figure data-of-run="{index}">', 1) for figure in figures]
        said += [f"{run.name}: {sentence}" for sentence in sentences]
    if not drawn:
        plots.absent += [f"{one.title} ({one.needs})" for one in panels() if one.shape is Shape.timelines]
    parts = [_section("Runs", tables.heads(runs))]
    if any(run.folder.config for run in runs):
        parts.append(_section("Settings that differ" if len(runs) > 1 else "Settings", tables.settings(runs)))
    number = 0
    for section in plots.sections:
        figures = []
        for plot in section["plots"]:
            plot["id"] = f"plot-{number}"
            figures.append(_figure(plot))
            number += 1
        columns = len(figures) if len(figures) < 3 else 2 if len(figures) == 4 else 3
        inner = f'<div class="plots" style="--columns:{columns}">{"".join(figures)}</div>' if figures else ""
        if section["title"] == "Pipeline" and drawn:
            inner += f'<div class="plots timelines">{"".join(drawn)}</div>'
        parts.append(_section(section["title"], inner))
    parts.append(_section("Failures, restarts, alerts", tables.events(runs)))
    parts.append(_section("Skipped steps", tables.skipped(runs)))
    parts.append(_section("Samples", tables.samples(runs)))
    parts.append(_section("What is missing", tables.missing(runs, plots.absent, said)))
    return parts


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>\n" if inner else ""


def _figure(plot: dict[str, Any]) -> str:
    said = [plot["said"]] if plot["said"] else []
    if plot.get("without"):
        said.append(f"no records of it in {', '.join(plot['without'])}")
    caption = f"<figcaption>{escape('; '.join(said))}</figcaption>" if said else ""
    return f'<figure><h3>{escape(plot["title"])}</h3><div id="{plot["id"]}"></div>{caption}</figure>'


def _colors() -> str:
    """Write the colours of passes as variables of CSS, on light pages and on dark ones."""
    light, dark = (
        "".join(f"--{what.name}: {color}; " for what, color in passes.items()) + f"--waiting: {waiting};"
        for passes, waiting in ((PASSES, WAITING), (PASSES_ON_DARK, WAITING_ON_DARK))
    )
    return (
        f':root {{ {light} --warn: {SERIES[4]}; }}\n:root[data-theme="dark"] {{ {dark} }}\n'
        f'@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {dark} }} }}\n'
    )


def _own(name: str) -> str:
    return (HERE / name).read_text("utf-8")


def _as_script(value: Any) -> str:
    """Write JSON that can stand in a script of HTML: nothing in it ends that."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
