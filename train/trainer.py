"""The training loop, top to bottom."""

import logging
import os
import shlex
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from conf.schema import Config
from conf.settings import Precision
from parallel.costs import layer_costs
from parallel.engine import EngineSettings, build_engine, quiet, start_process_group
from parallel.stages import split, stage_rows, stage_table
from train.data.batches import eval_micro_batches, train_micro_batches
from train.data.order import SampleOrder
from train.data.packing import PackedSequences
from train.metrics import peak_flops, peak_memory_by_stage
from train.optimizer import adamw
from train.preflight import Ready, this_machine
from train.sample import sample_text
from train.schedule import length_of, rate_share
from train.tracking import Tracker

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

log = logging.getLogger(__name__)


def train(ready: Ready) -> None:
    """Train, validate, sample; every rank calls it. Rank 0 writes the run folder and speaks."""
    config, layout, data = ready.config, ready.layout, ready.data
    settings, shape = config.train, config.model
    length = length_of(config)

    # The stages, on their devices.
    device = start_process_group()
    rank = dist.get_rank()
    use_cpus_fairly(device)
    bf16 = settings.precision is Precision.bf16 or (settings.precision is Precision.auto and device.type == "cuda")
    costs = layer_costs(
        shape,
        config.parallel.balance,
        seq_len=settings.seq_len,
        micro_batch=settings.micro_batch,
        device=device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    stages = split(costs, layout.pp)
    engine = build_engine(
        shape,
        layout,
        stages,
        EngineSettings(
            micro_batch=settings.micro_batch,
            accumulation=settings.global_batch // (settings.micro_batch * layout.dp),
            clip=config.optimizer.clip,
            bf16=bf16,
            seed=settings.seed,
            recompute=config.parallel.recompute,
        ),
        make_optimizer=partial(adamw, settings=config.optimizer),
    )

    # The data: which sequences a step sees depends on the seed and the step alone.
    replica = dict(micro_batch=settings.micro_batch, dp_rank=layout.replica(rank), dp_size=layout.dp)
    sequences = data.train(settings.seq_len)
    order = SampleOrder(len(sequences), settings.seed)
    batches = train_micro_batches(sequences, order, global_batch=settings.global_batch, **replica)
    held_out = data.val(settings.seq_len)

    peak = peak_flops(device)
    flops_per_token = shape.flops_per_token(settings.seq_len)
    facts = {
        "layout": {**asdict(layout), "stages": [asdict(stage) for stage in stages]},
        "parameters": shape.num_params,
        "flops_per_token": flops_per_token,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bf16" if bf16 else "fp32",
        "data": {"train_tokens": data.num_train_tokens, "val_tokens": data.num_val_tokens},
    }
    tracker = Tracker(config, ready.run_dir, length.steps, facts) if rank == 0 else None
    if tracker:
        for warning in ready.warnings:
            log.warning(warning)
        log.info("%s", header(config, facts, str(layout), length.steps, data.num_train_tokens, len(held_out)))
        log.info("%s", stage_table(stage_rows(shape, stages)))

    # The loop.
    first_loss = last_loss = val_loss = None
    trained_seconds, timed_steps = 0.0, 0
    for step in range(1, length.steps + 1):
        begin = time.perf_counter()
        rate = config.optimizer.lr * rate_share(step, length.schedule_steps, config.schedule)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        loss = float(engine.train_batch(batches))
        grad_norm = float(engine.get_global_grad_norm())
        seconds = time.perf_counter() - begin

        first_loss, last_loss = first_loss if first_loss is not None else loss, loss
        if step > 1 or length.steps == 1:  # the first step pays for allocations and kernel choices
            trained_seconds, timed_steps = trained_seconds + seconds, timed_steps + 1
        record: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": rate,
            "tokens": step * length.tokens_per_step,
            "seconds": seconds,
            "tokens_per_second": length.tokens_per_step / seconds,
            "memory_gib": peak_memory_by_stage(device, layout.stage(rank), layout.pp),
        }
        if peak:
            record["mfu"] = record["tokens_per_second"] * flops_per_token / (peak * layout.world_size)
        if step == length.steps or (settings.val_every and step % settings.val_every == 0):
            val_loss = validation_loss(engine, held_out, settings.val_sequences, **replica)
            if val_loss is not None:
                record["val_loss"] = val_loss
        if tracker:
            tracker.step(record)

    # The end: a few lines from the model, and a summary.
    texts: list[str] = []
    if config.sample.tokens and config.sample.prompts:
        texts = sample_text(engine, shape, data.tokenizer(), data.eos_id, config.sample, settings.seed)
    if tracker:
        if texts:
            tracker.samples(config.sample.prompts, texts)
        summary = {
            "steps": length.steps,
            "tokens": length.steps * length.tokens_per_step,
            "loss_first": first_loss,
            "loss_last": last_loss,
            "val_loss": val_loss,
            "tokens_per_second": timed_steps * length.tokens_per_step / trained_seconds,
        }
        tracker.finish(summary)
        log.info("%s", closing(summary, texts, ready.run_dir))
    dist.barrier()
    with quiet():
        dist.destroy_process_group()


def validation_loss(
    engine: "PipelineEngine", held_out: PackedSequences, limit: int, *, micro_batch: int, dp_rank: int, dp_size: int
) -> float | None:
    """Mean token loss, in nats, over the first `limit` held-out sequences, on every rank; None if none are held out.

    The sequences are the same for every layout. All ranks call it together.
    """
    if not len(held_out):
        return None
    batches, count, scale = eval_micro_batches(
        held_out, limit, micro_batch=micro_batch, dp_rank=dp_rank, dp_size=dp_size
    )
    return float(engine.eval_batch(iter(batches), num_micro_batches=count)) * scale


def use_cpus_fairly(device: torch.device) -> None:
    """On the CPU, share the cores among the processes of this host, unless OMP_NUM_THREADS says otherwise."""
    local = this_machine().local_processes or 1
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def header(config: Config, facts: dict[str, Any], layout: str, steps: int, train_tokens: int, val_count: int) -> str:
    """What is about to run, in three lines."""
    batch = config.train
    return (
        f"{config.name}: {facts['parameters']:,} parameters, {facts['precision']} on {facts['device']}, {layout}\n"
        f"{train_tokens:,} training tokens, {val_count:,} held-out sequences; vocabulary {config.model.vocab_size:,}\n"
        f"{steps:,} steps of {batch.global_batch} x {batch.seq_len} tokens, micro-batches of {batch.micro_batch}"
    )


def closing(summary: dict[str, Any], texts: list[str], run_dir: Path) -> str:
    """The last words: samples, losses, speed, where things are."""
    lines = [f"--- sample {i} ---\n{text}" for i, text in enumerate(texts, 1)]
    val = f"{summary['val_loss']:.4f}" if summary["val_loss"] is not None else "none (no held-out documents)"
    lines += [
        "--- done ---" if texts else "done",
        f"loss             {summary['loss_first']:.4f} -> {summary['loss_last']:.4f} in {summary['steps']:,} steps",
        f"validation loss  {val}",
        f"speed            {summary['tokens_per_second']:,.0f} tokens/s",
        f"run folder       {run_dir}",
    ]
    logged = summary["wandb"]
    if logged["mode"] == "offline":
        folder = shlex.quote(logged["dir"])
        lines.append(f"W&B (no account) wandb leet {folder}")
        lines.append(f"W&B (upload)     wandb sync {folder}")
    elif "url" in logged:
        lines.append(f"W&B              {logged['url']}")
    return "\n".join(lines)
