"""The figures of all records of a run, each as one array in the order of the steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from launch.columns import Columns, Figure

PART = "{}"
"""In a figure that stands for several: any name or index."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """The figures of a run's records, in the order of the steps; each step has one record.

    Attributes:
        columns: (n,) float64 of each figure, NaN for a record that has no such figure, or for one that was not finite.
        repeated: records that another one of the same step, further down in the file, has replaced.
        without_step: records that do not say their step, and are left out.
    """

    columns: Columns
    repeated: int = 0
    without_step: int = 0

    def __len__(self) -> int:
        return len(self.columns["step",])

    def __getitem__(self, figure: Figure) -> Floats:
        """Return a figure of all records; NaN throughout where none has it."""
        return self.columns[figure] if figure in self.columns else np.full(len(self), np.nan)

    def parts(self, pattern: Figure) -> dict[str, Figure]:
        """Find the figures that a pattern stands for and that some record has.

        Args:
            pattern: a figure, in which `PART` stands for any name or index: ``("val_sets", PART, "loss")``.

        Returns:
            The figures by what stands in the place of `PART`, indices in their order and names in that of the records;
            a pattern without it has one figure at most, by an empty name.
        """
        found = {}
        for figure, values in self.columns.items():
            alike = len(figure) == len(pattern) and all(
                asked in (PART, given) for asked, given in zip(pattern, figure, strict=True)
            )
            if alike and np.isfinite(values).any():
                names = [given for asked, given in zip(pattern, figure, strict=True) if asked == PART]
                found["/".join(names)] = figure
        return dict(sorted(found.items(), key=lambda one: int(one[0]) if one[0].isdigit() else -1))

    @cached_property
    def against(self) -> dict[str, Floats]:
        """What curves can be drawn against, by name: step, tokens, and hours.

        Hours are the seconds of the steps up to each, without validations, saves and restarts between them.
        """
        hours = np.asarray(np.nancumsum(self["seconds",]) / 3600)
        return {"step": self["step",], "tokens": self["tokens",], "hours": hours}


def history_of(chunks: Iterable[Columns]) -> History:
    """Join the records of a run, chunk by chunk as `launch.run_folder.RunFolder.chunks` reads them."""
    parts: dict[Figure, list[Floats]] = {("step",): []}
    rows = 0
    for chunk in chunks:
        count = len(next(iter(chunk.values()), ()))
        for figure in chunk:
            if figure not in parts:
                parts[figure] = [np.full(rows, np.nan)]
        for figure, columns in parts.items():
            columns.append(chunk[figure] if figure in chunk else np.full(count, np.nan))
        rows += count
    joined = {figure: np.concatenate(columns) if columns else np.empty(0) for figure, columns in parts.items()}
    steps = joined["step",]
    known = np.flatnonzero(np.isfinite(steps))
    if len(known) == len(steps) and np.all(np.diff(steps) > 0):
        return History(joined)
    order = known[np.argsort(steps[known], kind="stable")]
    last = np.append(np.diff(steps[order]) > 0, True)[: len(order)]
    kept = {figure: column[order[last]] for figure, column in joined.items()}
    return History(kept, repeated=len(order) - int(last.sum()), without_step=len(steps) - len(known))
