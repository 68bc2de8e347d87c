"""Pictures of a roofline: intensity against FLOP/s, and seconds against context."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.study.roofline.counts import Phase
from train.palette import color_of

MARKERS = {("attention", Phase.decode): "v", ("attention", Phase.prefill): "^"}
MARKERS |= {("whole", Phase.decode): "o", ("whole", Phase.prefill): "s"}
"""The marks of attention alone and of a whole pass."""
SIZE = (10.0, 4.6)
"""The size of a picture in inches, at 150 dots each."""
DRAWN = ("products", "attention", "head", "between")
"""Parts whose FLOPs and bytes make a point."""


def draw(found: Mapping[str, Any], folder: Path, stem: str = "roofline", suffix: str = ".png") -> list[Path]:
    """Draw the roofline with its points, and the seconds of decoding and prefill against the context.

    Args:
        found: the result of `launch.study.roofline.findings.roofline_findings`, or of
            `launch.study.roofline.measured.measured_findings`, whose measured times are drawn as well.
        folder: the folder of the files, which is there.
        stem: what their names begin with.
        suffix: .png or .svg.

    Returns:
        The paths of ``STEM`` and ``STEM-seconds``.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    return [_roof(found, folder / f"{stem}{suffix}"), _seconds(found, folder / f"{stem}-seconds{suffix}")]


def _roof(found: Mapping[str, Any], path: Path) -> Path:
    """Draw FLOP/s over FLOPs a byte: the roof, and below it attention and whole passes, larger with the batch."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    device, batches = found["device"], found["batches"]
    peak, bandwidth, ridge = device["product_flops_per_second"], device["bytes_per_second"], device["ridge"]
    xs = []
    for color, later, model in _models(found):
        for point in model["points"]:
            phase = Phase(point["phase"])
            size = 3.0 + 5.0 * (batches.index(point["batch"]) + 1) / len(batches) + 2.5 * later
            # The messages of tensor parallelism take no part: they cross no memory.
            parts = [point["parts"][part] for part in DRAWN if part in point["parts"]]
            whole = point["flops"] / sum(part["seconds"] for part in parts)
            attention = point["parts"]["attention"]
            of_attention = attention["flops"] / attention["seconds"]
            for what, x, y in (
                ("whole", point["intensity"], whole),
                ("attention", attention["intensity"], of_attention),
            ):
                how = {"color": color, "markerfacecolor": color if what == "whole" else "none", "markersize": size}
                axes.plot(x, y, MARKERS[what, phase], alpha=0.75, zorder=3 if what == "whole" else 4, **how)
                xs.append(x)
            if "measured_seconds" in point:
                axes.plot(
                    point["intensity"], point["flops"] / point["measured_seconds"], "x", color=color, markersize=size
                )
    low, high = min([*xs, ridge]) / 2, max([*xs, ridge]) * 2
    axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color="black", linewidth=1.5, zorder=0)
    axes.axvline(ridge, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    axes.annotate(f"ridge {ridge:,.3g}", (ridge, low * bandwidth), (4, 4), textcoords="offset points", fontsize="small")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity, FLOPs a byte")
    axes.set_ylabel("FLOP/s")
    axes.set_title(_title(found), fontsize="small", loc="left")
    axes.grid(alpha=0.3)
    kinds = [
        Line2D([], [], color=color, marker="o", linestyle="", label=model["attention"])
        for color, _, model in _models(found)
    ]
    for (what, phase), marker in MARKERS.items():
        fill = "0.4" if what == "whole" else "none"
        label = f"{phase.value}, {'all of it' if what == 'whole' else 'attention'}"
        kinds.append(Line2D([], [], color="0.4", marker=marker, markerfacecolor=fill, linestyle="", label=label))
    if _is_measured(found):
        kinds.append(Line2D([], [], color="0.4", marker="x", linestyle="", label="measured, all of it"))
    sizes = f"larger: batch {', '.join(map(str, batches))}" if len(batches) > 1 else f"batch {batches[0]}"
    axes.legend(handles=kinds, fontsize="small", title=sizes, title_fontsize="small", loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _seconds(found: Mapping[str, Any], path: Path) -> Path:
    """Draw the time of a step and of a prefill against the context, for the smallest and the largest batch."""
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=SIZE, layout="constrained")
    for axes, phase in zip(both, (Phase.decode, Phase.prefill), strict=True):
        for color, later, model in _models(found):
            for line, batch in _ends(found["batches"]):
                points = [one for one in model["points"] if one["phase"] == phase.value and one["batch"] == batch]
                label = f"{model['attention']}, batch {batch}"
                contexts = [point["context"] for point in points]
                axes.plot(
                    contexts,
                    [1000 * one["seconds"] for one in points],
                    line,
                    color=color,
                    label=label,
                    linewidth=1.2 + 0.8 * later,
                )
                measured = [one for one in points if "measured_seconds" in one]
                times = [1000 * one["measured_seconds"] for one in measured]
                axes.plot([one["context"] for one in measured], times, "x" if line == "-" else "+", color=color)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("ms")
        crosses = f"; measured: x (batch {found['batches'][0]}), + (batch {found['batches'][-1]})"
        crosses = crosses if _is_measured(found) else ""
        axes.set_title(f"{'a decoding step' if phase is Phase.decode else 'a prefill'}{crosses}", fontsize="small")
        axes.grid(alpha=0.3)
    both[0].legend(fontsize="small")
    figure.suptitle(_title(found), fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _ends(batches: list[int]) -> list[tuple[str, int]]:
    return [("-", batches[0])] + ([("--", batches[-1])] if len(batches) > 1 else [])


def _models(found: Mapping[str, Any]) -> list[tuple[str, int, Mapping[str, Any]]]:
    """Return each model's colour, how many come later, and itself: those are drawn smaller, so that equals are seen."""
    models = found["models"]
    return [(color_of(index), len(models) - 1 - index, model) for index, model in enumerate(models)]


def _is_measured(found: Mapping[str, Any]) -> bool:
    return any("measured_seconds" in point for model in found["models"] for point in model["points"])


def _title(found: Mapping[str, Any]) -> str:
    device, rank = found["device"], f", each of tp {found['tp']}" if found["tp"] > 1 else ""
    return f"{found['shape']}, {found['dtype']}{rank}; {device['name']}, {device['source']}"
