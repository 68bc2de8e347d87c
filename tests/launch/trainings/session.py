"""Trains the runs of a study with ranks that are forked from the session's process."""

import os
import signal
import threading
import time
from contextlib import contextmanager

from launch.trainings.starts import ForkStarter
from launch.trainings.train_all import is_complete, train_all
from tests.ranks import nursery


@contextmanager
def of_the_session(ranks, at_once):
    """What `starter` makes, with the process that the session's ranks are forked from."""
    yield ForkStarter(ranks, at_once, nursery().forks)


class Session:
    """Trains two runs at a time; `began` has their folders. Told to stop once so many of a pattern are complete."""

    def __init__(self, folder, runs="*/*", stop_after=None):
        self.folder, self.runs, self.stop_after, self.began = folder, runs, stop_after, []

    def __call__(self, trainings, *, at_once):
        if self.stop_after is not None:
            threading.Thread(target=self._stop, daemon=True).start()
        return train_all(trainings, at_once=2, start=self._start)

    @contextmanager
    def _start(self, ranks, at_once):
        with of_the_session(ranks, at_once) as starts:
            begin = starts.start

            def start(prepared, slot):
                self.began.append(prepared.run_dir.name)
                return begin(prepared, slot)

            starts.start = start
            yield starts

    def _stop(self):
        while len([path for path in self.folder.glob(self.runs) if is_complete(path)]) < self.stop_after:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
