"""The costs of a model and its split into stages, computed before anything runs (`deepnarrow describe`)."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conf.schema import Config
from conf.train_settings import corpora
from launch.scaling import laws
from launch.timeline import picture
from model.config import ModelConfig
from model.problems import BadInput
from parallel.plan.job import Job
from parallel.plan.search import rank_memory
from parallel.simulation import Timeline
from parallel.stages import stage_rows, stage_table
from train.data.mixed_order import MixedOrder, mixtures_of
from train.data.prepare import already_prepared
from train.data.sources import prepare_run, shares
from train.job import computes_in_bf16, job_of
from train.length import Consumed, length_of, longest
from train.like import take_over
from train.timeline import expected, schedule_name
from train.timeline_picture import draw_rows
from train.uptrain import compose_with_source, sound

_PRESET = re.compile(r"[A-Za-z0-9][\w-]*")


def settings(arguments: Sequence[str]) -> Config:
    """Compose what is to be described, as training would, with the shape that `init_from` gives.

    Args:
        arguments: overrides and options, ``--like`` among them; a bare word is a preset of the model, as in ``67b``.

    Raises:
        BadInput: with every problem.
    """
    composition, source, _ = compose_with_source(take_over(of_presets(arguments)), checked=False)
    return sound(composition, source)


def of_presets(arguments: Sequence[str]) -> list[str]:
    """Write a bare word as the preset of the model that it stands for, ``67b`` as ``model=67b``.

    Raises:
        BadInput: several models are given.
    """
    words = [f"model={text}" if _PRESET.fullmatch(text) else text for text in arguments]
    if len(presets := [text for text in words if text.startswith("model=")]) > 1:
        raise BadInput([f"{' '.join(presets)}: one model is described at a time; {presets[0]} alone would work"])
    return words


def facts(config: Config) -> dict[str, Any]:
    """Return the numbers of `deepnarrow describe --json`.

    The keys are: preset; attention (MHA, GQA or MQA); seq_len; parameters and parameters_by_part; M and flops_per_token
    at seq_len; kv_cache_bytes_per_token (bf16), until a window is full, and kv_cache_bytes_per_sequence of seq_len;
    window and sliding_layers, how many have it; stages, a list with stage, rank, layers, blocks, parameters and
    cost_share; pipeline, the bubble and activations of its schedule, null for one stage; memory, the bytes of each rank
    of the pipeline, in bf16 unless train.precision=fp32: state, activations (what is held between passes when the most
    bytes are allocated), workspace (of the pass at that time) and peak; scaling_laws, what they give for this compute,
    and what is set; length, the steps of the run by batch, sequence length and data stage; sources, of a mixture, their
    tokens and shares, and where all are prepared here the training tokens that they have (available) and the epochs,
    else null; attention_choices, the same model with other key/value heads.
    """
    model, seq_len, job = config.model, config.train.seq_len, job_of(config)
    return {
        "preset": config.preset,
        "attention": model.attention_name,
        "seq_len": seq_len,
        "parameters": model.num_params,
        "parameters_by_part": model.params_by_part(),
        "M": model.scaling_m(seq_len),
        "flops_per_token": model.flops_per_token(seq_len),
        "kv_cache_bytes_per_token": model.kv_cache_bytes_per_token(),
        "kv_cache_bytes_per_sequence": model.kv_cache_bytes(seq_len),
        "window": model.window,
        "sliding_layers": sum(window is not None for window in model.windows),
        "stages": stage_rows(model, job.stages, job.placement),
        "length": _length(config),
        "sources": _sources(config),
        "pipeline": _pipeline(job),
        "memory": _memory(job),
        "scaling_laws": asdict(laws.advice(config)),
        "attention_choices": [_choice(config, n_kv_heads) for n_kv_heads in _choices(model)],
    }


def _length(config: Config) -> list[dict[str, int]]:
    """Return the steps of the run, those of one batch, length and data stage together."""
    return [{"first_step": span.step, "steps": span.count, **asdict(span.first)} for span in length_of(config).spans]


def _sources(config: Config) -> list[dict[str, Any]]:
    """Return the tokens that the run takes of each source, and its share of those of each data stage."""
    length, mixtures = length_of(config), mixtures_of(config)
    order = MixedOrder.of(config, length, Consumed(skip=config.train.skip_samples))
    tokens = order.source_tokens(length.samples_after(length.schedule_steps))
    prepared = bool(config.data.sources) and already_prepared(corpora(config.data), config.model.vocab_size)
    whole = replace(config, train=replace(config.train, max_steps=None))
    taken = {share.name: share for share in shares(whole, prepare_run(whole, progress=False))} if prepared else {}
    return [
        {
            "source": name,
            "tokens": tokens.get(name, 0),
            "shares": [float(mixture.shares.get(name, 0)) for mixture in mixtures],
            "max_epochs": source.max_epochs,
            "available": taken[name].available if taken else None,
            "epochs": taken[name].epochs if taken else None,
        }
        for name, source in config.data.sources.items()
    ]


def _pipeline(job: Job) -> dict[str, Any] | None:
    """Return micro-batches, bubble, and the most activations that a rank saves, in micro-batches of all its layers."""
    if job.layout.pp == 1:
        return None
    timeline = _step(job)
    return {
        "schedule": job.settings.schedule.name,
        "virtual_stages": job.placement.virtual,
        "dp": job.layout.dp,
        "micro_batches": job.settings.accumulation,
        "bubble": timeline.bubble,
        "activations_kept": max(timeline.activations),
    }


def _memory(job: Job) -> list[dict[str, float]]:
    """Predict the peak memory of each rank of the pipeline in bytes, as on a GPU."""
    found = [rank_memory(job, rank) for rank in range(job.layout.pp)]
    return [{**asdict(memory), "peak": memory.peak} for memory in found]


def _step(job: Job) -> Timeline:
    """Simulate a step, the last batch of the run."""
    shares = [stage.cost_share for stage in job.stages]
    return expected(job.settings.schedule, job.placement, job.settings.accumulation, shares)


def draw_step(config: Config, path: Path) -> None:
    """Draw a picture of the step that `describe` simulates.

    Raises:
        BadInput: there are no stages, or the file cannot be written.
    """
    if config.parallel.pp == 1:
        raise BadInput([f"--picture={path}: parallel.pp=1 has no stages to draw; parallel.pp=2 has"])
    with picture("--picture", path):
        job = job_of(config)
        step, name = _step(job), schedule_name(job.settings.schedule, job.placement)
        title = f"{name}, {job.settings.accumulation:,} micro-batches: bubble {step.bubble:.1%}"
        label = "time, in passes of a micro-batch through the whole model"
        draw_rows([(title, step.spans)], job.placement, path, 1, "times a micro-batch's passes", label)


def _choices(model: ModelConfig) -> list[int]:
    """Choose key/value heads to compare: multi-head, GQA-8 where 8 divides the heads, the model's own, multi-query."""
    heads = {model.n_heads, model.n_kv_heads, 1} | ({8} if model.n_heads % 8 == 0 else set())
    return sorted(heads, reverse=True)


