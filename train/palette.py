"""The colours of all pictures: of series, of passes, of kinds of memory. Colour-blind people tell them apart.

`tests/train/test_palette.py` holds that, by the colours that people without one kind of cones see. Where there may be
more series than colours, the marker and the line say which it is.
"""

from typing import Any

from parallel.schedules import Pass

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), on white and on dark pages. Yellow is left out, which is
lost on white, and black, which is lost on dark pages."""
COLORS = ("#000000", *SERIES)
"""The colours of series on white, of which the first is the one that others are compared with."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
SCALE = "viridis"
"""Matplotlib's name of the colours of a quantity: they grow lighter with it, in print as well."""

PASSES = {Pass.F: "#004488", Pass.B: "#DDAA33", Pass.W: "#BB5566"}
"""The colours of passes on white: Paul Tol's high-contrast scheme (https://personal.sron.nl/~pault/), whose greys
differ as well, so that a page can be printed without colours."""
PASSES_ON_DARK = {Pass.F: "#4D8FD6", Pass.B: "#EBC05A", Pass.W: "#C9657A"}
WAITING, WAITING_ON_DARK = "#E0E0E0", "#3A4453"
"""The colours of the time in which a rank waits, beside its passes."""

MEMORY = {
    "weights": SERIES[0],
    "gradients": SERIES[5],
    "optimizer": "#444444",
    "activations": SERIES[4],
    "workspace": SERIES[1],
    "logits": SERIES[3],
    "passing": SERIES[2],
}
"""The colours of the kinds of a rank's memory, in the order in which they are stacked: what stays is at the bottom."""


def color_of(index: int) -> str:
    """Return the colour of a series on white, counted from 0; one beyond the last colour has the first again."""
    return COLORS[index % len(COLORS)]


def look_of(index: int) -> dict[str, Any]:
    """Return the color, marker and linestyle of a series on white, as matplotlib's `plot` takes them.

    Args:
        index: of the series, counted from 0. Of the first 49 none has the color and the marker of another.
    """
    again = index // len(COLORS)
    marker = MARKERS[(index + again) % len(MARKERS)]
    return {"color": color_of(index), "marker": marker, "linestyle": LINES[again % len(LINES)]}


def paler(color: str, share: float) -> str:
    """Mix a colour with white.

    Args:
        color: as #RRGGBB.
        share: of white, between 0 and 1.
    """
    mixed = (round(value + (255 - value) * share) for value in _parts(color))
    return "#" + "".join(f"{value:02X}" for value in mixed)


def text_on(color: str) -> str:
    """Return black or white, whichever is legible on a colour of the form #RRGGBB."""
    red, green, blue = _parts(color)
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#FFFFFF"


def _parts(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
