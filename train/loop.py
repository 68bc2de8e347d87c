"""Training, top to bottom: a run is opened, its steps are taken one after another, and it is brought to its end."""

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count

from parallel.engine import StepResult
from parallel.heartbeat import Phase, heart
from parallel.rendezvous import Rendezvous
from train import timeline
from train.checkpoint.saver import Outcome
from train.farewell import farewell
from train.health import Health
from train.preflight import PreparedRun
from train.profiling import profiled
from train.report import StepReport, as_record, own_report
from train.run import Run, open_run
from train.sample import draw, said, samples_after
from train.stopping import StopSignals

COLLECT_EVERY = 50
"""Steps from one run of Python's garbage collector to the next."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: the last that was taken.
        stopped: a rank was told to stop before the run was complete.
        diverged: why the run has diverged, in a clause; None where it has not.
        save_put_off: a save was due after a step that learned nothing, and comes after the next that does.
        timed_steps, timed_tokens, timed_seconds: those by which the run's speed is told.
    """

    step: int
    stopped: bool = False
    diverged: str | None = None
    save_put_off: bool = False
    timed_steps: int = 0
    timed_tokens: int = 0
    timed_seconds: float = 0.0


def train(prepared: PreparedRun, signals: StopSignals, rendezvous: Rendezvous) -> None:
    """Train, save, validate, sample; every rank calls it. Rank 0 writes the run folder and speaks.

    Args:
        prepared: from `train.preflight`.
        signals: whether this rank has been told to stop; one that has stops all after the step under way.
        rendezvous: where the ranks have met.

    Raises:
        BadInput: on every rank: the checkpoint to go on from is damaged or does not fit.
        SystemExit: 1: its last step could not be saved, or records of it are lost; 3: it has diverged.
    """
    run = open_run(prepared, signals, rendezvous)
    signals.save_first()
    if prepared.source and not run.resumed:  # what trained weights are worth before the first step
        found = run.evaluator.before()
        if run.tracker and found:
            run.tracker.begin(found)
    progress = Progress(run.steps_before)
    validation_loss = run.evaluator.validation_loss
    health = Health(run.steps_before, run.config.train.max_skipped, run.weights_are_finite, validation_loss)
    try:
        with garbage_collected_by_hand():
            take_steps(run, progress, health)
        timed = progress.timed_steps > 0
        farewell(run, progress, health, progress.timed_tokens / progress.timed_seconds if timed else None)
    finally:  # whatever fails meanwhile, a save that has begun ends
        _tell_of_save(run, run.saver.wait())


def take_steps(run: Run, progress: Progress, health: Health) -> None:
    """Take steps until the run is complete, diverges or is told to stop: step, agree, evaluate, record, save."""
    settings = run.config.train
    first = next(step for step in count(run.steps_before + 1) if step not in run.passed_steps)
    while progress.step < run.length.steps and not progress.stopped and progress.diverged is None:
        step = progress.step = progress.step + 1
        if step in run.passed_steps:
            _pass_over(run, progress)
            continue
        heart.begin_step(step)
        rate, size, limits = run.rate(step), run.length.at(step), run.window.limits(run.kind(step))
        with _traced(run, step):
            begin = time.perf_counter()
            result = run.engine.step(run.batches, rate, run.micro_batches(step), limits)
            seconds = time.perf_counter() - begin
        run.window.add(result, limits)
        # The first step pays for allocations and kernel choices, one that is traced for its trace.
        counts = (step > first or run.length.steps == 1) and step not in settings.profile
        if counts:
            progress.timed_steps, progress.timed_seconds = progress.timed_steps + 1, progress.timed_seconds + seconds
            progress.timed_tokens += size.tokens

        heart.at(Phase.REPORT)
        report = own_report(run, step, result).merged(run.group)
        heart.at(Phase.RECORD)
        progress.stopped = report.told_to_stop and step < run.length.steps

        record = as_record(step, size, result, rate, seconds, report, run.constants)
        record |= run.expected.compared(record, size, counts) | run.slow_ranks(report)
        record |= {"source_tokens": run.source_tokens(step)} if run.config.data.sources else {}
        record |= run.evaluator.after(step, asks=not progress.stopped)  # who is told to stop may have little time
        progress.diverged = health.diverged(step, result, record.get("val_loss"), last=step == run.length.steps)
        _sample(run, progress)
        heart.at(Phase.RECORD)
        if run.tracker:
            run.tracker.step(record, run.skipped(step, result, limits))
        if run.layout.pp > 1 and step in settings.timeline_at:
            _keep_timeline(run, step, result)

        heart.at(Phase.RECORD)
        _save(run, progress, report, learned=not health.in_a_row)
        if step % COLLECT_EVERY == 0:
            gc.collect()


