"""The results of a depth study: what each shape costs and how well it learns, and what holds over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launch.depth.claims import verdicts, with_all_seeds
from launch.depth.outcomes import Outcome, best_rates
from launch.depth.pipelines import pipeline_of
from launch.depth.plan import Plan
from launch.depth.shapes import NEAR, Shape, cost_of, said
from launch.depth.timing import Timed
from model.config import ModelConfig


def costs(study: Plan) -> dict[str, Any]:
    """Return what is known of a study's shapes before anything is trained.

    Returns:
        A dict for JSON: the preset, tokens and length of sequences; ``shapes``, one for each equality and aspect;
        ``models``, one for each model, with parameters, FLOPs, KV cache and ``pipelines``; ``missing``.
    """
    config = study.config
    return {
        "preset": config.preset,
        "seq_len": config.train.seq_len,
        "vocab_size": config.model.vocab_size,
        "tokens": study.tokens,
        "steps": study.steps,
        "lrs": study.lrs,
        "seeds": list(study.settings.seeds),
        "micro_batches": study.settings.micro_batches,
        "schedule": config.parallel.schedule.name,
        "shapes": [_shape(study, shape) for shape in study.shapes],
        "models": [_model(study, name, model) for name, model in study.models.items()],
        "missing": study.missing,
    }


def findings(
    study: Plan, tried: Sequence[Outcome], others: Sequence[Outcome], times: Timed, train_tokens: int
) -> dict[str, Any]:
    """Return all numbers of a study.

    Args:
        study: the plan.
        tried: what came of the runs that try rates, with the first seed.
        others: of those with the other seeds.
        times: of each model.
        train_tokens: the tokens of the corpus.

    Returns:
        What `costs` returns, with the losses of ``shapes`` by seed, their mean and spread (the largest less the least),
        and the times of ``models``; ``runs``, one for each; ``orderings`` by equality; ``claims``, those of papers with
        what came out here; ``notes``, what is to be known before any of it is believed. Losses are in nats a token.
    """
    found, rates = costs(study), best_rates(tried)
    found |= {
        "train_tokens": train_tokens,
        "data": ", ".join(study.config.data.sources) or study.config.data.source.name,
    }
    found |= {
        "device": times.device,
        "decode_batch": study.settings.decode_batch,
        "decode_context": decode_context(study),
    }
    for model in found["models"]:
        name = model["name"]
        model |= {
            "lr": rates.get(name),
            "tokens_per_s": times.train.get(name),
            "decode_seconds": times.decode.get(name),
        }
    at_best = [one for one in [*tried, *others] if one.setting.lr == rates.get(one.setting.model)]
    for shape in found["shapes"]:
        shape |= _losses({str(one.setting.seed): one.loss for one in at_best if one.setting.model == shape["name"]})
        shape["lr"] = rates.get(shape["name"])
    found["runs"] = [
        {"name": one.setting.name, **asdict(one.setting), "loss": one.loss, "skipped_steps": one.skipped_steps}
        for one in [*tried, *others]
    ]
    found["orderings"] = {
        equal.value: _ordering(of_equal(found, equal.value), len(found["seeds"])) for equal in study.settings.equal
    }
    found["claims"] = verdicts(found)
    found["notes"] = _notes(study, found, times)
    return found


def decode_context(study: Plan) -> int:
    """Return the tokens in the caches when decoding is timed."""
    return study.settings.decode_context or study.config.model.max_seq_len


def of_equal(found: dict[str, Any], equal: str) -> list[dict[str, Any]]:
    """Return the shapes of an equality, the shallowest first."""
    return [shape for shape in found["shapes"] if shape["equal"] == equal]


def lower(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether a shape's loss is lower than another's for each of several seeds."""
    a, b = one["losses"], other["losses"]
    return len(a) > 1 and a.keys() == b.keys() and all(a[seed] < b[seed] for seed in a)


def _shape(study: Plan, shape: Shape) -> dict[str, Any]:
    model = shape.model
    return {
        "equal": shape.equal.value,
        "aspect": said(shape.aspect),
        "is_preset": shape.aspect == 1,
        "name": shape.name,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "d_model_per_layer": model.d_model / model.n_layers,
        "cost": cost_of(shape.equal, model, study.config.train.seq_len),
        "cost_off": shape.cost_off,
    }


