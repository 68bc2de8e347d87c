"""What a run says of itself before its first step."""

import logging
from typing import Any

from parallel.stages import Stage, stage_rows, stage_table
from train import passed_over
from train.checkpoint import history, resume
from train.checkpoint.manifest import Manifest
from train.data.mixed_order import HeldOutSamples, MixedOrder
from train.data.sources import shares, table
from train.length import Consumed, Length
from train.preflight import PreparedRun

log = logging.getLogger(__name__)


def announce(
    prepared: PreparedRun,
    stages: list[Stage],
    facts: dict[str, Any],
    past: Manifest | None,
    begun: Consumed,
    length: Length,
    order: MixedOrder,
    held_out: HeldOutSamples,
) -> None:
    """Log the warnings, the header, what is passed over, and the table of stages.

    Args:
        prepared: from `train.preflight`.
        stages: of all ranks.
        facts: what identifies the run besides its settings.
        past: the checkpoint that it goes on from; None for a run from the beginning.
        begun: what was trained on before its settings held.
        length: of it.
        order: of its samples.
        held_out: its sequences to validate on.
    """
    config = prepared.config
    changes: list[str] = []
    if past:
        changes = resume.warnings(config, past, prepared.data.fingerprint) + history.said(config, past, begun)
    for warning in prepared.warnings + changes:
        log.warning("%s", warning)
    log.info("%s", header(prepared, facts, held_out, length))
    if len(prepared.data.by_name) > 1 or config.data.stages:
        log.info("%s", table(shares(config, prepared.data, begun)))
    for line in [*prepared.data.packed(config), *passed_over.announced(config, order, length)]:
        log.info("%s", line)
    log.info("%s", stage_table(stage_rows(config.model, stages, config.parallel.placement)))
    if past:
        log.info("%s", f"going on after step {past.step:,}")
    elif prepared.source:
        log.info("%s", f"beginning with the weights of {prepared.source.path}")


def header(prepared: PreparedRun, facts: dict[str, Any], held_out: HeldOutSamples, length: Length) -> str:
    """Describe a run in four lines, of which the third lists its steps by batch and length."""
    config, val_count = prepared.config, f"{len(held_out):,} held-out sequences"
    if len(prepared.data.by_name) > 1 and len(held_out) < config.train.val_sequences:
        val_count += f" (in the mixture's shares: {held_out.first_to_end} has no more)"
    alike = length.taken(length.schedule_steps)
    steps = [f"{of.count:,} steps of {of.global_batch} x {of.seq_len} tokens" for of in alike]
    some = f", of which this run takes {length.steps:,}" if length.steps < length.schedule_steps else ""
    return (
        f"{config.name}: {facts['parameters']:,} parameters, {facts['precision']} on {facts['device']}, "
        f"{prepared.layout}\n"
        f"{prepared.data.num_train_tokens:,} training tokens, {val_count}; vocabulary {config.model.vocab_size:,}\n"
        f"{', then '.join(steps)}{some}, micro-batches of {config.train.micro_batch}\n"
        f"{facts['kernels']}"
    )
