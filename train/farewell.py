"""The end of a run: the last save, text from the model, a summary, and what to do next."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.alert_settings import AlertLevel
from parallel.heartbeat import Phase, heart
from train.agreement import max_over_ranks
from train.checkpoint.folder import CHECKPOINTS, mark_damaged, newest_first, step_of
from train.checkpoint.saver import Outcome
from train.evaluate.judged import lines as measured_lines
from train.health import DIVERGED, NOT_FINITE, Health
from train.log_lines import CALMER, Pace, as_count
from train.run import Run, leave
from train.sample import draw, said
from train.spikes import SKIPPED

if TYPE_CHECKING:
    from train.loop import Progress

log = logging.getLogger(__name__)

LOST = 1
"""The exit code of a run whose last step could not be saved, or that could not keep its records."""


def farewell(run: Run, progress: "Progress", health: Health, tokens_per_second: float | None) -> None:
    """Bring a run to its end; every rank calls it.

    The last save ends first: nothing that comes after it can cost what was learned.

    Args:
        run: whose steps are taken.
        progress: of it.
        health: of it.
        tokens_per_second: of its steps; None where none was timed.

    Raises:
        SystemExit: 1: its last step could not be saved, or not all of its records are kept; 3: it has diverged.
    """
    run.engine.wait()  # for weights that travel to a step that does not come
    heart.at(Phase.SAVE)
    last_save = run.saver.wait()
    if run.tracker:
        run.tracker.saved(last_save)
    diverged = progress.diverged or (None if last_save is None or last_save.finite else NOT_FINITE)
    if diverged is not None and health.weights_are_lost() and run.rank == 0:
        _set_aside(run, health.last_sound)
    texts = [] if diverged is not None or progress.stopped else draw(run, progress.step)
    heart.at(Phase.END)
    lost = diverged is None and last_save is not None and last_save.error is not None
    if lost and last_save is not None:  # for whoever watches, and may start the run again
        heart.fail(f"step {last_save.step} could not be saved ({last_save.error})")
    code = DIVERGED if diverged is not None else LOST if lost else 0
    if tracker := run.tracker:
        summary = {
            "complete": not progress.stopped and diverged is None,
            "diverged": diverged is not None,
            "reason": diverged,
            "steps": progress.step,
            "tokens": run.length.tokens_after(progress.step),
            "loss_first": tracker.first and tracker.first["loss"],
            "loss_last": tracker.last and tracker.last["loss"],
            "val_loss": tracker.val_loss,
            **tracker.measured,
            "evaluation": run.evaluator.cost(),
            "tokens_per_second": tokens_per_second,
            "skipped_steps": tracker.skipped_steps,
            "skipped_in_a_row": health.in_a_row,
        }
        if diverged is not None:
            tracker.alert("diverged", f"step {progress.step}: {diverged}")
        elif summary["complete"] and not lost:
            tracker.alert("complete", f"all {progress.step:,} steps are taken", AlertLevel.info)
        kept = tracker.finish(summary, ended=not lost)
        code = code or (0 if kept else LOST)
        compared, pace = run.expected.said(), tracker.pace
        log.info("%s", closing(summary, run.length.steps, texts, run.run_dir, last_save, compared, pace))
    (highest,) = max_over_ranks([code], run.patient_group)  # nobody leaves before all, uploads of rank 0, are done
    run.signals.ignore()
    leave()
    if highest:
        raise SystemExit(int(highest))


def _set_aside(run: Run, last_sound: int) -> None:
    """Rename the checkpoints of this run whose weights have given no finite loss, so that none goes on from them."""
    for path in newest_first(run.run_dir / CHECKPOINTS):
        step = step_of(path) or 0
        if step >= last_sound and step > run.steps_before:
            try:
                aside = mark_damaged(path, "diverged").name
            except OSError as error:
                run.say(f"{path} gives no finite loss, and could not be set aside ({error})", logging.WARNING)
            else:
                run.say(f"step {step} gives no finite loss: set aside as {aside}", logging.WARNING)


def closing(
    summary: dict[str, Any],
    num_steps: int,
    texts: list[str],
    run_dir: Path,
    last_save: Outcome | None,
    compared: Sequence[str] = (),
    pace: Pace | None = None,
) -> str:
    """Write the closing lines: samples, losses, speed, cost, what was predicted, where things are, how to go on."""
    lines = said(texts)
    if summary["diverged"]:
        lines.append(f"--- diverged at step {summary['steps']:,} of {num_steps:,}: {summary['reason']} ---")
    elif not summary["complete"]:
        lines.append(f"--- stopped after step {summary['steps']:,} of {num_steps:,} ---")
    else:
        lines.append("--- done ---" if texts else "done")
    if summary["loss_first"] is not None:
        first, last = summary["loss_first"], summary["loss_last"]
        lines.append(f"loss             {first:.4f} -> {last:.4f} in {summary['steps']:,} steps")
    if summary["skipped_steps"]:
        lines.append(f"skipped          the updates of {summary['skipped_steps']:,} steps, which {SKIPPED} lists")
    if summary["complete"] or summary["val_loss"] is not None:
        val = f"{summary['val_loss']:.4f}" if summary["val_loss"] is not None else "none (no held-out documents)"
        lines.append(f"validation loss  {val}{_bits(summary)}")
    measured = measured_lines(summary)
    lines += [f"{'' if at else 'evaluation':17}{line}" for at, line in enumerate(measured)]
    if cost := summary.get("evaluation"):
        failed = sum(cost["failed"].values())
        lines.append(
            f"{'' if measured else 'evaluation':17}took {cost['seconds']:.1f} s, {cost['seconds_per_hour']:.0f} s per "
            f"hour of training" + (f"; tasks have failed {failed} times" if failed else "")
        )
    if summary["tokens_per_second"] is not None:
        daily = pace and pace.tokens_per_day
        whole = f", {as_count(daily)} tokens/day with evaluation and saves" if daily else ""
        lines.append(f"speed            {summary['tokens_per_second']:,.0f} tokens/s in steps{whole}")
    if spent := pace and pace.spent():
        lines.append(f"cost             {spent}")
    lines += [f"{'' if at else 'prediction':17}{line}" for at, line in enumerate(compared)]
    if summary["missing_records"]:
        lines.append(f"missing          {summary['missing_records']:,} records, which the disk did not take")
    lines.append(f"run folder       {run_dir}")
    if last_save:
        lines.append(f"checkpoint       {last_save.error or last_save.path}")
    if summary["diverged"]:
        lines += [f"to try           {_what_to_try(summary)}", f"to go on         {_how_to_go_back(run_dir)}"]
    elif not summary["complete"]:
        lines.append(f"to go on         {_how_to_go_on(last_save)}")
    return "\n".join([*lines, *_where_in_wandb(summary["wandb"])])


def _bits(summary: dict[str, Any]) -> str:
    bits = summary.get("val_bits_per_byte")
    return "" if bits is None else f", {bits:.4f} bits per byte"


def _what_to_try(summary: dict[str, Any]) -> str:
    """Say what may help a run that has diverged; batches that were skipped may be bad, and would come again."""
    row, last = summary["skipped_in_a_row"], summary["steps"]
    if row < 2:
        return CALMER
    return f"{CALMER}; where the data is bad, train.skip_steps=[{last - row + 1}-{last}] passes over it"


def _how_to_go_back(run_dir: Path) -> str:
    finite = newest_first(run_dir / CHECKPOINTS)
    if not finite:
        return "no checkpoint is finite: the same command begins again"
    how = f"the same command goes on from step {step_of(finite[0]):,}, the last checkpoint that is finite"
    return f"{how}; resume={finite[1]} goes further back" if len(finite) > 1 else how


def _how_to_go_on(last_save: Outcome | None) -> str:
    how = "the same command, on this or another layout, goes on"
    if last_save is None:
        return how + " from the last save, and checkpoint.enabled=false made none"
    return how + " from the save before" if last_save.error else how


def _where_in_wandb(logged: dict[str, Any]) -> list[str]:
    if logged["mode"] == "offline":
        folder = shlex.quote(str(Path(logged["dir"]).parent))
        # wandb knows W&B's folder, not the run's; older versions upload the folders in it, one for each start, by name.
        parts = f"offline-run-*-{logged['id']}"
        return [f"W&B (no account) wandb leet {folder}", f"W&B (upload)     wandb sync {folder}/{parts}"]
    found = [f"W&B              {logged['url']}"] if "url" in logged else []
    if logged.get("lacks_records") and "url" in logged:
        found.append(f"W&B (upload)     wandb sync {shlex.quote(logged['dir'])} uploads what it has taken")
    return found
