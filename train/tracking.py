"""Tracking of a run: metrics.jsonl, Weights & Biases, alerts, the terminal. Only rank 0 has a tracker."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conf.alert_settings import AlertLevel
from conf.schema import Config
from train.alerts import BYTES_PER_PARAMETER, Alerts, DiskWatch, SkipWatch
from train.checkpoint.folder import CHECKPOINTS, newest_first
from train.checkpoint.saver import Outcome
from train.events import EVENTS, EventFile
from train.log_lines import Cost, Pace, StepLines, on_bar
from train.patient_file import PatientFile, write_to_logs
from train.records import METRICS, SUMMARY, cut
from train.spikes import SKIPPED, SkippedStep, SkippedSteps
from train.strict_json import dumps_flagged, with_nan
from train.tables import Tables
from train.wandb_log import WandbLog

log = logging.getLogger(__name__)

_WARN = AlertLevel.warn


class Tracker:
    """Writes one record per step to metrics.jsonl and W&B, and text to the terminal and the log.

    A run that goes on keeps its earlier records and its W&B run: no step is missing there or stands twice.

    Args:
        config: all settings, logged with the run.
        run_dir: where metrics.jsonl, summary.json and the W&B files go; exists.
        steps: length of the run, for the progress bar.
        facts: what else identifies the run: layout, device, parameters.
        resumed: the step after which the run in this folder goes on; None for a run that begins here.
        logs: files of the log, to be looked after.
        deleted: is called when the run folder or its newest checkpoint was deleted.
        price_per_hour: of all ranks, in any currency; None where no price is known.
        clock: seconds that only rise, by which the log's lines are spaced.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        steps: int,
        facts: dict[str, Any],
        resumed: int | None = None,
        logs: Sequence[PatientFile] = (),
        deleted: Callable[[], object] = lambda: None,
        price_per_hour: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.run_dir = run_dir
        self.first: dict[str, Any] | None = None
        """The record of the first step in metrics.jsonl."""
        self.last: dict[str, Any] | None = None
        """The record of the last."""
        self.val_loss: float | None = None
        """The validation loss last measured."""
        self.was_deleted = False
        """Whether files of the run were, while it goes on."""
        (run_dir / SUMMARY).unlink(missing_ok=True)  # it says that the run has ended
        self.wandb = WandbLog(config, run_dir, facts, self.say, clock)
        """What the run logs to Weights & Biases."""
        self.tables = Tables(run_dir, resumed, self.wandb.table, clock)
        """Its tables there, and samples.jsonl."""
        self.measured: dict[str, Any] = {}
        """What evaluation has last measured, besides the validation loss."""
        if resumed is not None:
            deque(cut(run_dir / SKIPPED, resumed), maxlen=0)
        self._skipped, self._step, seconds_before = SkippedSteps(run_dir, clock), resumed or 0, 0.0
        for written in cut(run_dir / METRICS, resumed) if resumed is not None else ():
            record = with_nan(written)
            self._remember(record)
            seconds_before += record.get("seconds", 0.0)
        self.wandb.catch_up()  # on what it missed, killed with the run
        self._metrics, self._events = PatientFile(run_dir / METRICS, clock), EventFile(run_dir, clock)
        self._alerts = Alerts(config.alerts, run_dir, self._events.write, self.say, clock)
        self._skips = SkipWatch(config.alerts)
        self._checkpoints = config.checkpoint
        size = BYTES_PER_PARAMETER * config.model.num_params
        self._disk = DiskWatch(config.alerts, run_dir, self._checkpoints_to_come, size, clock)
        self._logs, self._remade, self._deleted = logs, 0, deleted
        self._to_resume = {path: path.read_bytes() for path in _needed_to_resume(run_dir)}
        # A bar where someone watches; in a log file, a line now and then.
        watched = sys.stderr.isatty()
        self._bar = tqdm(initial=resumed or 0, total=steps, unit="step", dynamic_ncols=True) if watched else None
        cost = None if price_per_hour is None else Cost(price_per_hour, seconds_before)
        self.pace = Pace(steps, cost, clock)
        """How fast the run goes, and what it costs."""
        self._lines = StepLines(self.pace, config.train.log_every, clock)
        self._costs: dict[str, float] = {}
        self._newest = next(iter(newest_first(run_dir / CHECKPOINTS)), None)

    def begin(self, found: dict[str, Any]) -> None:
        """Log what trained weights are worth before the first step, as evaluation has found it: a record of step 0."""
        self._keep({"step": 0, "tokens": 0, **found})
        if "val_loss" in found:
            self.say(f"before the first step: validation loss {found['val_loss']:.4f}")

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps of the run whose updates were skipped."""
        return self._skipped.total

    @property
    def _files(self) -> list[PatientFile]:
        listed = [file for file in (self._skipped.file, self._events.file) if file]
        return [self._metrics, *listed, *self.tables.files, *self._logs]

    def step(self, record: dict[str, Any], skipped: SkippedStep | None = None) -> None:
        """Log one step.

        Args:
            record: of the step: at least step, loss, grad_norm, lr, tokens and tokens_per_second; a number that is not
                finite is null in metrics.jsonl, and flagged.
            skipped: what there is to say of it, if its update was skipped.
        """
        record, self._costs = {**record, **self._costs, **(skipped.figures if skipped else {})}, {}
        if warning := self._skipped.add(skipped) if skipped else None:
            self.say(warning, logging.WARNING)
        if self.skipped_steps:
            record["skipped_steps"] = self.skipped_steps
        self._keep(record)
        self.tables.show_scores(record)
        self.pace.step(record)
        self._look_after_files()
        self._look_after_wandb()
        if (too_many := self._skips.news(skipped is not None)) and skipped:
            self.alert("steps skipped", f"step {record['step']}: {too_many}; the last since {skipped.why}", _WARN)
        line = self._lines.line(record)
        if self._bar is not None:
            self._bar.set_postfix_str(on_bar(record), refresh=False)
            self._bar.update(1)
            if line:
                write_to_logs(log, line)
        elif line:
            log.info("%s", line)
        if "val_loss" in record:
            bits = f", {record['val_bits_per_byte']:.4f} bits per byte" if "val_bits_per_byte" in record else ""
            self.say(f"step {record['step']}: validation loss {record['val_loss']:.4f}{bits}")

    def passed_over(self, record: dict[str, Any]) -> None:
        """Log a step that was not taken: its record has no loss."""
        self._keep(record)
        if self._bar is not None:
            self._bar.update(1)

    def _keep(self, record: dict[str, Any]) -> None:
        self._step = record["step"]
        self._metrics.write(dumps_flagged(record))
        self._remember(record)
        self.wandb.log(record)

    def _look_after_files(self) -> None:
        """Say what of the run's files cannot be written, and make a folder again that was deleted."""
        for file in self._files:
            file.flush()
        if self.was_deleted:  # what deletes it may still be at it
            self._write_what_resumes()
        if (remade := sum(file.remade for file in self._files)) > self._remade:
            self._remade = remade
            self._write_what_resumes()
            self._tell_of_deletion(
                self.run_dir,
                "its metrics, log and configuration are written again; what else it held, checkpoints too, is lost",
            )
        elif self._newest is not None and not self._newest.exists():
            self._tell_of_deletion(self._newest, "there may be no checkpoint to go on from before the next")
        for file in self._files:
            if news := file.news():
                self.say(news, logging.WARNING)
                if file.error is not None:
                    self.alert("files cannot be written", news, _WARN)
        if low := self._disk.news():
            self.say(low, logging.WARNING)
            self.alert("disk nearly full", low, _WARN)

    def _look_after_wandb(self) -> None:
        if gone := self.wandb.deleted():
            self._tell_of_deletion(gone, f"W&B gets the records of {METRICS} again")
            self.wandb.start_again()
        if news := self.wandb.news():
            self.say(news, logging.WARNING)

    def _tell_of_deletion(self, path: Path, what: str) -> None:
        text = f"{path} was deleted or moved while the run goes on: {what}"
        self.say(text, logging.ERROR)
        self.alert("files of the run are gone", text)
        self.was_deleted, self._newest = True, None
        self._deleted()

    def _write_what_resumes(self) -> None:
        with suppress(OSError):
            for path, content in self._to_resume.items():
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)

    def _remember(self, record: dict[str, Any]) -> None:
        if "loss" in record:
            self.first, self.last = self.first or record, record
        self.val_loss = record.get("val_loss", self.val_loss)
        self.measured |= {key: record[key] for key in ("val_bits_per_byte", "val_sets", "tasks") if key in record}
        self.tables.keep_scores(record)
        self._skipped.total = record.get("skipped_steps", self._skipped.total)

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Write a line to the terminal and the log without tearing the progress bar."""
        with tqdm.external_write_mode(file=sys.stderr):
            log.log(level, text)

    def saved(self, outcome: Outcome | None) -> None:
        """Log how a save ended, if one has; its cost stands in the record of the next step."""
        if outcome is None:
            return
        if outcome.error:
            text = f"step {outcome.step} could not be saved ({outcome.error}); older checkpoints stay"
            self.say(text, logging.ERROR)
            self.alert("checkpoint not saved", text)
            return
        gib = outcome.num_bytes / 2**30
        self.say(
            f"step {outcome.step} saved: {gib:.2f} GiB, {outcome.blocked:.2f} s without training, on disk after "
            f"{outcome.seconds:.1f} s"
        )
        if outcome.path.exists() or not self.was_deleted:
            self._newest = outcome.path
        self._disk.size = outcome.num_bytes
        self.add_to_next({"save_blocked_seconds": outcome.blocked, "save_seconds": outcome.seconds, "save_gib": gib})

    def add_to_next(self, figures: dict[str, float]) -> None:
        """Have figures stand in the record of the next step."""
        self._costs |= figures

    def sync(self) -> None:
        """Make metrics.jsonl and skipped.jsonl durable, as far as their disk can."""
        self._metrics.sync()
        if self._skipped.file:
            self._skipped.file.sync()

    def samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        """Log text drawn from the model after a step."""
        self.tables.add_samples(step, prompts, texts)

    def picture(self, name: str, path: Path) -> None:
        """Log a picture, with the next step."""
        self.wandb.picture(name, path)

    def alert(self, title: str, text: str, level: AlertLevel = AlertLevel.error) -> None:
        """Send an alert through W&B and the command of `alerts`, as far as those ask for it.

        Args:
            title: of its kind, at most 63 characters, as W&B has it.
            text: a sentence.
            level: of it.
        """
        if sent := self._alerts.send(title, text, level, self._step):
            self.wandb.alert(title, sent, level.name.upper())

    def alert_wandb(self, title: str, text: str, level: AlertLevel) -> None:
        """Send an alert through W&B alone."""
        self.wandb.alert(title, text, level.name.upper())

    def _checkpoints_to_come(self) -> int:
        """Return how many checkpoints the disk will have to hold besides those that are there."""
        if not self._checkpoints.enabled:
            return 0
        return max(2, self._checkpoints.keep_last + 1 - len(newest_first(self.run_dir / CHECKPOINTS)))

    def finish(self, summary: dict[str, Any], ended: bool = True) -> bool:
        """Close everything; summary.json is written last and says that the run ended as it should.

        Args:
            summary: is completed with where W&B's files are, and how many records are missing.
            ended: whether it did.

        Returns:
            Whether all that was to be written is there.
        """
        if self._bar is not None:
            self._bar.close()
        self._newest = None  # of a run that has diverged it may be set aside
        self._look_after_files()
        self._look_after_wandb()
        self.wandb.finish(summary)
        summary["wandb"] = self.wandb.where()
        self._alerts.close()
        self._look_after_files()
        if lacking := self._events.close():
            self.say(f"{EVENTS} lacks {lacking:,} lines, which the disk did not take", logging.ERROR)
        listed = [file for file in (self._skipped.file, *self.tables.files) if file]
        summary["missing_records"] = sum(file.close() for file in (self._metrics, *listed))
        if ended:
            try:
                unfinished = self.run_dir / (SUMMARY + ".tmp")
                unfinished.write_text(dumps_flagged(summary, indent=2) + "\n", encoding="utf-8")
                unfinished.rename(self.run_dir / SUMMARY)
            except OSError as error:
                self.say(f"{SUMMARY} could not be written ({error})", logging.ERROR)
                return False
        return not self.was_deleted and not any(file.lacking for file in self._files)


def _needed_to_resume(run_dir: Path) -> list[Path]:
    """List the small files of a run folder without which a run is not the same when it goes on."""
    return [path for path in (*run_dir.glob(".hydra/*.yaml"), *run_dir.glob("wandb/*id")) if path.is_file()]
