"""The tables of a run in W&B, and samples.jsonl: text drawn from the model and scores of tasks, each with its step."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.patient_file import PatientFile
from train.records import SAMPLES, cut
from train.strict_json import dumps_flagged

ROWS = 1000
"""The newest rows that a table in W&B has; metrics.jsonl and samples.jsonl have all."""
_SAMPLES, _TASKS = "samples", "eval_table"


class Tables:
    """Text and scores by step. W&B gets a table whole each time that it grows.

    Args:
        run_dir: the run folder.
        resumed: the step after which the run in this folder goes on; None for a run that begins here.
        show: logs a table, by its name, columns and rows.
        clock: seconds that only rise.

    Attributes:
        file: samples.jsonl; None before the first sample.
    """

    def __init__(
        self,
        run_dir: Path,
        resumed: int | None,
        show: Callable[[str, Sequence[str], Sequence[Sequence[Any]]], object],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.file: PatientFile | None = None
        self._path, self._show, self._clock = run_dir / SAMPLES, show, clock
        before = cut(self._path, resumed) if resumed is not None else ()
        self._texts = [[one["step"], one["prompt"], one["text"]] for one in before][-ROWS:]
        self._scores: list[list[Any]] = []

    @property
    def files(self) -> list[PatientFile]:
        """The files that are written."""
        return [self.file] if self.file else []

    def add_samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Keep text that was drawn after a step, and show it: each prompt with what follows it."""
        self.file = self.file or PatientFile(self._path, self._clock)
        for prompt, text in zip(prompts, texts, strict=True):
            self.file.write(dumps_flagged({"step": step, "prompt": prompt, "text": text}))
            self._texts = [*self._texts, [step, prompt, text]][-ROWS:]
        self._show(_SAMPLES, ["step", "prompt", "text"], self._texts)

    def keep_scores(self, record: dict[str, Any]) -> None:
        """Keep the scores of the tasks of a record, if it has any."""
        for task, figures in record.get("tasks", {}).items():
            rows = [[record["step"], task, name, value] for name, value in figures.items()]
            self._scores = [*self._scores, *rows][-ROWS:]

    def show_scores(self, record: dict[str, Any]) -> None:
        """Show all scores, if a record that is kept has brought new ones."""
        if "tasks" in record:
            self._show(_TASKS, ["step", "task", "figure", "value"], self._scores)
