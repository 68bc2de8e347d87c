"""The training loop, top to bottom."""

import logging
import shlex
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from conf.schema import Config, to_jsonable
from conf.train_settings import Precision
from model.kernels import which_and_why
from parallel.costs import layer_costs
from parallel.engine import EngineSettings, build_engine, quiet, start_process_group
from parallel.processes import use_cpus_fairly
from parallel.stages import split_for, stage_rows, stage_table
from parallel.state import OptimizerState
from train import timeline
from train.agreement import control_group, from_rank_0, max_over_ranks
from train.checkpoint import resume
from train.checkpoint.folder import CHECKPOINTS
from train.checkpoint.saver import Outcome, Saver
from train.data.batches import ahead, eval_micro_batches, train_micro_batches
from train.data.order import SampleOrder
from train.data.packing import PackedSequences
from train.learning_rate import length_of, rate_share
from train.metrics import peak_flops, peak_memory_by_stage
from train.optimizer import adamw
from train.preflight import PreparedRun
from train.profiling import profiled
from train.sample import sample_text
from train.stopping import StopSignals
from train.tracking import Tracker, code_version

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

log = logging.getLogger(__name__)


def train(prepared: PreparedRun, signals: StopSignals) -> None:
    """Train, save, validate, sample; every rank calls it. Rank 0 writes the run folder and speaks.

    Args:
        prepared: from `train.preflight`.
        signals: whether this rank has been told to stop; one that has stops all after the step under way.

    Raises:
        BadInput: on every rank: the checkpoint to go on from is damaged or does not fit.
        SystemExit: 1: the run has ended and its last step could not be saved.
    """
    config, layout, data = prepared.config, prepared.layout, prepared.data
    settings, shape = config.train, config.model
    length = length_of(config)

    # The stages, on their devices.
    device = start_process_group()
    rank = dist.get_rank()
    use_cpus_fairly(device)
    group = control_group()
    run_dir, start, complete = from_rank_0((prepared.run_dir.absolute(), prepared.start, prepared.complete), group)
    if complete:
        with quiet():
            dist.destroy_process_group()
        return
    bf16 = settings.precision is Precision.bf16 or (settings.precision is Precision.auto and device.type == "cuda")
    costs = layer_costs(
        shape,
        config.parallel.balance,
        seq_len=settings.seq_len,
        micro_batch=settings.micro_batch,
        device=device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    place, accumulation = config.parallel.place, settings.global_batch // (settings.micro_batch * layout.dp)
    stages = split_for(costs, place)
    shares = [stage.cost_share for stage in stages]
    bubble = timeline.expected(config.parallel.schedule, place, accumulation, shares).bubble
    engine = build_engine(
        shape,
        layout,
        stages,
        EngineSettings(
            micro_batch=settings.micro_batch,
            accumulation=accumulation,
            clip=config.optimizer.clip,
            bf16=bf16,
            seed=settings.seed,
            seq_len=settings.seq_len,
            recompute=config.parallel.recompute,
            head_pieces=config.parallel.head_pieces,
            schedule=config.parallel.schedule,
            place=place,
        ),
        make_optimizer=partial(adamw, settings=config.optimizer),
    )

    # What was learned before, from a checkpoint of any layout.
    state = OptimizerState(engine, shape, layout, rank)
    past = resume.load_newest_sound(config, start, state, group)
    steps_before = past.step if past else 0
    if prepared.source and not past:
        resume.load_weights(state, prepared.source.weights, group)

    # The data: which sequences a step sees depends on the seed and the step alone.
    replica = dict(micro_batch=settings.micro_batch, dp_rank=layout.replica(rank), dp_size=layout.dp)
    sequences = data.train(settings.seq_len)
    batches = ahead(
        train_micro_batches(
            sequences,
            SampleOrder(len(sequences), settings.seed),
            global_batch=settings.global_batch,
            start_sample=settings.skip_samples + steps_before * settings.global_batch,
            **replica,
        ),
        pinned=device.type == "cuda",
    )
    held_out = data.val(settings.seq_len)

    # Where it is all written down.
    peak = peak_flops(device)
    flops_per_token = shape.flops_per_token(settings.seq_len)
    facts = {
        "layout": {**asdict(layout), "stages": [asdict(stage) for stage in stages]},
        "parameters": shape.num_params,
        "flops_per_token": flops_per_token,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bf16" if bf16 else "fp32",
        "kernels": which_and_why(shape, device, torch.bfloat16 if bf16 else torch.float32),
        "data": {"train_tokens": data.num_train_tokens, "val_tokens": data.num_val_tokens},
    }
    tracker = None
    if rank == 0:
        tracker = Tracker(config, run_dir, length.steps, facts, resumed=steps_before if start.own else None)
        for warning in prepared.warnings + (resume.warnings(config, past, data.fingerprint) if past else []):
            log.warning(warning)
        log.info("%s", header(config, facts, str(layout), length.steps, data.num_train_tokens, len(held_out)))
        log.info("%s", stage_table(stage_rows(shape, stages, place)))
        if past:
            log.info("%s", f"going on after step {past.step:,}")
        elif prepared.source:
            log.info("%s", f"beginning with the weights of {prepared.source.path}")
    saver = Saver(
        state,
        run_dir / CHECKPOINTS,
        config.checkpoint,
        facts={
            "data": data.fingerprint,
            "config": to_jsonable(asdict(config)),
            "layout": facts["layout"],
            "code": code_version() if rank == 0 else "",
            "origin": start.origin,
        },
        tokenizer=data.tokenizer_path,
        group=control_group(),
    )

    if prepared.source and not past:
        val_loss = validation_loss(engine, held_out, settings.val_sequences, **replica)
        if tracker and val_loss is not None:
            tracker.begin(val_loss)

    # The loop.
    step, stopped = steps_before, False
    trained_seconds, timed_steps = 0.0, 0
    say = tracker.say if tracker else log_text
    while step < length.steps and not stopped:
        step += 1
        rate = config.optimizer.lr * rate_share(step, length.schedule_steps, config.schedule)
        for parameters in engine.optimizer.param_groups:
            parameters["lr"] = rate
        traced = step in settings.profile and rank in settings.profile_ranks
        with profiled(run_dir, step, rank, device, say) if traced else nullcontext():
            begin = time.perf_counter()
            loss = float(engine.train_batch(batches))
            grad_norm = float(engine.get_global_grad_norm())
            seconds = time.perf_counter() - begin
        # The first step pays for allocations and kernel choices, one that is traced for its trace.
        if (step > steps_before + 1 or length.steps == 1) and step not in settings.profile:
            trained_seconds, timed_steps = trained_seconds + seconds, timed_steps + 1

        blocks = engine.pipeline.blocks() if layout.pp > 1 else []
        asked, due, busy, *by_stage = max_over_ranks(
            [
                signals.asked is not None,
                rank == 0 and saver.due(step),
                saver.busy,
                *peak_memory_by_stage(device, layout.stage(rank), layout.pp),
                *timeline.seconds_by_rank(blocks, layout.stage(rank), layout.pp),
            ],
            group,
        )
        stopped = bool(asked) and step < length.steps
        record: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": rate,
            "tokens": step * length.tokens_per_step,
            "seconds": seconds,
            "tokens_per_second": length.tokens_per_step / seconds,
            "memory_gib": by_stage[: layout.pp],
        }
        if layout.pp > 1:
            record |= timeline.as_record(by_stage[layout.pp :], layout.pp, seconds)
            record["bubble_expected"] = bubble
        if peak:
            record["mfu"] = record["tokens_per_second"] * flops_per_token / (peak * layout.world_size)
        regularly = settings.val_every and step % settings.val_every == 0
        if step == length.steps or regularly or step in settings.val_at:
            val_loss = validation_loss(engine, held_out, settings.val_sequences, **replica)
            if val_loss is not None:
                record["val_loss"] = val_loss
        if tracker:
            tracker.step(record)
        if layout.pp > 1 and step in settings.timeline_at:
            ranks = [index * layout.dp * layout.tp for index in range(layout.pp)]
            if (all_blocks := timeline.gather(engine.pipeline, group, ranks)) and tracker:
                measured = timeline.Measured(step, config.parallel.schedule, place, accumulation, all_blocks)
                try:
                    tracker.picture("timeline", timeline.write(measured, run_dir))
                except OSError as error:
                    tracker.say(f"the timeline of step {step} could not be kept ({error})", logging.WARNING)
        saves = config.checkpoint.enabled and (stopped or step == length.steps or (due and not busy))
        news = saver.wait() if saves else saver.news()
        if tracker:
            tracker.saved(news)
            if saves:
                tracker.sync()  # no checkpoint is ahead of its metrics
            elif due:
                tracker.say(f"step {step} is not saved: the save before is still being written", logging.WARNING)
        if saves:
            saver.save(step, tokens=step * length.tokens_per_step)

    engine.optimizer.wait()  # for what travels to a step that does not come

    # The end: a few lines from the model while the last save is written, and a summary.
    texts: list[str] = []
    if not stopped and config.sample.tokens and config.sample.prompts:
        texts = sample_text(engine, shape, data.tokenizer(), data.eos_id, config.sample, settings.seed)
    last_save = saver.wait()
    lost = last_save is not None and last_save.error is not None
    if tracker:
        tracker.saved(last_save)
        if texts:
            tracker.samples(config.sample.prompts, texts)
        summary = {
            "complete": not stopped,
            "steps": step,
            "tokens": step * length.tokens_per_step,
            "loss_first": tracker.first and tracker.first["loss"],
            "loss_last": tracker.last and tracker.last["loss"],
            "val_loss": tracker.val_loss,
            "tokens_per_second": timed_steps * length.tokens_per_step / trained_seconds if timed_steps else None,
        }
        tracker.finish(summary, ended=not lost)
        log.info("%s", closing(summary, length.steps, texts, run_dir, last_save))
    dist.barrier()
    signals.ignore()
    with quiet():
        dist.destroy_process_group()
    if lost:
        raise SystemExit(1)


