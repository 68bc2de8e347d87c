"""Calls that are made in a thread of their own, so that none of them, whatever it waits for, holds up a step."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)


class Background:
    """Makes calls one after another in a thread of its own, in the order in which they are given.

    The thread begins with the first call, and does not keep Python from ending.

    Args:
        name: of the thread.
        room: the most calls that wait.
        clock: seconds that only rise.
    """

    def __init__(self, name: str, room: int, clock: Callable[[], float] = time.monotonic):
        self._name, self._room, self._clock = name, room, clock
        self._waiting: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._began: float | None = None
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """The number of calls that have not begun."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """The seconds for which the call under way has lasted; 0 where none is."""
        began = self._began
        return 0.0 if began is None else self._clock() - began

    def call(self, act: Callable[[], object], must: bool = False) -> bool:
        """Have a call made; what it raises is logged.

        Args:
            act: to be called.
            must: whether it is taken however many wait.

        Returns:
            Whether it will be made: not where as many wait as there is room for.
        """
        with self._changed:
            if len(self._waiting) >= self._room and not must:
                return False
            self._waiting.append(act)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def wait(self, seconds: float) -> bool:
        """Wait until all calls are made, for at most so many seconds; return whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._began is None, seconds)

    def clear(self) -> int:
        """Forget the calls that have not begun; return how many those were."""
        with self._changed:
            count = len(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        return count

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                act, self._began = self._waiting.popleft(), self._clock()
            try:
                act()
            except Exception as error:
                log.exception("%s: %s", self._name, error)
            with self._changed:
                self._began = None
                self._changed.notify_all()
