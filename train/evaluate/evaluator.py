"""Evaluation while a run trains, on the layout that trains: held-out documents by source, further sets, and tasks."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from conf.eval_settings import task_specs
from parallel.engine import Engine
from parallel.heartbeat import Phase, heart
from train.data.token_bytes import TokenBytes, token_bytes
from train.evaluate.asking import OpenTasks
from train.evaluate.held_out import HeldOutSet, Loss, sets_of_run, together
from train.evaluate.judged import lines
from train.evaluate.lead import Leader, led
from train.evaluate.sets import extra_sets
from train.evaluate.tasks import Asked, Figures, Speech
from train.length import is_due
from train.preflight import PreparedRun

Say = Callable[[str, int], object]


class Evaluator:
    """What evaluates a run. All ranks call its methods together.

    Args:
        prepared: the run.
        engine: of this rank.
        reading: which sequences this rank reads, as arguments of `HeldOutSet.batches`.
        group: of all ranks, over the CPU, in which ranks wait for rank 0 as long as its tasks take.
        steps: of the run.
        say: writes a line to the log, with its level.

    Attributes:
        seconds: that evaluation has taken so far.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        engine: Engine,
        reading: dict[str, int],
        group: dist.ProcessGroup,
        steps: int,
        say: Say,
    ):
        config, data = prepared.config, prepared.data
        self.seconds, self._began = 0.0, time.monotonic()
        self._config, self._engine, self._reading = config, engine, reading
        self._group, self._steps, self._say = group, steps, say
        self._own, self._extra = sets_of_run(config, data), extra_sets(config, prepared.sets)
        self._leads = dist.get_rank() == 0
        self._bytes: dict[str, int] = {}
        self._tasks: OpenTasks | None = None
        self._table: TokenBytes | None = None
        if not self._leads:
            return
        heart.at(Phase.LOAD)
        tokenizer = data.tokenizer()
        self._table = token_bytes(tokenizer, data.eos_id)
        measured = {one.name for one in self._own}
        if without := [name for name in config.data.sources if measured and name not in measured]:
            said = f"no loss of its own is measured of source {', '.join(without)}, of which the mixture takes none"
            self._say(f"{said} for the {config.train.val_sequences:,} sequences of a validation", logging.INFO)
        if self._table.inexact and (self._own or self._extra):
            self._say(f"bits per byte are not exact: of this tokenizer, {self._table.inexact}", logging.INFO)
        context = config.model.max_seq_len
        speech = Speech.of_run(tokenizer, data.tokenizer_path, data.eos_id, context, data)
        given, goes_on = task_specs(config.eval.tasks)[0], "training goes on, and it is tried again"
        self._tasks = OpenTasks(given, Asked.of(config), speech, say, goes_on)

    def validates_after(self, step: int) -> bool:
        """Tell whether the run's held-out documents are measured after a step."""
        train = self._config.train
        return step == self._steps or is_due(step, train.val_every, train.val_at)

    def asks_after(self, step: int) -> bool:
        """Tell whether tasks and further sets are evaluated after a step."""
        settings = self._config.eval
        if not (settings.tasks or settings.sets):
            return False
        return step == self._steps or is_due(step, settings.every_steps, settings.at)

    def validation_loss(self) -> float | None:
        """Measure the mean token loss over the run's held-out sequences.

        Returns:
            Nats, on every rank, the same for every layout; None if no sequences are held out.
        """
        return together([self._measure(one) for one in self._own]).mean if self._own else None

    def before(self) -> dict[str, Any]:
        """Evaluate weights before their first step: the run's held-out documents, and tasks where any are asked."""
        return self._evaluate(0, validates=True, asks=bool(self._config.eval.tasks or self._config.eval.sets))

    def after(self, step: int, asks: bool = True) -> dict[str, Any]:
        """Evaluate what is due after a step.

        Args:
            step: its number.
            asks: whether there is time for tasks and further sets.

        Returns:
            What of it stands in the step's record; `val_loss` on every rank, the rest on rank 0 alone.
        """
        return self._evaluate(step, self.validates_after(step), asks and self.asks_after(step))

    def cost(self) -> dict[str, Any] | None:
        """Say what evaluation has cost since this start: seconds, those per hour of training, and tasks that failed."""
        if not self.seconds:
            return None
        hours = (time.monotonic() - self._began) / 3600
        return {"seconds": self.seconds, "seconds_per_hour": self.seconds / hours, "failed": self._failed}

    def _evaluate(self, step: int, validates: bool, asks: bool) -> dict[str, Any]:
        if not (validates or asks):
            return {}
        began, record = time.monotonic(), dict[str, Any]()
        sets: dict[str, Loss] = {}
        if validates and self._own:
            own = {one.name: self._measure(one) for one in self._own}
            whole = together([*own.values()])
            record = {"val_loss": whole.mean, "val_bits_per_byte": whole.bits_per_byte}
            sets = own if self._config.data.sources else {}
        if asks:
            sets |= {one.name: self._measure(one) for one in self._extra}
            record |= self._ask() if self._config.eval.tasks else {}
        record |= {"val_sets": {name: loss.figures() for name, loss in sets.items()}} if sets else {}
        seconds = time.monotonic() - began
        self.seconds += seconds
        if not self._leads:
            return {key: value for key, value in record.items() if key == "val_loss"}
        for line in lines(record):
            self._say(f"step {step}: {line}", logging.INFO)
        return {**record, "eval_seconds": seconds}

    def _ask(self) -> dict[str, Any]:
        """Ask all tasks, on rank 0; elsewhere compute what it asks for, and return nothing."""

        def ask(leader: Leader) -> dict[str, Figures]:
            assert self._tasks is not None
            return self._tasks.ask(leader)

        figures = led(self._engine, self._config.model, self._group, ask)
        found = {"tasks": figures} if figures else {}
        return found | ({"failed_tasks": sum(self._failed.values())} if self._failed else {})

    @property
    def _failed(self) -> dict[str, int]:
        return self._tasks.failed if self._tasks else {}

    def _measure(self, one: HeldOutSet) -> Loss:
        """Measure a set; its bytes are counted once, on rank 0."""
        if self._table is not None and one.name not in self._bytes:
            heart.at(Phase.TASKS)
            self._bytes[one.name] = one.num_bytes(self._table)
        batches, count = one.batches(**self._reading)
        found = self._engine.evaluate(iter(batches), count)
        return Loss(found.total, found.count, self._bytes.get(one.name, 0))
