"""Signals that ask a run to stop: from Ctrl-C, from a scheduler, or from whoever started the run."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Those that ask a run to save and end: the terminal's, the system's, and the two that announce Slurm's preemption."""
SAME = 2.0
"""Seconds within which several signals are one: a terminal tells the whole process group, and DeepSpeed's launcher,
told as well, tells each rank again."""


class StopSignals:
    """A context in which the first signal asks to stop, and a later one ends the process at once.

    What notices the second is a thread of its own, since the main one may be waiting for another rank. Until there is
    something to save, the first ends the process at once as well.

    Args:
        farewell: called before the process is ended without anything to save, with its exit code and a sentence.
    """

    def __init__(self, farewell: Callable[[int, str], None] | None = None) -> None:
        self.asked: int | None = None
        """The first signal received."""
        self._since = 0.0
        self._farewell, self._something_to_save = farewell, farewell is None

    def __enter__(self) -> "StopSignals":
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        self._told, self._telling = socket.socketpair()
        self._telling.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._telling.fileno(), warn_on_full_buffer=False)
        # The thread acts; these are here so that the system's default, to die, does not.
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
        threading.Thread(target=self._listen, daemon=True, name="stop-signals").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._telling.close()

    def save_first(self) -> None:
        """Have the first signal ask from here on: there is something to save."""
        self._something_to_save = True

    def ignore(self) -> None:
        """Ignore signals from here on: all is saved, and only the process is left to end."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _listen(self) -> None:
        while received := self._told.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if number == signal.SIGHUP:  # with the terminal gone, the next line written to it would end the run
                for fd in self._terminals:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
            if not self._something_to_save:
                assert self._farewell is not None
                name = signal.Signals(number).name
                # The others are told where that works, and the end does not wait for it.
                end = threading.Timer(SAME, os._exit, [128 + number])
                end.daemon = True
                end.start()
                self._farewell(128 + number, f"told to stop ({name}) before the first step: nothing is to be saved")
                os._exit(128 + number)
            if self.asked is None:
                self.asked, self._since = number, time.monotonic()
            elif time.monotonic() - self._since > SAME:
                with suppress(OSError):
                    print(f"a second signal ({signal.Signals(number).name}): stopped at once", file=sys.stderr)
                os._exit(128 + number)
        self._told.close()
