"""The two pictures of a depth study."""

from pathlib import Path
from typing import Any

from launch.depth.findings import of_equal
from train.palette import look_of

SIZE = (9.6, 4.4)
"""Inches, at 150 dots each."""


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw loss against d_model / n_layers and, where it was timed, against decode time, as PNG files.

    Args:
        found: the result of `launch.depth.findings.findings`.
        folder: the folder of the files.

    Returns:
        The files: ``loss.png``, and ``decode.png`` where decoding was timed.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    seconds = {model["name"]: model["decode_seconds"] for model in found["models"]}
    aspects = {shape["name"]: shape["d_model_per_layer"] for shape in found["shapes"]}
    drawn = [_draw(found, folder / "loss.png", aspects, "d_model / n_layers (deep and narrow to the left)", log=True)]
    if all(seconds.values()):
        said = f"ms a token, batch {found['decode_batch']}, context {found['decode_context']:,}, {found['device']}"
        milliseconds = {name: 1000 * value for name, value in seconds.items()}
        drawn.append(_draw(found, folder / "decode.png", milliseconds, said, log=False))
    return drawn


def _draw(found: dict[str, Any], path: Path, places: dict[str, float], label: str, log: bool) -> Path:
    """Draw the mean loss of each shape with the range of its seeds, a panel for each equality."""
    from matplotlib import pyplot

    equals = list(found["orderings"])
    figure, many = pyplot.subplots(
        1, len(equals), figsize=SIZE, layout="constrained", squeeze=False, sharey=True, sharex=True
    )
    for axes, equal in zip(many[0], equals, strict=True):
        shapes = [shape for shape in of_equal(found, equal) if shape["mean"] is not None]
        shapes.sort(key=lambda shape: places[shape["name"]])
        at, means = [places[shape["name"]] for shape in shapes], [shape["mean"] for shape in shapes]
        below = [shape["mean"] - min(shape["losses"].values()) for shape in shapes]
        above = [max(shape["losses"].values()) - shape["mean"] for shape in shapes]
        axes.errorbar(at, means, (below, above), color="0.4", capsize=3, zorder=1)
        for shape, place in zip(shapes, at, strict=True):
            look = look_of(1 if shape["is_preset"] else 0)
            axes.plot(place, shape["mean"], markersize=7, **look)
            axes.plot(
                [place] * len(shape["losses"]), list(shape["losses"].values()), ".", color=look["color"], alpha=0.5
            )
            axes.annotate(shape["name"], (place, shape["mean"]), (5, 7), textcoords="offset points", fontsize="small")
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(0.12)
        axes.set_xlabel(label, fontsize="small")
        axes.set_title(f"equal {equal}, {found['tokens']:,} tokens (square: the preset)", fontsize="medium")
        axes.grid(alpha=0.3)
    many[0][0].set_ylabel(f"validation loss, nats; bars: {len(found['seeds'])} seeds")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