def log_text(text: str, level: int) -> None:
    """Say something on a rank without a tracker: warnings reach the terminal."""
    log.log(level, "%s", text)


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


def header(config: Config, facts: dict[str, Any], layout: str, steps: int, train_tokens: int, val_count: int) -> str:
    """What is about to run, in four lines."""
    batch = config.train
    return (
        f"{config.name}: {facts['parameters']:,} parameters, {facts['precision']} on {facts['device']}, {layout}\n"
        f"{train_tokens:,} training tokens, {val_count:,} held-out sequences; vocabulary {config.model.vocab_size:,}\n"
        f"{steps:,} steps of {batch.global_batch} x {batch.seq_len} tokens, micro-batches of {batch.micro_batch}\n"
        f"{facts['kernels']}"
    )


def closing(summary: dict[str, Any], num_steps: int, texts: list[str], run_dir: Path, last_save: Outcome | None) -> str:
    """The last words: samples, losses, speed, where things are, how to go on."""
    lines = [f"--- sample {i} ---\n{text}" for i, text in enumerate(texts, 1)]
    if not summary["complete"]:
        lines.append(f"--- stopped after step {summary['steps']:,} of {num_steps:,} ---")
    else:
        lines.append("--- done ---" if texts else "done")
    if summary["loss_first"] is not None:
        first, last = summary["loss_first"], summary["loss_last"]
        lines.append(f"loss             {first:.4f} -> {last:.4f} in {summary['steps']:,} steps")
    if summary["complete"] or summary["val_loss"] is not None:
        val = f"{summary['val_loss']:.4f}" if summary["val_loss"] is not None else "none (no held-out documents)"
        lines.append(f"validation loss  {val}")
    if summary["tokens_per_second"] is not None:
        lines.append(f"speed            {summary['tokens_per_second']:,.0f} tokens/s")
    lines.append(f"run folder       {run_dir}")
    if last_save:
        lines.append(f"checkpoint       {last_save.error or last_save.path}")
    if not summary["complete"]:
        how = "the same command, on this or another layout, goes on"
        if last_save is None:
            how += " from the last save, and checkpoint.enabled=false made none"
        elif last_save.error:
            how += " from the save before"
        lines.append(f"to go on         {how}")
    logged = summary["wandb"]
    if logged["mode"] == "offline":
        folder = shlex.quote(logged["dir"])
        lines.append(f"W&B (no account) wandb leet {folder}")
        parts = str(Path(logged["dir"]).parent / f"offline-run-*-{logged['id']}")  # one for each time it was started
        lines.append(f"W&B (upload)     wandb sync {folder if logged['parts'] == 1 else parts}")
    elif "url" in logged:
        lines.append(f"W&B              {logged['url']}")
    return "\n".join(lines)
