"""The results of a study: its numbers, whether the paper's orderings were reproduced, and a text of both."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.study.plan import ORIGINAL, Plan, Uptraining
from model.regroup import Method
from train.pretrained import Source

CLOSE = 0.01
"""The share by which GQA's loss may be higher for it to count as close to MHA."""
LITTLE = 0.1
"""The gain beyond alpha = 0.1 counts as little below this share of the gain up to there."""


def findings(
    study: Plan,
    source: Source,
    losses: Iterable[tuple[Uptraining, dict[float, float]]],
    times: dict[int, list[dict[str, Any]]],
    device: str,
) -> dict[str, Any]:
    """Return all numbers of a study.

    Args:
        study: the plan of the study.
        source: the original weights.
        losses: the validation loss of each uptraining in nats, by share, 0 included.
        times: the result of `launch.study.decode.decode_seconds`.
        device: the device that they were measured on.

    Returns:
        A dict for JSON: the study's shape, data and settings; ``models``, a list by key/value heads, the original's
        first, each with ``attention``, ``parameters``, ``kv_cache_bytes_per_token`` in the dtype of the device,
        ``decode`` and ``val_loss`` by method and share; ``efficiency_gain``; ``orderings``.
    """
    assert source.run is not None
    config = source.weights.config
    value_bytes = 2 if device.endswith("bfloat16") else 4
    by_kind: dict[tuple[int, str], dict[str, float]] = {}
    for uptraining, found in losses:
        kind = (uptraining.kv_heads, uptraining.method.value if uptraining.method else ORIGINAL)
        by_kind.setdefault(kind, {}).update({f"{alpha:g}": loss for alpha, loss in found.items()})
    models = []
    for n in study.kv_heads:
        model = replace(config, n_kv_heads=n)
        models.append(
            {
                "attention": model.attention_name,
                "kv_heads": n,
                "parameters": model.num_params,
                "kv_cache_bytes_per_token": model.kv_cache_bytes_per_token(value_bytes),
                "decode": times[n],
                "val_loss": {method: shares for (heads, method), shares in by_kind.items() if heads == n},
            }
        )
    settings = study.settings
    result = {
        "shape": f"{config.n_layers} layers of {config.d_model}, {config.n_heads} query heads of {config.d_head}",
        "data": study.config.data.source.name,
        "tokens": source.run.tokens,
        "rate": study.rate.name,
        "alpha": f"{settings.alpha:g}",
        "alphas": [f"{alpha:g}" for alpha in sorted(settings.alphas)],
        "device": device,
        "models": models,
    }
    return {**result, "efficiency_gain": _efficiency(result), "orderings": _orderings(result)}


def losses_of(model: dict[str, Any]) -> dict[str, float]:
    """Return the losses of a model by share: those of the mean, where several methods were used."""
    by_method = model["val_loss"]
    return by_method.get(Method.mean.value) or next(iter(by_method.values()))


def longest(model: dict[str, Any]) -> dict[str, Any]:
    """Return the decoding with the largest cache."""
    return max(model["decode"], key=lambda time: time["batch"] * time["context"])


