"""Curves in a terminal: in braille where it has colours, in letters where a pipe takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from launch.runs import quantity

COLORS = ("bright_blue", "bright_red", "bright_green", "bright_yellow", "bright_magenta", "bright_cyan")
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The dots of a braille character, by row and column (Unicode block U+2800)."""
_AT_ONE = "*"
"""A character in which several letters meet."""


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        letter: by which a run is known.
        x, y: of its points, NaN among them for gaps.
        color: its place in `COLORS`.
    """

    letter: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    color: int


def plot(lines: Sequence[Line], width: int, height: int, colored: bool, name: str, unit: str) -> Text:
    """Draw curves over each other.

    Args:
        lines: the curves; at least one has two points.
        width, height: characters of the picture, axes included.
        colored: braille in colours; else the letter of each curve.
        name: of the y axis, above it.
        unit: of the x axis, below it.
    """
    across, down = (2, 4) if colored else (1, 1)
    x, y = (np.concatenate([getattr(line, axis) for line in lines]) for axis in "xy")
    there = np.isfinite(x) & np.isfinite(y)
    left, right, low, high = x[there].min(), x[there].max(), y[there].min(), y[there].max()
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    right = right if right > left else left + 1
    labels = [f"{value:.4g}" for value in np.linspace(high, low, height - 3)]
    margin = max(map(len, labels))
    columns, rows = (width - margin - 2) * across, (height - 3) * down
    cells: dict[tuple[int, int], tuple[int, int, str]] = {}
    for line in lines:
        for column, value in _sampled(line, left, right, columns):
            row = round((high - value) / (high - low) * (rows - 1))
            place = row // down, column // across
            dots, _, letter = cells.get(place, (0, 0, line.letter))
            dot = _DOTS[row % down][column % across] if colored else 0
            cells[place] = dots | dot, line.color, letter if letter == line.letter else _AT_ONE
    text = Text(f"{name}\n")
    for row in range(height - 3):
        text.append(f"{labels[row] if row % 4 == 0 or row == height - 4 else '':>{margin}} │")
        for column in range(columns // across):
            if (place := (row, column)) in cells:
                dots, color, letter = cells[place]
                text.append(chr(0x2800 + dots) if colored else letter, COLORS[color % len(COLORS)] if colored else "")
            else:
                text.append(" ")
        text.append("\n")
    text.append(f"{'':{margin}} └{'─' * (columns // across)}\n")
    ends = f"{quantity(left)}", f"{quantity((left + right) / 2)}", f"{quantity(right)} {unit}"
    space = columns // across - sum(map(len, ends))
    text.append(f"{'':{margin}}  {ends[0]}{'':{max(1, space // 2)}}{ends[1]}{'':{max(1, space - space // 2)}}{ends[2]}")
    return text


def _sampled(line: Line, left: float, right: float, columns: int) -> list[tuple[int, float]]:
    """Return the value of a curve in each column that it reaches, and those between two that are far apart."""
    there = np.isfinite(line.x) & np.isfinite(line.y)
    x, y = line.x[there], line.y[there]
    if not len(x):
        return []
    at = np.linspace(left, right, columns)
    half = (right - left) / max(1, columns - 1) / 2
    reached = np.flatnonzero((at >= x[0] - half) & (at <= x[-1] + half))
    return [(int(column), float(value)) for column, value in zip(reached, np.interp(at[reached], x, y), strict=True)]