def _model(study: Plan, name: str, model: ModelConfig) -> dict[str, Any]:
    settings, seq_len = study.settings, study.config.train.seq_len
    parts = model.params_by_part()
    pipelines = [pipeline_of(model, seq_len, study.config.parallel, pp, settings.micro_batches) for pp in settings.pp]
    return {
        "name": name,
        **{key: getattr(model, key) for key in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff")},
        "parameters": model.num_params,
        "embedding_and_head": parts["embedding"] + parts["head"],
        "flops_per_token": model.flops_per_token(seq_len),
        "kv_cache_bytes_per_token": model.kv_cache_bytes_per_token(),
        "pipelines": {str(pp): asdict(one) if one else None for pp, one in zip(settings.pp, pipelines, strict=True)},
    }


def _losses(losses: dict[str, float]) -> dict[str, Any]:
    finite = {seed: loss for seed, loss in losses.items() if math.isfinite(loss)}
    mean = statistics.fmean(finite.values()) if finite else None
    spread = max(finite.values()) - min(finite.values()) if len(finite) > 1 else None
    return {"losses": finite, "mean": mean, "spread": spread}


def _ordering(shapes: Sequence[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Compare the shape of the least mean loss over all seeds, and the preset, with all others."""
    measured = [shape for shape in shapes if shape["mean"] is not None]
    if not measured:
        return {"best": None, "pairs": []}
    best = min(with_all_seeds(measured, seeds), key=lambda shape: shape["mean"], default=None)
    (preset,) = (shape for shape in shapes if shape["is_preset"])
    pairs = [[one["name"], other["name"]] for one in measured for other in measured if lower(one, other)]
    rest = [shape for shape in shapes if shape is not preset]
    return {
        "best": best and best["name"],
        "best_below": [other["name"] for other in measured if best and lower(best, other)],
        "preset": preset["name"],
        "below_preset": [shape["name"] for shape in rest if lower(shape, preset)],
        "above_preset": [shape["name"] for shape in rest if lower(preset, shape)],
        "not_told_apart": [shape["name"] for shape in rest if not lower(shape, preset) and not lower(preset, shape)],
        "pairs": pairs,
    }


def _notes(study: Plan, found: dict[str, Any], times: Timed) -> list[str]:
    notes = [*study.missing]
    for shape in found["shapes"]:
        if abs(shape["cost_off"]) > NEAR:
            notes.append(f"{shape['name']} is {shape['cost_off']:+.1%} off the preset's {shape['equal']}")
    shares = [model["embedding_and_head"] / model["parameters"] for model in found["models"]]
    notes.append(f"embedding and head are {min(shares):.0%} to {max(shares):.0%} of a model's parameters")
    if (epochs := study.tokens / max(found["train_tokens"], 1)) > 1:
        notes.append(f"each run sees its data {epochs:.1f} times")
    notes += _of_rates(study, found)
    if len(study.settings.seeds) == 1:
        notes.append("one seed: what another would change is not known, and no ordering is stated")
    runs = found["runs"]
    if diverged := [run["name"] for run in runs if not math.isfinite(run["loss"])]:
        notes.append(f"{len(diverged)} of {len(runs)} runs diverged and have no loss: {', '.join(diverged)}")
    of_some = [shape for shape in found["shapes"] if 0 < len(shape["losses"]) < len(found["seeds"])]
    if names := sorted({shape["name"] for shape in of_some}):
        notes.append(f"{', '.join(names)}: without a loss for each seed, and so no part of what is said of mean losses")
    if skipped := sum(run["skipped_steps"] for run in runs):
        notes.append(f"updates of {skipped:,} steps were skipped, as spikes or not finite")
    if times.problem:
        notes.append(f"not timed: {times.problem}")
    return notes


def _of_rates(study: Plan, found: dict[str, Any]) -> list[str]:
    lrs = study.lrs
    if len(lrs) == 1:
        return [f"one rate, {lrs[0]:g}, for every shape: some may learn better at another"]
    notes = [
        f"the rate of each shape is the best of {', '.join(f'{lr:g}' for lr in lrs)} with seed "
        f"{study.settings.seeds[0]}, whose loss is so the least of {len(lrs)} and counts among the seeds"
    ]
    for end, which in ((lrs[0], "least"), (lrs[-1], "largest")):
        if names := [model["name"] for model in found["models"] if model["lr"] == end]:
            notes.append(f"the {which} rate tried is the best of {', '.join(names)}: beyond it may be a better one")
    return notes
