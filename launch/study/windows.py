"""The section `windows`: sliding windows together with grouping, quality against the cache of a full context.

Every model is uptrained from the same regrouped weights over the same tokens, with and without a window.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.bench.common import device_here
from launch.study.part import SIZE, Found, Part
from launch.study.plan import Original, Plan, Uptraining
from launch.study.results import Results
from launch.study.seeds import difference, ordering, said, spread
from launch.study.settings import Window
from launch.study.training import uptrainings_of
from launch.tables import of_numbers, rendered
from launch.trainings.wandb_of_study import Table
from train.palette import MARKERS, color_of


def _windowed(study: Plan, seed: int, kv_heads: int, window: Window) -> Uptraining:
    return study.uptraining(Original(seed), kv_heads, study.first_method(kv_heads), window=window)


def _runs(study: Plan) -> list[Uptraining]:
    found: list[Uptraining] = []
    for seed in study.settings.seeds:
        found += [run for run in uptrainings_of(study, seed) if run.kv_heads in study.few]
        found += [_windowed(study, seed, n, window) for n in study.few for window in study.windows]
    return found


def _findings(results: Results, _: Mapping[str, Found]) -> dict[str, Any]:
    study, alpha = results.study, results.study.settings.alpha
    context, width = study.config.train.seq_len, device_here()[1].itemsize
    models = []
    for n in study.few:
        full = results.loss(n, alpha)
        kinds = [(study.model.window, study.model.window_pattern, full)]
        for window in study.windows:
            losses = [results.losses(_windowed(study, seed, n, window))[alpha] for seed in results.seeds]
            kinds.append((window.tokens, window.pattern, spread(losses)))
        for tokens, pattern, loss in kinds:
            shape = replace(results.model(n), window=tokens, window_pattern=pattern)
            models.append(
                {
                    "attention": shape.attention_name,
                    "kv_heads": n,
                    "window": tokens,
                    "pattern": pattern,
                    "cache_bytes": shape.kv_cache_bytes(context, width),
                    "val_loss": loss,
                    "above_without": difference(loss, full),
                }
            )
    return {"alpha": f"{alpha:g}", "context": context, "models": models}


def window_name(model: Found) -> str:
    """Return the name of a model's window: none, 64, or 64, ssf."""
    if model["window"] is None:
        return "none"
    return f"{model['window']}, {model['pattern']}" if model["pattern"] else str(model["window"])


def best_trades(models: list[Found]) -> list[Found]:
    """Return the models than which no other has a lower mean loss and no more cache, the largest cache first."""
    found: list[Found] = []
    for model in sorted(models, key=lambda one: (one["cache_bytes"], one["val_loss"]["mean"])):
        if not found or model["val_loss"]["mean"] < found[-1]["val_loss"]["mean"]:
            found.append(model)
    return found[::-1]


def _text(found: Found, facts: Found) -> str:
    original = found["models"][0]
    columns = ["", "window", f"cache of {found['context']:,} tokens", "times less", f"loss at alpha = {found['alpha']}"]
    table = of_numbers([*columns, "above its own without"], (0, 1))
    for model in found["models"]:
        less = original["cache_bytes"] / model["cache_bytes"]
        own = said(model["above_without"], "+.4f") if model["window"] != original["window"] else ""
        row = [f"{model['cache_bytes']:,} B", f"{less:.1f}", said(model["val_loss"]), own]
        table.add_row(model["attention"], window_name(model), *row)
    best = best_trades(found["models"])
    lines = ["No other has a lower mean loss with no more cache than: "
             + "; ".join(f"{one['attention']}, window {window_name(one)}" for one in best) + "."]  # fmt: skip
    lines += _against_fewer_heads(found)
    return rendered(table) + "\n" + "\n".join(lines)


def _against_fewer_heads(found: Found) -> list[str]:
    """Compare each model with a window with those of fewer heads without, where its cache is no larger."""

    def without(model: Found) -> bool:
        original = found["models"][0]
        return (model["window"], model["pattern"]) == (original["window"], original["pattern"])

    lines = []
    for model in found["models"]:
        for other in found["models"]:
            fewer = other["kv_heads"] < model["kv_heads"] and other["cache_bytes"] >= model["cache_bytes"]
            if fewer and without(other) and not without(model):
                judged = ordering(difference(model["val_loss"], other["val_loss"]))
                more = f"no more cache than {other['attention']} without"
                lines.append(f"{model['attention']} with window {window_name(model)}, {more}: loss {judged}.")
    return lines


def _tables(found: Found) -> dict[str, Table]:
    columns = ["attention", "kv_heads", "window", "pattern", "cache_bytes", "val_loss", "sd", "seeds"]
    rows = [
        [*(model[key] for key in columns[:5]), *(model["val_loss"][key] for key in ("mean", "sd", "n"))]
        for model in found["models"]
    ]
    return {"windows_loss": (columns, rows)}


def _draw(found: Found, facts: Found, folder: Path) -> list[Path]:
    """Draw loss against cache, a colour for each number of heads and a marker for each window."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    heads = list(dict.fromkeys(model["kv_heads"] for model in found["models"]))
    windows = list(dict.fromkeys(window_name(model) for model in found["models"]))
    for model in found["models"]:
        color = color_of(heads.index(model["kv_heads"]))
        marker = MARKERS[windows.index(window_name(model)) % len(MARKERS)]
        loss = model["val_loss"]
        label = f"{model['attention']}, {window_name(model)}"
        axes.errorbar(model["cache_bytes"], loss["mean"], loss["sd"] or 0.0, marker=marker, color=color, capsize=2,
                      linestyle="none", label=label)  # fmt: skip
    best = best_trades(found["models"])
    axes.plot(
        [one["cache_bytes"] for one in best], [one["val_loss"]["mean"] for one in best], color="0.6", linewidth=0.8
    )
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"bytes of KV cache of {found['context']:,} tokens")
    axes.set_ylabel(f"validation loss after alpha = {found['alpha']}, nats (better above)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=len(heads))
    path = folder / "windows.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return [path]


PART = Part("Sliding windows together with grouping", _runs, _findings, _text, _tables, _draw)