def _pass_over(run: Run, progress: Progress) -> None:
    """Pass over a step that is not to be taken; a save that is due after it comes after the next that is."""
    step, every = progress.step, run.config.checkpoint.every_steps
    progress.save_put_off |= bool(run.config.checkpoint.enabled and every and step % every == 0)
    if run.tracker:
        size = run.length.at(step)
        first, last = run.ends_of_batch(step)
        run.tracker.passed_over({"step": step, "tokens": size.tokens_before + size.tokens, "passed_over": True})
        run.say(f"step {step} is passed over (train.skip_steps), and with it samples {first:,} to {last:,}")


def _sample(run: Run, progress: Progress) -> None:
    """Sample text after a step where it is due; after the last one `farewell` does it."""
    step = progress.step
    ends = step == run.length.steps or progress.stopped or progress.diverged is not None
    if samples_after(run.config.sample, step) and not ends:
        for text in said(draw(run, step), f" after step {step:,}"):
            run.say(text)


def _traced(run: Run, step: int) -> AbstractContextManager[None]:
    """Trace what follows, if it was asked for at this step and rank."""
    settings = run.config.train
    if step in settings.profile and run.rank in settings.profile_ranks:
        return profiled(run.run_dir, step, run.rank, run.device, run.say)
    return nullcontext()


def _keep_timeline(run: Run, step: int, result: StepResult) -> None:
    """Write and draw what the first pipeline did in a step. All ranks call it together."""
    layout, parallel = run.layout, run.config.parallel
    ranks = range(0, layout.world_size, layout.dp * layout.tp)
    spans = timeline.gather(result.began, result.spans, run.group, ranks)
    if spans is None or run.tracker is None:
        return
    heart.at(Phase.KEEP)
    measured = timeline.MeasuredStep(step, parallel.schedule, parallel.placement, run.micro_batches(step), spans)
    try:
        run.tracker.picture("timeline", timeline.write(measured, run.run_dir))
    except Exception as error:  # of the disk, or of what draws
        run.say(f"the timeline of step {step} could not be kept ({error})", logging.WARNING)


def _save(run: Run, progress: Progress, report: StepReport, learned: bool) -> None:
    """Begin to save where it is due, and say how the save before ended.

    Args:
        run: open.
        progress: of it.
        report: on its last step.
        learned: whether that moved the weights. If it did not, what is saved already is as good, and must not give way.
    """
    step, last = progress.step, progress.stopped or progress.step == run.length.steps
    due = last or ((report.save_due or progress.save_put_off) and learned)
    progress.save_put_off = run.config.checkpoint.enabled and not due and (report.save_due or progress.save_put_off)
    saves = run.config.checkpoint.enabled and due and (last or not report.save_busy) and progress.diverged is None
    if saves:
        heart.at(Phase.SAVE)
    outcome = run.saver.wait() if saves else run.saver.news()
    _tell_of_save(run, outcome)
    if run.tracker and saves:
        run.tracker.sync()  # no checkpoint is ahead of its metrics
    elif run.tracker and due and not last:
        run.say(f"step {step} is not saved: the save before is still being written", logging.WARNING)
    if saves:
        run.saver.save(step, tokens=run.length.tokens_after(step), history=run.history(step))


def _tell_of_save(run: Run, outcome: Outcome | None) -> None:
    if run.tracker:
        run.tracker.saved(outcome)


@contextmanager
def garbage_collected_by_hand() -> Iterator[None]:
    """Let Python's garbage collector run only when it is told to, and pass over what is there already.

    Left to itself it runs on each rank at another time, and in each step all ranks wait for the slowest.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
