"""The end of a run: text from the model while the last save is written, a summary, and what to do next."""

import logging
import shlex
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.checkpoint.saver import Outcome
from train.run import Run, leave
from train.sample import sample_text

log = logging.getLogger(__name__)


def farewell(run: Run, step: int, stopped: bool, tokens_per_second: float | None) -> None:
    """Bring a run to its end; every rank calls it.

    Args:
        run: whose steps are taken.
        step: the last of them.
        stopped: whether it was told to stop before it was complete.
        tokens_per_second: of its steps; None where none was timed.

    Raises:
        SystemExit: 1: its last step could not be saved.
    """
    run.engine.wait()  # for weights that travel to a step that does not come
    sample, texts = run.config.sample, []
    if not stopped and sample.tokens and sample.prompts:
        data = run.prepared.data
        texts = sample_text(run.engine, run.config.model, data.tokenizer(), data.eos_id, sample, run.config.train.seed)
    last_save = run.saver.wait()
    lost = last_save is not None and last_save.error is not None
    if tracker := run.tracker:
        tracker.saved(last_save)
        if texts:
            tracker.samples(sample.prompts, texts)
        summary = {
            "complete": not stopped,
            "steps": step,
            "tokens": step * run.length.tokens_per_step,
            "loss_first": tracker.first and tracker.first["loss"],
            "loss_last": tracker.last and tracker.last["loss"],
            "val_loss": tracker.val_loss,
            "tokens_per_second": tokens_per_second,
            "skipped_steps": tracker.skipped_steps,
        }
        tracker.finish(summary, ended=not lost)
        log.info("%s", closing(summary, run.length.steps, texts, run.run_dir, last_save))
    dist.barrier()
    run.signals.ignore()
    leave()
    if lost:
        raise SystemExit(1)


def closing(summary: dict[str, Any], num_steps: int, texts: list[str], run_dir: Path, last_save: Outcome | None) -> str:
    """Write the closing lines: samples, losses, speed, where things are, how to go on."""
    lines = [f"--- sample {i} ---\n{text}" for i, text in enumerate(texts, 1)]
    if not summary["complete"]:
        lines.append(f"--- stopped after step {summary['steps']:,} of {num_steps:,} ---")
    else:
        lines.append("--- done ---" if texts else "done")
    if summary["loss_first"] is not None:
        first, last = summary["loss_first"], summary["loss_last"]
        lines.append(f"loss             {first:.4f} -> {last:.4f} in {summary['steps']:,} steps")
    if summary["skipped_steps"]:
        lines.append(f"skipped          {summary['skipped_steps']:,} steps, whose gradients were not finite")
    if summary["complete"] or summary["val_loss"] is not None:
        val = f"{summary['val_loss']:.4f}" if summary["val_loss"] is not None else "none (no held-out documents)"
        lines.append(f"validation loss  {val}")
    if summary["tokens_per_second"] is not None:
        lines.append(f"speed            {summary['tokens_per_second']:,.0f} tokens/s")
    lines.append(f"run folder       {run_dir}")
    if last_save:
        lines.append(f"checkpoint       {last_save.error or last_save.path}")
    if not summary["complete"]:
        lines.append(f"to go on         {_how_to_go_on(last_save)}")
    return "\n".join([*lines, *_where_in_wandb(summary["wandb"])])


def _how_to_go_on(last_save: Outcome | None) -> str:
    how = "the same command, on this or another layout, goes on"
    if last_save is None:
        return how + " from the last save, and checkpoint.enabled=false made none"
    return how + " from the save before" if last_save.error else how


def _where_in_wandb(logged: dict[str, Any]) -> list[str]:
    if logged["mode"] == "offline":
        folder = shlex.quote(logged["dir"])
        parts = str(Path(logged["dir"]).parent / f"offline-run-*-{logged['id']}")  # one for each time it was started
        return [
            f"W&B (no account) wandb leet {folder}",
            f"W&B (upload)     wandb sync {folder if logged['parts'] == 1 else parts}",
        ]
    return [f"W&B              {logged['url']}"] if "url" in logged else []
