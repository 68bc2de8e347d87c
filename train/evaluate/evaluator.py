"""Evaluation while a run trains, on the layout that trains: held-out documents by source, further sets, and tasks."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from conf.eval_settings import TaskSpec, task_specs
from model.problems import BadInput
from parallel.engine import Engine
from parallel.heartbeat import Phase, heart
from train.data.token_bytes import TokenBytes, token_bytes
from train.data.tokenizer import Encoder
from train.evaluate.held_out import HeldOutSet, Loss, sets_of_run, together
from train.evaluate.judged import shown
from train.evaluate.lead import Leader, led
from train.evaluate.sets import extra_sets
from train.evaluate.tasks import Asked, Figures, Speech, Task, named, open_task
from train.preflight import PreparedRun

Say = Callable[[str, int], object]


class Evaluator:
    """What evaluates a run. All ranks call its methods together.

    Args:
        prepared: the run.
        engine: of this rank.
        reading: which sequences this rank reads, as arguments of `HeldOutSet.batches`.
        group: of all ranks, over the CPU.
        steps: of the run.
        say: writes a line to the log, with its level.

    Attributes:
        seconds: that evaluation has taken so far.
        failed: how often each task has failed, on rank 0.
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
        self.seconds, self.failed, self._began = 0.0, dict[str, int](), time.monotonic()
        self._config, self._engine, self._reading = config, engine, reading
        self._group, self._steps, self._say = group, steps, say
        self._own, self._extra = sets_of_run(config, data), extra_sets(config, prepared.sets)
        self._leads = dist.get_rank() == 0
        self._bytes: dict[str, int] = {}
        self._tasks: dict[str, Task] = {}
        self._table: TokenBytes | None = None
        if not self._leads:
            return
        heart.at(Phase.LOAD)
        tokenizer = data.tokenizer()
        self._table = token_bytes(tokenizer, data.eos_id)
        if self._table.inexact and (self._own or self._extra):
            self._say(f"bits per byte are not exact: of this tokenizer, {self._table.inexact}", logging.INFO)
        encoder, end = Encoder(tokenizer), data.eos_id
        self._speech = Speech(
            tokenizer,
            str(data.tokenizer_path),
            lambda text: [end, *encoder.encode(text)],
            end,
            config.model.max_seq_len,
            data,
        )
        self._asked = Asked.of(config)
        self._specs = self._named(task_specs(config.eval.tasks)[0])
        for spec in self._specs:
            self._attempt(spec.name, self._open)

    def validates_after(self, step: int) -> bool:
        """Tell whether the run's held-out documents are measured after a step."""
        train = self._config.train
        return step == self._steps or step in train.val_at or bool(train.val_every and step % train.val_every == 0)

    def asks_after(self, step: int) -> bool:
        """Tell whether tasks and further sets are evaluated after a step."""
        settings = self._config.eval
        if not (settings.tasks or settings.sets):
            return False
        regularly = settings.every_steps and step % settings.every_steps == 0
        return bool(step == self._steps or step in settings.at or regularly)

    def validation_loss(self) -> float | None:
        """Measure the mean token loss over the run's held-out sequences.

        Returns:
            Nats, on every rank, the same for every layout; None if no sequences are held out.
        """
        return together([self._measure(one) for one in self._own]).mean if self._own else None

    def before(self) -> dict[str, Any]:
        """Evaluate weights before their first step: the run's held-out documents, and tasks where any are asked."""
        return self._evaluate(0, validates=True, asks=bool(self._config.eval.tasks or self._config.eval.sets))

    def after(self, step: int) -> dict[str, Any]:
        """Evaluate what is due after a step.

        Returns:
            What of it stands in the step's record; `val_loss` on every rank, the rest on rank 0 alone.
        """
        return self._evaluate(step, self.validates_after(step), self.asks_after(step))

    def cost(self) -> dict[str, Any] | None:
        """Say what evaluation has cost since this start: seconds, those per hour of training, and tasks that failed."""
        if not self.seconds:
            return None
        hours = (time.monotonic() - self._began) / 3600
        return {"seconds": self.seconds, "seconds_per_hour": self.seconds / hours, "failed": self.failed}

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
            figures = led(self._engine, self._config.model, self._group, self._ask) if self._config.eval.tasks else {}
            record |= {"tasks": figures} if figures else {}
        record |= {"val_sets": {name: loss.figures() for name, loss in sets.items()}} if sets else {}
        seconds = time.monotonic() - began
        self.seconds += seconds
        if not self._leads:
            return {key: value for key, value in record.items() if key == "val_loss"}
        for name, found in {**record.get("val_sets", {}), **record.get("tasks", {})}.items():
            self._say(f"step {step}: {name}: {shown(found)}", logging.INFO)
        record |= {"failed_tasks": sum(self.failed.values())} if self.failed else {}
        return {**record, "eval_seconds": seconds}

    def _measure(self, one: HeldOutSet) -> Loss:
        """Measure a set; its bytes are counted once, on rank 0."""
        if self._table is not None and one.name not in self._bytes:
            heart.at(Phase.TASKS)
            self._bytes[one.name] = one.num_bytes(self._table)
        batches, count = one.batches(**self._reading)
        found = self._engine.evaluate(iter(batches), count)
        return Loss(found.total, found.count, self._bytes.get(one.name, 0))

    def _ask(self, leader: Leader) -> dict[str, Figures]:
        """Ask all tasks; one that fails is said, and asked again the next time."""
        found: dict[str, Figures] = {}
        for spec in self._specs:

            def ask(name: str) -> None:
                if name not in self._tasks:
                    self._open(name)
                found[name] = self._tasks[name].evaluate(leader)

            self._attempt(spec.name, ask, leader)
        return found

    def _named(self, given: Sequence[TaskSpec]) -> list[TaskSpec]:
        """Find the tasks; one that is gone since the run was first started stays as it is named, and may come back."""
        found: list[TaskSpec] = []
        for spec in given:
            with suppress(BadInput):
                found += named([spec])
                continue
            found.append(spec)
        return found

    def _open(self, name: str) -> None:
        spec = next(one for one in self._specs if one.name == name)
        task = self._tasks[name] = open_task(spec, self._asked, self._speech)
        for note in task.notes:
            self._say(f"{name}: {note}", logging.WARNING)

    def _attempt(self, name: str, act: Callable[[str], None], leader: Leader | None = None) -> None:
        """Do something with a task; what it raises is said and counted, unless the model itself has failed."""
        try:
            act(name)
        except Exception as error:
            if leader is not None and leader.broken:
                raise
            self.failed[name] = self.failed.get(name, 0) + 1
            what = str(error).splitlines() or [""]
            self._say(
                f"task {name} has failed ({type(error).__name__}: {what[0]}); training goes on, and it is tried again",
                logging.WARNING,
            )
