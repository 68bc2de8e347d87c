"""The names that figures have in W&B, which groups its charts by what stands before the first slash.

metrics.jsonl keeps the plain names, those on the left of `GROUPED`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

X_AXES = ("step", "tokens")
"""Figures that stand on no chart of their own: the others are drawn against them."""
GROUPED = {
    "step": "step",
    "tokens": "tokens",
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "global_batch": "train/global_batch",
    "seq_len": "train/seq_len",
    "skipped": "train/skipped",
    "skipped_steps": "train/skipped_steps",
    "loss_limit": "train/loss_limit",
    "grad_norm_limit": "train/grad_norm_limit",
    "passed_over": "train/passed_over",
    "seconds": "perf/step_seconds",
    "tokens_per_second": "perf/tokens_per_second",
    "mfu": "perf/mfu",
    "mfu_whole_attention": "perf/mfu_whole_attention",
    "flops_per_token": "perf/flops_per_token",
    "predicted_seconds": "perf/predicted_seconds",
    "optimizer_seconds": "perf/optimizer_seconds",
    "slow_ranks": "perf/slow/rank{}",
    "bubble": "pipeline/bubble",
    "bubble_expected": "pipeline/bubble_expected",
    "forward_seconds": "pipeline/stage{}/forward_seconds",
    "backward_seconds": "pipeline/stage{}/backward_seconds",
    "weight_seconds": "pipeline/stage{}/weight_seconds",
    "wait_seconds": "pipeline/stage{}/wait_seconds",
    "memory_gib": "memory/stage{}",
    "source_tokens": "data/{}/tokens",
    "val_loss": "val/loss",
    "val_bits_per_byte": "val/bits_per_byte",
    "val_sets": "val/{}/{}",
    "tasks": "eval/{}/{}",
    "failed_tasks": "eval/failed_tasks",
    "eval_seconds": "perf/eval_seconds",
    "eval_table": "eval/table",
    "save_blocked_seconds": "checkpoint/blocked_seconds",
    "save_seconds": "checkpoint/seconds",
    "save_gib": "checkpoint/gib",
    "restarts": "run/restarts",
    "timeline": "pipeline/timeline",
}
"""The name in W&B of each figure of a record. For one that has parts, by rank of the pipeline (a list) or by name (a
dictionary, which may hold further ones), each part takes the place of the next ``{}``."""


def grouped(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a record of metrics.jsonl as W&B gets them, each with a name of its own.

    A figure that the table does not name keeps its plain name, parts behind slashes.
    """
    found: dict[str, Any] = {}
    for key, value in record.items():
        for parts, one in _leaves(value):
            found[name_of(key, parts)] = one
    return found


def name_of(key: str, parts: Sequence[str]) -> str:
    """Return the name in W&B of a figure of records, of which these parts lead to a single number."""
    return GROUPED.get(key, "/".join([key, *["{}"] * len(parts)])).format(*parts)


def groups() -> list[str]:
    """List the groups of `GROUPED`."""
    return sorted({name.partition("/")[0] for name in GROUPED.values() if "/" in name})


def _leaves(value: Any) -> Iterator[tuple[list[str], Any]]:
    """Yield the single figures of a value, each with the names or places on the way to it."""
    if isinstance(value, Mapping | list):
        for part, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            for parts, one in _leaves(inner):
                yield [str(part), *parts], one
    else:
        yield [], value
