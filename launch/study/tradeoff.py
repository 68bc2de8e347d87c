"""The sections `decode` and `smaller`: what fewer heads buy, and whether a smaller multi-head model would buy as much.

Figure 3 of arXiv 2305.13245 sets quality against the time of a decoded token, with a smaller multi-head model beside.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.bench.common import device_here
from launch.study.decode import decode_seconds
from launch.study.part import SIZE, Found, Part
from launch.study.plan import Plan, Uptraining
from launch.study.results import Results
from launch.study.seeds import difference, ordering, said
from launch.study.settings import Section
from launch.study.training import uptrainings_of
from launch.tables import of_numbers, rendered
from launch.trainings.wandb_of_study import Table
from model.config import ModelConfig
from train.palette import color_of

NEAR = 1.05
"""A model is no slower, or its cache no larger, up to so many times the other's: times are not measured closer."""


def _runs(study: Plan) -> list[Uptraining]:
    return [run for seed in study.settings.seeds for run in uptrainings_of(study, seed)]


def _runs_of_smaller(study: Plan) -> list[Uptraining]:
    return [*_runs(study), *(run for seed in study.settings.seeds for run in uptrainings_of(study, seed, smaller=True))]


def _with_smaller(results: Results) -> bool:
    return Section.smaller in results.study.sections and Section.smaller not in results.failed


def _described(name: str, model: ModelConfig, val_loss: Found) -> dict[str, Any]:
    return {
        "name": name,
        "kv_heads": model.n_kv_heads,
        "layers": model.n_layers,
        "parameters": model.num_params,
        "kv_cache_bytes_per_token": model.kv_cache_bytes_per_token(device_here()[1].itemsize),
        "val_loss": val_loss,
    }


def _models(results: Results) -> list[dict[str, Any]]:
    """Describe the models, the smaller one last."""
    study, alpha = results.study, results.study.settings.alpha
    models = [_described(results.name_of(n), results.model(n), results.loss(n, alpha)) for n in study.kv_heads]
    if _with_smaller(results):
        small = study.smaller_model
        name = f"{small.attention_name}, {small.n_layers} layers"
        models.append(_described(name, small, results.loss(small.n_kv_heads, alpha, smaller=True)))
    return models


def _findings(results: Results, _: Mapping[str, Found]) -> dict[str, Any]:
    study, first = results.study, results.seeds[0]
    models = _models(results)
    # The time of a token depends on the shape alone, so that the weights of one seed stand for all.
    weights = [results.uptrained(first, n) for n in study.kv_heads]
    if _with_smaller(results):
        weights.append(results.uptrained(first, study.model.n_kv_heads, smaller=True))
    settings = study.settings
    times, device = decode_seconds(dict(enumerate(weights)), settings.batches, settings.contexts, results.say)
    models = [{**model, "decode": times[index]} for index, model in enumerate(models)]
    found = {"alpha": f"{settings.alpha:g}", "device": device, "models": models}
    return {**found, "efficiency_gain": efficiency(found)}


def longest(model: Found) -> dict[str, Any]:
    """Return the decoding with the largest cache."""
    most: dict[str, Any] = max(model["decode"], key=lambda time: time["batch"] * time["context"])
    return most


def efficiency(found: Found) -> list[dict[str, Any]]:
    """Compute (cost of the original - cost with fewer heads) / loss in quality, in seconds per step and nats.

    The loss in quality is the mean over seeds. Where not every seed loses there is no ratio, None.
    """
    original, *others = found["models"]
    cost = longest(original)["seconds"]
    gains = []
    for model in others:
        saved = cost - longest(model)["seconds"]
        above = difference(model["val_loss"], original["val_loss"])
        ratio = saved / above["mean"] if all(value > 0 for value in above["values"]) else None
        gains.append({"name": model["name"], "seconds_saved": saved, "nats_lost": above, "seconds_per_nat": ratio})
    return gains


def _text(found: Found, facts: Found) -> str:
    original = found["models"][0]
    most = longest(original)
    where = f"batch {most['batch']}, context {most['context']:,}"
    columns = [
        "",
        "parameters",
        "KV cache",
        f"a token,\n{where}",
        "times as fast",
        f"loss at\nalpha = {found['alpha']}",
    ]
    table = of_numbers([*columns, "nats lost"], (0,))
    for model in found["models"]:
        seconds = longest(model)["seconds"]
        above = difference(model["val_loss"], original["val_loss"])
        table.add_row(
            model["name"],
            f"{model['parameters']:,}",
            f"{model['kv_cache_bytes_per_token']:,} B",
            f"{seconds * 1000:.1f} ms",
            f"{most['seconds'] / seconds:.2f}",
            said(model["val_loss"]),
            said(above, "+.4f") if model is not original else "",
        )
    grid = [(time["batch"], time["context"]) for time in original["decode"]]
    times = of_numbers(["ms a token", *(f"{batch} x {context:,}" for batch, context in grid)], (0,))
    for model in found["models"]:
        times.add_row(model["name"], *(f"{time['seconds'] * 1000:.1f}" for time in model["decode"]))
    lines = [f"Decoding on {found['device']}; batch x tokens before the one that is timed."]
    cost = most["seconds"] * 1000
    for gain in found["efficiency_gain"]:
        saved, lost = gain["seconds_saved"] * 1000, gain["nats_lost"]
        if gain["seconds_per_nat"] is not None:
            ratio = f"{gain['seconds_per_nat'] * 1000:,.0f} ms per nat"
        else:
            none = all(value <= 0 for value in lost["values"])
            ratio = "no quality was lost" if none else "not told apart from none: not every seed lost quality"
        lines.append(
            f"{gain['name']}: efficiency gain = ({cost:.1f} - {cost - saved:.1f} ms) / ({said(lost)} nats) = {ratio}"
        )
    return rendered(table, times) + "\n" + "\n".join(lines)


