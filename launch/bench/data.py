"""The speed at which a corpus is tokenised and its tokens are loaded, against what a cluster consumes."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from conf.schema import Config
from conf.train_settings import DataConfig, Source
from launch.bench.common import composed, device_name
from launch.bench.preparation import OURS, compare
from launch.tables import rendered
from model.problems import BadInput
from parallel.layout import layout_for
from train.data.batches import train_micro_batches
from train.data.corpus import list_files
from train.data.mixed_order import MixedOrder, TrainSamples
from train.data.mixture import Mixture
from train.data.prepare import PreparedData, prepare
from train.length import Consumed, length_of
from train.metrics import PEAK_BF16_FLOPS

DEFAULTS = ["data=stdlib", "model.vocab_size=32000", "model.max_seq_len=4096", "train.seq_len=4096"]
CLUSTER = ("model=67b", "parallel.pp=8", "parallel.tp=8", "parallel.dp=16")
"""The overrides of the cluster that consumes: its layout has 1024 ranks, a GPU each."""

SAMPLE_MB, ROUNDS = 16, 3
"""The text in MB that others tokenise as well, and the number of turns."""


def measure(
    overrides: Sequence[str],
    cluster: Sequence[str] = CLUSTER,
    gpu: str = "H100",
    mfu: float = 0.4,
    corpus_tokens: float = 2e12,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """Prepare a corpus in a temporary cache (below TMPDIR), load it as a rank does, and compare.

    Args:
        overrides: the overrides of the corpus, the vocabulary and `train.seq_len`, after `DEFAULTS`.
        cluster: the overrides of the cluster's model and layout.
        gpu: the cluster's GPU, a key of `train.metrics.PEAK_BF16_FLOPS`.
        mfu: the model FLOPs utilisation that the cluster is assumed to reach.
        corpus_tokens: the number of tokens of the corpus to prepare for the cluster.
        seconds: the number of seconds to load for.

    Returns:
        ``preparation``: the speed on this corpus, with the training of a tokenizer (where `data.tokenizer` is null) and
        with an existing one. ``preparers``: what `launch.bench.preparation.compare` returns. ``loading``: the speed of
        one rank. ``cluster``: the tokens/s in all and of each rank that reads; how many times as fast loading is; how
        many cores tokenise what it consumes, and core-hours for `corpus_tokens`, both under the assumption that speed
        grows with the cores.

    Raises:
        BadInput: the settings cannot work, or the GPU is unknown.
    """
    config = composed(DEFAULTS, overrides).config
    if config.data.sources:
        raise BadInput(["data.sources: one corpus is measured at a time; data=files data.path=… would work"])
    if config.data.source is Source.tokens:
        raise BadInput(["data.source=tokens: preparation is measured on text; the text that the tokens were made of "
                        "would work"])  # fmt: skip
    there = composed([], cluster).config
    if gpu not in PEAK_BF16_FLOPS:
        raise BadInput([f"gpu={gpu}: its peak is not known; one of {', '.join(PEAK_BF16_FLOPS)} would work"])
    cores, parallelism = len(os.sched_getaffinity(0)), os.environ.get("TOKENIZERS_PARALLELISM")
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        data = replace(config.data, cache_dir=folder)
        preparation = {}
        if data.tokenizer is None:
            prepared, preparation["tokenizer trained"] = _prepared(config, data)
            data = replace(data, tokenizer=str(prepared.tokenizer_path), cache_dir=folder + "/again")
            if parallelism is None:  # a preparation sets it to false, with which the next one would use one core
                os.environ.pop("TOKENIZERS_PARALLELISM", None)
        prepared, preparation["tokenizer there"] = _prepared(config, data)
        loading = _loaded(config, there, prepared, seconds)
        preparers = compare(config.data, prepared.tokenizer_path, SAMPLE_MB, ROUNDS)
        num_bytes = sum(path.stat().st_size for _, path in list_files(data))
    tokenised = preparation["tokenizer there"]["tokens_per_second"] / cores
    consumed = consumption(there, gpu, mfu)
    return {
        "device": device_name(torch.device("cpu")),
        "cores": cores,
        "corpus": {"source": config.data.source.value, "bytes": num_bytes, "tokens": _tokens(prepared)},
        "vocabulary": prepared.tokenizer_size,
        "preparation": preparation,
        "preparers": preparers,
        "loading": loading,
        "cluster": {
            **consumed,
            "times_loading": loading["tokens_per_second"] / consumed["tokens_per_second_of_a_rank"],
            "cores_to_tokenise": consumed["tokens_per_second"] / tokenised,
            "corpus_tokens": corpus_tokens,
            "core_hours": corpus_tokens / tokenised / 3600,
        },
    }


def consumption(there: Config, gpu: str, mfu: float) -> dict[str, Any]:
    """Compute the tokens/s that a cluster consumes, in all and by each rank that reads.

    These are the ranks of the first and of the last stage; the tensor-parallel ranks of a replica read the same.

    Args:
        there: the configuration of the cluster: model, `train.seq_len`, and a layout with its replicas.
        gpu, mfu: the arguments of `measure`.
    """
    parallel = there.parallel
    layout = layout_for(parallel, parallel.pp * parallel.tp * (parallel.dp or 1))
    flops = there.model.flops_per_token(there.train.seq_len)
    tokens = layout.world_size * PEAK_BF16_FLOPS[gpu] * mfu / flops
    return {
        "gpus": layout.world_size,
        "gpu": gpu,
        "mfu": mfu,
        "model": there.preset,
        "flops_per_token": flops,
        "tokens_per_second": tokens,
        "replicas": layout.dp,
        "reading_ranks": layout.dp * layout.tp * min(2, layout.pp),
        "tokens_per_second_of_a_rank": tokens / layout.dp,
    }


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    corpus, cluster = found["corpus"], found["cluster"]
    table = Table("", "seconds", "tokens/s")
    for name, one in found["preparation"].items():
        table.add_row(f"preparation, {name}", f"{one['seconds']:.1f}", f"{one['tokens_per_second']:,.0f}")
    loading = found["loading"]
    table.add_row("loading, one rank", f"{loading['seconds']:.1f}", f"{loading['tokens_per_second']:,.0f}")
    whole, each = cluster["tokens_per_second"], cluster["tokens_per_second_of_a_rank"]
    name = f"{cluster['gpus']} x {cluster['gpu']} on {cluster['model']} at {cluster['mfu']:.0%} MFU"
    table.add_row(name, "", f"{whole:,.0f}")
    table.add_row(f"of that each of {cluster['reading_ranks']} ranks that read", "", f"{each:,.0f}")
    others = _preparers(found["preparers"])
    size = f", {corpus['bytes'] / 1e6:.1f} MB" if corpus["bytes"] else ""
    return "\n".join(
        [
            f"{corpus['source']}{size}, {corpus['tokens']:,} tokens of {found['vocabulary']:,}; {found['device']}",
            rendered(table),
            *others,
            f"a rank loads {cluster['times_loading']:,.0f} times as fast as the cluster consumes",
            f"{cluster['cores_to_tokenise']:,.1f} such cores tokenise as fast as it consumes; "
            f"{cluster['corpus_tokens']:.3g} tokens take {cluster['core_hours']:,.0f} core-hours",
        ]
    )


def _preparers(found: dict[str, Any]) -> list[str]:
    """Render who tokenises how fast, by turns; of a core are tokens per second of processor time."""
    table = Table("tokenising, by turns", "cores", "seconds", "tokens/s", "tokens/s of a core", "against ours")
    ours = next(row for row in found["rows"] if row["name"] == OURS)["tokens_per_cpu_second"]
    for row in found["rows"]:
        share = f"{row['tokens_per_cpu_second'] / ours:.2f}"
        speeds = (f"{row[key]:,.0f}" for key in ("tokens_per_second", "tokens_per_cpu_second"))
        table.add_row(row["name"], str(row["cores"]), f"{row['seconds']:.1f}", *speeds, share)
    absent = [f"absent: {', '.join(found['absent'].values())}"] if found["absent"] else []
    return [rendered(table), *absent]


def _tokens(prepared: PreparedData) -> int:
    return prepared.num_train_tokens + prepared.num_val_tokens


def _prepared(config: Config, data: DataConfig) -> tuple[PreparedData, dict[str, float]]:
    begin = time.perf_counter()
    prepared = prepare(data, config.model.vocab_size, config.train.seq_len, progress=False)
    seconds = time.perf_counter() - begin
    return prepared, {"seconds": seconds, "tokens_per_second": _tokens(prepared) / seconds}


def _loaded(config: Config, there: Config, prepared: PreparedData, limit: float) -> dict[str, float]:
    """Load micro-batches of one of the cluster's replicas for `limit` seconds, from the page cache."""
    length = length_of(replace(there, train=replace(there.train, seq_len=config.train.seq_len)))
    order = MixedOrder(length, [Mixture({"corpus": 1.0})], Consumed())
    batches = train_micro_batches(
        TrainSamples(order, {"corpus": prepared}, config.train.seed),
        length.at,
        micro_batch=there.train.micro_batch,
        dp_rank=0,
        dp_size=there.parallel.dp or 1,
        eos_id=prepared.eos_id,
        document_mask=True,
    )
    next(batches)
    begin, tokens = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < limit:
        tokens += next(batches).tokens.numel()
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