def _efficiency(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Compute (cost of the original - cost with fewer heads) / loss in quality, in seconds per step and nats."""
    original, *others = found["models"]
    cost, loss = longest(original)["seconds"], losses_of(original)[found["alpha"]]
    gains = []
    for model in others:
        saved = cost - longest(model)["seconds"]
        lost = losses_of(model)[found["alpha"]] - loss
        gains.append(
            {
                "attention": model["attention"],
                "seconds_saved": saved,
                "nats_lost": lost,
                "seconds_per_nat": saved / lost if lost > 0 else None,
            }
        )
    return gains


def _orderings(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the orderings of arXiv 2305.13245, sections 3.2 and 3.3, and whether they were reproduced."""
    original, *others = found["models"]
    alpha, name = found["alpha"], original["attention"]

    def gap(model: dict[str, Any], share: str) -> float:
        """Return how much higher the loss is than that of the original after as many more tokens."""
        return losses_of(model)[share] - losses_of(original)[share]

    orderings = []

    def claim(text: str, parts: Sequence[tuple[bool, str]], without: str) -> None:
        evidence = "; ".join(part for _, part in parts) or without
        held_for = [part.split()[0] for held, part in parts if held]
        held = len(held_for) == len(parts) if parts else None
        orderings.append({"claim": text, "held": held, "held_for": held_for, "evidence": evidence})

    ranks = [method.value for method in Method if not method.by_similarity]
    for share, when in (("0", "right after conversion"), (alpha, f"after alpha = {alpha}")):
        parts = []
        for model in others:
            losses = [model["val_loss"][method][share] for method in ranks if method in model["val_loss"]]
            if len(losses) > 1:
                ordered = all(one < two for one, two in pairwise(losses))
                parts.append((ordered, f"{model['attention']} " + " ".join(f"{loss:.4f}" for loss in losses)))
        claim(f"mean better than first better than random, {when}", parts, "one method alone was taken")

    mqa = next((model for model in others if model["attention"] == "MQA"), None)
    grouped = [model for model in others if model is not mqa]
    parts = []
    if mqa and grouped:
        gaps = {model["attention"]: gap(model, "0") for model in others}
        evidence = ", ".join(f"{attention} +{nats:.4f}" for attention, nats in gaps.items())
        parts = [(max(gaps, key=lambda attention: gaps[attention]) == "MQA", evidence)]
    claim("MQA worst right after conversion", parts, "MQA and a GQA are needed")

    parts = []
    for model in grouped:
        share = gap(model, alpha) / losses_of(original)[alpha]
        parts.append((share < CLOSE, f"{model['attention']} {share:+.2%}"))
    claim(f"GQA close to {name} (within {CLOSE:.0%} of its loss) after alpha = {alpha}", parts, "no GQA was taken")

    beyond = [share for share in found["alphas"] if float(share) > 0.1]
    parts = []
    if "0.1" in found["alphas"] and beyond:
        for model in others:
            healed, further = gap(model, "0") - gap(model, "0.1"), gap(model, "0.1") - gap(model, beyond[-1])
            text = f"{model['attention']} {healed:.4f} up to 0.1, {further:+.4f} from there to {beyond[-1]}"
            parts.append((further < LITTLE * healed, text))
    claim(
        f"little gain beyond alpha = 0.1 (less than {LITTLE:.0%} of the gap to {name} that closed before)",
        parts,
        "0.1 and a larger share are needed",
    )
    return orderings


def as_text(found: dict[str, Any]) -> str:
    """Render `findings` as text."""
    alpha, original = found["alpha"], found["models"][0]
    most = longest(original)
    console = Console(width=118, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(
            f"{found['shape']}, trained on {found['tokens']:,} tokens of {found['data']}; uptraining at the rate "
            + ("that it ended with" if found["rate"] == "end" else "of its whole schedule, run again")
            + f"; decoding on {found['device']}"
        )
        where = f"batch {most['batch']}, context {most['context']:,}"
        table = Table("attention", "parameters", "KV cache", f"a token, {where}", "times as fast",
                      "loss, converted", f"alpha = {alpha}", f"against {original['attention']}")  # fmt: skip
        for model in found["models"]:
            losses = losses_of(model)
            seconds = longest(model)["seconds"]
            table.add_row(
                model["attention"],
                f"{model['parameters']:,}",
                f"{model['kv_cache_bytes_per_token']:,} B",
                f"{seconds * 1000:.1f} ms",
                f"{most['seconds'] / seconds:.2f}",
                f"{losses['0']:.4f}",
                f"{losses[alpha]:.4f}",
                f"{losses[alpha] - losses_of(original)[alpha]:+.4f}",
            )
        console.print(table)
        shares = ["0", *found["alphas"]]
        table = Table("validation loss, nats", "heads by", *(f"alpha = {share}" for share in shares))
        for model in found["models"]:
            for method, losses in model["val_loss"].items():
                table.add_row(model["attention"], method, *(f"{losses[share]:.4f}" for share in shares))
        console.print(table)
        grid = [(time["batch"], time["context"]) for time in original["decode"]]
        table = Table("ms a token", *(f"{batch} x {context:,}" for batch, context in grid))
        for model in found["models"]:
            table.add_row(model["attention"], *(f"{time['seconds'] * 1000:.1f}" for time in model["decode"]))
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    cost, loss = most["seconds"] * 1000, losses_of(original)[alpha]
    for gain in found["efficiency_gain"]:
        saved, lost = gain["seconds_saved"] * 1000, gain["nats_lost"]
        ratio = f"{gain['seconds_per_nat'] * 1000:,.0f} ms per nat" if lost > 0 else "no quality was lost"
        lines.append(
            f"{gain['attention']}: efficiency gain = ({cost:.1f} - {cost - saved:.1f} ms) / "
            f"({loss + lost:.4f} - {loss:.4f} nats) = {ratio}"
        )
    lines.append("")
    for ordering in found["orderings"]:
        held = {True: "reproduced", False: "NOT reproduced", None: "not measured"}[ordering["held"]]
        if ordering["held"] is False and ordering["held_for"]:
            held = f"reproduced for {', '.join(ordering['held_for'])} only"
        lines.append(f"{held}: {ordering['claim']} ({ordering['evidence']})")
    return "\n".join(lines)
