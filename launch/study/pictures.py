"""The two pictures of a study."""

from pathlib import Path
from typing import Any

from launch.study.findings import longest, losses_of
from launch.study.plan import ORIGINAL

LINES = {ORIGINAL: "-", "mean": "-", "first": "--", "random": ":"}
SIZE = (7.2, 4.4)
"""The size of a picture in inches, at 150 dots each."""


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw loss against uptraining, and quality against decode time, as PNG files.

    Args:
        found: the result of `launch.study.findings.findings`.
        folder: the folder of the files.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    return [_losses(found, folder / "loss.png"), _tradeoff(found, folder / "tradeoff.png")]


def _losses(found: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    shares = ["0", *found["alphas"]]
    for index, model in enumerate(found["models"]):
        for method, losses in model["val_loss"].items():
            label = model["attention"] if method == ORIGINAL else f"{model['attention']}, {method}"
            values = [losses[share] for share in shares]
            color = "black" if method == ORIGINAL else f"C{index - 1}"
            axes.plot([float(share) for share in shares], values, LINES[method], color=color, marker=".", label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("share of the original tokens uptrained on, alpha")
    axes.set_ylabel("validation loss, nats")
    axes.set_title(f"{found['shape']}, {found['tokens']:,} tokens", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _tradeoff(found: dict[str, Any], path: Path) -> Path:
    """Draw a point for each model, better above, faster to the left, after figure 3 of arXiv 2305.13245."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    alpha = found["alpha"]
    for index, model in enumerate(found["models"]):
        losses = losses_of(model)
        milliseconds = longest(model)["seconds"] * 1000
        color = "black" if index == 0 else f"C{index - 1}"
        axes.plot(milliseconds, losses[alpha], "o", color=color, markersize=9)
        axes.annotate(model["attention"], (milliseconds, losses[alpha]), (8, 8), textcoords="offset points")
    axes.invert_yaxis()
    axes.margins(0.15)
    axes.set_xlim(left=0)
    most = longest(found["models"][0])
    axes.set_xlabel(f"ms per token, batch {most['batch']}, context {most['context']:,}, {found['device']}")
    axes.set_ylabel(f"validation loss after alpha = {alpha}, nats (better above)")
    axes.set_title(f"{found['shape']}, {found['tokens']:,} tokens", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