def _tables(found: Found) -> dict[str, Table]:
    columns = ["model", "kv_heads", "layers", "kv_cache_bytes_per_token", "batch", "context", "seconds"]
    keys = ("name", "kv_heads", "layers", "kv_cache_bytes_per_token")
    rows = [[*(model[key] for key in keys), *time.values()] for model in found["models"] for time in model["decode"]]
    return {"decode": (columns, rows)}


def _draw(found: Found, facts: Found, folder: Path) -> list[Path]:
    """Draw a point for each model, better above, faster to the left; bars are standard deviations between seeds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    for index, model in enumerate(found["models"]):
        milliseconds, loss = longest(model)["seconds"] * 1000, model["val_loss"]
        marker = "o" if model["layers"] == found["models"][0]["layers"] else "s"
        bar, color = loss["sd"] or 0.0, color_of(index)
        axes.errorbar(milliseconds, loss["mean"], bar, color=color, marker=marker, markersize=8, capsize=3)
        axes.annotate(model["name"], (milliseconds, loss["mean"]), (8, 8), textcoords="offset points")
    axes.invert_yaxis()
    axes.margins(0.15)
    axes.set_xlim(left=0)
    most = longest(found["models"][0])
    axes.set_xlabel(f"ms per token, batch {most['batch']}, context {most['context']:,}, {found['device']}")
    axes.set_ylabel(f"validation loss after alpha = {found['alpha']}, nats (better above)")
    axes.set_title(f"{facts['shape']}, {facts['tokens']:,} tokens", fontsize="medium")
    axes.grid(alpha=0.3)
    path = folder / "tradeoff.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return [path]


DECODE = Part("What fewer key/value heads buy", _runs, _findings, _text, _tables, _draw)


# ---- a smaller model ----


def _findings_of_smaller(results: Results, found: Mapping[str, Found]) -> dict[str, Any]:
    decode = found.get(Section.decode.value, {})
    models = decode["models"] if "models" in decode else _models(results)
    *grouped, small = models[1:]
    seconds = [longest(model)["seconds"] if "decode" in model else None for model in (*grouped, small)]
    return {
        "alpha": f"{results.study.settings.alpha:g}",
        "smaller": {key: value for key, value in small.items() if key != "decode"} | {"seconds": seconds[-1]},
        "against": [
            {
                "name": model["name"],
                "parameters": model["parameters"] / small["parameters"],
                "cache": model["kv_cache_bytes_per_token"] / small["kv_cache_bytes_per_token"],
                "seconds": time / seconds[-1] if time and seconds[-1] else None,
                "loss_above": difference(model["val_loss"], small["val_loss"]),
            }
            for model, time in zip(grouped, seconds[:-1], strict=True)
        ],
    }


def _text_of_smaller(found: Found, facts: Found) -> str:
    small = found["smaller"]
    table = of_numbers([f"times that of {small['name']}", "parameters", "KV cache", "a token", "loss above its"], (0,))
    lines = []
    for one in found["against"]:
        time = "" if one["seconds"] is None else f"{one['seconds']:.2f}"
        row = [f"{one['parameters']:.2f}", f"{one['cache']:.2f}", time, said(one["loss_above"], "+.4f")]
        table.add_row(one["name"], *row)
        lines.append(_judged(one, small["name"]))
    how = f"trained on the same tokens, loss {said(small['val_loss'])}"
    head = f"{small['name']}: {small['parameters']:,} parameters, {how}"
    return head + "\n" + rendered(table) + "\n" + "\n".join(lines)


def _judged(one: Found, small: str) -> str:
    """Say which of two models a user would take: by cost, and by loss where all seeds agree."""
    cost, of = (one["seconds"], "time of a token") if one["seconds"] is not None else (one["cache"], "cache")
    values = one["loss_above"]["values"]
    cheap, better = cost <= NEAR, all(value < 0 for value in values)
    text = f"{one['name']} against {small}: loss {ordering(one['loss_above'])}, at {cost:.2f} times its {of}"
    if better and cheap:
        return f"{text}: fewer heads are the better trade here."
    if all(value > 0 for value in values) and cost >= 1 / NEAR:
        return f"{text}: fewer layers are the better trade here."
    return f"{text}: neither is better at the other's cost."


def _tables_of_smaller(found: Found) -> dict[str, Table]:
    rows = [[one["name"], one["cache"], one["seconds"], one["loss_above"]["mean"], one["loss_above"]["sd"]]
            for one in found["against"]]  # fmt: skip
    return {"smaller_model": (["model", "times the cache", "times the seconds", "loss above", "sd"], rows)}


def _draw_smaller(found: Found, facts: Found, folder: Path) -> list[Path]:
    """Draw loss against cache, the smaller model among the grouped ones."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    axes.axhline(0, color=color_of(0), linewidth=0.8)
    axes.plot(1, 0, "s", color=color_of(0), label=found["smaller"]["name"])
    for index, one in enumerate(found["against"], 1):
        above, color = one["loss_above"], color_of(index)
        axes.errorbar(
            one["cache"], above["mean"], above["sd"] or 0.0, marker="o", color=color, capsize=3, label=one["name"]
        )
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("KV cache, times that of the smaller model")
    axes.set_ylabel(f"loss above its, alpha = {found['alpha']}, nats (better above)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path = folder / "smaller.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return [path]


SMALLER = Part(
    "A smaller multi-head model beside",
    _runs_of_smaller,
    _findings_of_smaller,
    _text_of_smaller,
    _tables_of_smaller,
    _draw_smaller,
)
