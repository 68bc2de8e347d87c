"""All tasks of an evaluation, asked one after another; one that fails costs no other."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from conf.eval_settings import TaskSpec
from model.problems import BadInput
from train.evaluate.lead import Leader
from train.evaluate.tasks import Asked, Figures, Speech, Task, named, open_task


class OpenTasks:
    """Tasks of rank 0, each opened once: at the beginning, or where that fails before it is asked.

    Args:
        given: the tasks; one that is not there stays as it is named, and may come back.
        asked: how they are asked.
        speech: of the model.
        say: writes a line to the log, with its level.
        goes_on: what follows upon a failure, in a clause.

    Attributes:
        failed: how often each has failed.
    """

    def __init__(
        self,
        given: Sequence[TaskSpec],
        asked: Asked,
        speech: Speech,
        say: Callable[[str, int], object],
        goes_on: str,
    ):
        self.failed: dict[str, int] = {}
        self._asked, self._speech, self._say, self._goes_on = asked, speech, say, goes_on
        self._opened: dict[str, Task] = {}
        self._specs: list[TaskSpec] = []
        for spec in given:
            found = [spec]
            with suppress(BadInput):
                found = named([spec])
            self._specs += found
        for spec in self._specs:
            self._attempt(spec, self._open)

    def ask(self, leader: Leader) -> dict[str, Figures]:
        """Ask all tasks.

        Returns:
            The figures of each by its name, without those that have failed.

        Raises:
            Exception: the model itself has failed, and with it all of its ranks.
        """
        found: dict[str, Figures] = {}

        def ask(spec: TaskSpec) -> None:
            if spec.name not in self._opened:
                self._open(spec)
            found[spec.name] = self._opened[spec.name].evaluate(leader)

        for spec in self._specs:
            self._attempt(spec, ask, leader)
        return found

    def _open(self, spec: TaskSpec) -> None:
        task = self._opened[spec.name] = open_task(spec, self._asked, self._speech)
        for note in task.notes:
            self._say(f"{spec.name}: {note}", logging.WARNING)

    def _attempt(self, spec: TaskSpec, act: Callable[[TaskSpec], None], leader: Leader | None = None) -> None:
        """Do something with a task; what it raises is said and counted, unless the model itself has failed."""
        try:
            act(spec)
        except Exception as error:
            if leader is not None and leader.broken:
                raise
            self.failed[spec.name] = self.failed.get(spec.name, 0) + 1
            why = next(iter(str(error).splitlines()), "")
            said = f"task {spec.name} has failed ({type(error).__name__}: {why}); {self._goes_on}"
            self._say(said, logging.WARNING)