def _choice(config: Config, n_kv_heads: int) -> dict[str, Any]:
    """Return the costs of the model with this number of key/value heads, the KV cache in bf16 bytes."""
    other = replace(config, model=replace(config.model, n_kv_heads=n_kv_heads))
    model, seq_len = other.model, config.train.seq_len
    return {
        "attention": model.attention_name,
        "n_kv_heads": n_kv_heads,
        "parameters": model.num_params,
        "flops_per_token": model.flops_per_token(seq_len),
        "kv_cache_bytes_per_token": model.kv_cache_bytes_per_token(),
        "kv_cache_bytes_per_sequence": model.kv_cache_bytes(seq_len),
    }


def as_json(config: Config) -> str:
    """Render `facts` as JSON."""
    return json.dumps(facts(config), indent=2)


def as_text(config: Config) -> str:
    """Render `facts` as text."""
    model, found = config.model, facts(config)
    console = Console(width=100, highlight=False)
    with console.capture() as capture:
        name = config.init_from or found["preset"]
        console.print(
            f"{name}: {model.n_layers} layers, d_model {model.d_model}, {model.n_heads} query and "
            f"{model.n_kv_heads} key/value heads of {model.d_head} ({found['attention']}), d_ff {model.d_ff}, "
            f"vocabulary {model.vocab_size}, context {model.max_seq_len}"
            + (f", {found['sliding_layers']} layers with a window of {model.window}" if model.window else "")
        )
        parts = Table("part", "parameters", "share", title="parameters", title_justify="left")
        for part, count in found["parameters_by_part"].items():
            parts.add_row(part, f"{count:,}", f"{count / found['parameters']:.1%}")
        parts.add_section()
        parts.add_row("all", f"{found['parameters']:,}", "")
        console.print(parts)
        costs = Table("cost", "per token", title=f"at sequences of {found['seq_len']} tokens", title_justify="left")
        costs.add_row("M = 72 L d² + 12 L d s (non-embedding FLOPs)", f"{found['M']:,}")
        costs.add_row("true FLOPs, forward and backward, up to", f"{found['flops_per_token']:,}")
        costs.add_row("KV cache, bf16 bytes", f"{found['kv_cache_bytes_per_token']:,}")
        if model.window:
            grown = model.kv_cache_bytes(model.window + 1) - model.kv_cache_bytes(model.window)
            costs.add_row("KV cache beyond the window, bf16 bytes", f"{grown:,}")
        console.print(costs)
        title = f"with other key/value heads; a sequence is {found['seq_len']} tokens"
        columns = ("attention", "parameters", "FLOPs per token", "KV cache per token", "per sequence", "of MHA's")
        choices = Table(*columns, title=title, title_justify="left")
        whole = found["attention_choices"][0]["kv_cache_bytes_per_token"]
        for choice in found["attention_choices"]:
            per_token, own = choice["kv_cache_bytes_per_token"], choice["n_kv_heads"] == model.n_kv_heads
            choices.add_row(
                choice["attention"] + (" (this)" if own else ""),
                f"{choice['parameters']:,}",
                f"{choice['flops_per_token']:.4g}",
                f"{per_token / 1024:,.0f} KiB",
                f"{choice['kv_cache_bytes_per_sequence'] / 2**20:,.0f} MiB",
                f"{per_token / whole:.1%}",
            )
        console.print(choices)
    text = capture.get() + stage_table(found["stages"])
    most = max(found["memory"], key=lambda rank: rank["peak"])
    state, activations, workspace, peak = (
        f"{most[key] / 2**30:,.1f}" for key in ("state", "activations", "workspace", "peak")
    )
    parallel, train = config.parallel, config.train
    precision = "bf16" if computes_in_bf16(config, on_gpus=True) else "fp32"
    text += _of_data(config, found)
    text += (
        f"\nmemory in {precision}, tp {parallel.tp}, dp {parallel.dp or 1}, micro-batches of {train.micro_batch} x "
        f"{longest(config)} tokens, recompute {parallel.recompute.name}: {peak} GiB on the rank that needs most\n"
        f"({state} weights, gradients and optimizer; {activations} activations; {workspace} workspace)"
    )
    if line := found["pipeline"]:
        text += (
            f"\n{line['schedule']}, dp {line['dp']}: {line['micro_batches']:,} micro-batches a step, a bubble of "
            f"{line['bubble']:.1%}; a rank keeps the activations of {line['activations_kept']:g} micro-batches"
        )
    return f"{text}\n{laws.as_text(laws.advice(config), length_of(config).spans[-1].first.seq_len)}"


def _of_data(config: Config, found: dict[str, Any]) -> str:
    """Render the steps of a run that are not all alike, and the sources of a mixture, as text."""
    lines = []
    if len(found["length"]) > 1:
        lines += [
            f"from step {of['first_step']:,}, after {of['tokens_before']:,} tokens: {of['steps']:,} steps of "
            f"{of['global_batch']} x {of['seq_len']} tokens"
            + (f", data stage {of['stage']}" if config.data.stages else "")
            for of in found["length"]
        ]
    for of in found["sources"]:
        said = " then ".join(f"{share:.2%}" for share in of["shares"])
        if (epochs := of["epochs"]) is not None:
            said += f"; {epochs:.3g} epochs of {of['available']:,}{' (repeated)' * (epochs > 1)}"
        lines.append(f"{of['source']}: {of['tokens']:,} tokens; {said}")
    if any(of["epochs"] is None for of in found["sources"]):
        lines.append("epochs of each source: not prepared here; deepnarrow prepare prints them")
    for index, mixture in enumerate(mixtures_of(config)):
        if rounding := mixture.rounding():
            lines.append(f"data.stages[{index}]: {rounding}" if config.data.stages else f"data.sources: {rounding}")
    return "".join(f"\n{line}" for line in lines)
