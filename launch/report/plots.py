"""The data of the report's plots: few points of each curve, as the script of the page (page.js) takes them."""

import base64
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.columns import Figure
from launch.report.history import Floats, History
from launch.report.panels import SECTIONS, Panel, Shape
from launch.report.thinning import extremes, smoothed
from launch.run_folder import RunFolder
from train.palette import SERIES

AXES = {
    "tokens": "tokens trained on",
    "step": "steps",
    "hours": "hours of training steps (without validations, saves and restarts)",
}
"""What the curves can be drawn against, and what that is called."""
LATEST = 1000
"""The last so many records of which medians are taken."""

Json = dict[str, Any]


@dataclass(frozen=True)
class ShownRun:
    """A run of a report.

    Attributes:
        name: no other run of the report has it.
        folder: of the run.
        history: of its records.
    """

    name: str
    folder: RunFolder
    history: History


@dataclass
class Plots:
    """The plots of a report, as JSON that page.js draws.

    Attributes:
        runs: in the order of their colours.
        sections: of each its title and its plots.
        positions: what the curves stand against: of each ``step``, ``tokens`` and ``hours`` of its points; the traces
            refer to them by number, since curves of one run share them.
        absent: the panels that no run has records for, and what one that has them needs.
        points: of all curves, before and after thinning.
    """

    runs: Sequence[ShownRun]
    sections: list[Json] = field(default_factory=list)
    positions: list[Json] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    points: list[int] = field(default_factory=lambda: [0, 0])
    _known: dict[tuple[int, bytes], int] = field(default_factory=dict)

    def make(self) -> None:
        """Make all plots; a panel without records in any run is named in `absent`."""
        for section in SECTIONS:
            made = [plot for panel in section.panels for plot in self._plots(panel)]
            self.sections.append({"title": section.title, "plots": made})

    def as_json(self, axis: str) -> Json:
        """Return what page.js draws.

        Args:
            axis: of `AXES`, the one that the curves are drawn against at first.
        """
        plots = [plot for section in self.sections for plot in section["plots"]]
        names = [run.name for run in self.runs]
        extents = {name: self._extent(name) for name in AXES}
        facts = {"runs": names, "colors": SERIES, "axes": AXES, "axis": axis, "extents": extents}
        return {**facts, "positions": self.positions, "plots": plots}

    def _extent(self, axis: str) -> list[float]:
        """Return the lowest position above zero and the highest of all runs on an axis."""
        columns = [run.history.against[axis] for run in self.runs]
        found = np.concatenate([column[column > 0] for column in columns] or [np.empty(0)])
        return [float(found.min()), float(found.max())] if len(found) else [1.0, 1.0]

    def _plots(self, panel: Panel) -> Iterator[Json]:
        if panel.shape is Shape.timelines:
            return
        drawn = {
            Shape.curves: self._curves,
            Shape.per_name: self._per_name,
            Shape.bars: self._bars,
            Shape.shares: self._shares,
        }[panel.shape](panel)
        nothing = True
        for plot in drawn:
            nothing = False
            has = {trace["run"] for trace in plot["traces"]}
            without = [run.name for index, run in enumerate(self.runs) if index not in has]
            yield plot if "run" in plot else {**plot, "without": without}
        if nothing:
            self.absent.append(f"{panel.title} ({panel.needs})")

    def _curves(self, panel: Panel, title: str | None = None, paths: Sequence[Figure] | None = None) -> Iterator[Json]:
        traces: list[Json] = []
        widest, low, high = 0, math.inf, -math.inf
        for index, run in enumerate(self.runs):
            for turn, path in enumerate(paths or panel.paths()):
                values = run.history[path]
                if not np.isfinite(values).any():
                    continue
                low, high = min(low, float(np.nanmin(values))), max(high, float(np.nanmax(values)))
                label = panel.labels[turn] if panel.labels else ""
                shared = {"run": index, "label": label, "dash": turn}
                if panel.smoothed and not turn:
                    drawn = extremes(values)
                    thinned = len(drawn) < np.isfinite(values).sum()
                    points = self._points(index, drawn, values)
                    traces.append({**shared, "role": "single", "thinned": bool(thinned), **points})
                    places, means, window = smoothed(values)
                    widest = max(widest, window)
                    at = np.full(len(values), np.nan)
                    at[places] = means
                    traces.append({**shared, "role": "mean", **self._points(index, places, at)})
                else:
                    few = np.isfinite(values).sum() < 100
                    role = "points" if few else "line"
                    traces.append({**shared, "role": role, **self._points(index, extremes(values), values)})
                if panel.marked and not turn:
                    traces += self._marks(index, path)
        if traces:
            said = [f"bold: the mean of up to {widest:,} steps"] if widest > 1 else []
            if any(trace["dash"] for trace in traces):  # colours are the runs'
                said.append(f"solid: {panel.labels[0]}, dashed: {panel.labels[1]}")
            size = {
                "decades": math.log10(high / low) if low > 0 else 9.0,
                "small": bool(max(abs(low), abs(high)) < 0.01),
            }
            plot = {**self._kind("curves", panel), **size, "title": title or panel.title, "said": "; ".join(said)}
            yield {**plot, "traces": traces}

    def _per_name(self, panel: Panel) -> Iterator[Json]:
        (pattern,) = panel.paths()
        names = dict.fromkeys(name for run in self.runs for name in run.history.parts(pattern))
        for name in names:
            path = tuple(name if part == "{}" else part for part in pattern)
            yield from self._curves(panel, f"{name}: {panel.title.lower()}", [path])

    def _bars(self, panel: Panel) -> Iterator[Json]:
        (pattern,) = panel.paths()
        traces = []
        for index, run in enumerate(self.runs):
            parts = run.history.parts(pattern)
            if parts:
                lasts = [_last(run.history[path]) for path in parts.values()]
                traces.append({"run": index, "label": "", "names": [*parts], "y": lasts})
                across = "stage" if all(part.isdigit() for part in parts) else ""
        if traces:
            yield {**self._kind("bars", panel), "across": across, "traces": traces}

    def _shares(self, panel: Panel) -> Iterator[Json]:
        made: list[Json] = []
        for index, run in enumerate(self.runs):
            traces = []
            for turn, path in enumerate(panel.paths()):
                parts = run.history.parts(path)
                if parts:
                    medians = [_latest_median(run.history[part]) for part in parts.values()]
                    traces.append(
                        {"run": index, "label": panel.labels[turn], "pass": turn, "names": [*parts], "y": medians}
                    )
            if traces:
                of = f"{panel.title}: {run.name}" if len(self.runs) > 1 else panel.title
                said = f"medians of the last {min(LATEST, len(run.history)):,} steps"
                made.append({**self._kind("shares", panel), "title": of, "run": index, "said": said, "traces": traces})
        highest = max((sum(column) for plot in made for column in _columns(plot)), default=0.0)
        yield from ({**plot, "top": 1.05 * highest, "across": "stage"} for plot in made)

    def _kind(self, kind: str, panel: Panel) -> Json:
        return {
            "kind": kind,
            "title": panel.title,
            "unit": panel.unit,
            "log": panel.log,
            "percent": panel.percent,
            "zero": panel.zero or kind != "curves",
            "said": "",
        }

    def _marks(self, index: int, path: Figure) -> Iterator[Json]:
        """Yield the marks of a run's skipped steps and failures on a curve."""
        run = self.runs[index]
        failed = [event for event in run.folder.events if event.get("event") == "failed"]
        for role, happened, why in (("skipped", run.folder.skipped, "why"), ("failed", failed, "cause")):
            texts = {one["step"]: str(one.get(why, "")) for one in happened if isinstance(one.get("step"), int)}
            places, steps = _places_of(texts, run.history["step",])
            if len(places):
                values = run.history[path]
                at = np.maximum.accumulate(np.where(np.isfinite(values), np.arange(len(values)), 0))
                # What is not finite is marked where the one before it was.
                found = self._points(index, places, values[at])
                yield {
                    "run": index,
                    "label": role,
                    "dash": 0,
                    "role": role,
                    "text": [texts[one] for one in steps],
                    **found,
                }

    def _points(self, index: int, places: NDArray[np.int64], values: Floats) -> Json:
        self.points[0] += int(np.isfinite(values).sum())
        self.points[1] += len(places)
        key = index, places.tobytes()
        if key not in self._known:
            against = self.runs[index].history.against
            self.positions.append({name: encoded(column[places]) for name, column in against.items()})
            self._known[key] = len(self.positions) - 1
        return {"at": self._known[key], "y": encoded(values[places])}


def _places_of(asked: Iterable[int], steps: Floats) -> tuple[NDArray[np.int64], list[int]]:
    """Find the records of steps; those of which there is none are left out.

    Returns:
        Their places, and the steps that were found.
    """
    wanted = np.array(sorted(asked), dtype=np.int64)
    places = np.searchsorted(steps, wanted)
    known = [bool(place < len(steps) and steps[place] == step) for place, step in zip(places, wanted, strict=True)]
    return places[known], [int(step) for step in wanted[known]]


def encoded(values: Floats) -> Json:
    """Encode numbers as plotly.js reads them: base64 of little-endian float32, a third of their length as text."""
    return {"dtype": "f4", "bdata": base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")}


def _columns(plot: Json) -> list[tuple[float, ...]]:
    """Return what the traces of a plot have for each name."""
    return [*zip(*([value or 0.0 for value in trace["y"]] for trace in plot["traces"]), strict=False)]


def _last(values: Floats) -> float:
    return float(values[np.isfinite(values)][-1])


def _latest_median(values: Floats) -> float | None:
    found = float(np.nanmedian(values[-LATEST:])) if np.isfinite(values[-LATEST:]).any() else math.nan
    return found if math.isfinite(found) else None
