"""`deepnarrow train` whose launcher and ranks are forked: ``python -m tests.launch.forked train OVERRIDES``.

Where the command and DeepSpeed's launcher each start an interpreter, this forks a process that has imported all that it
needs. Which process is whose child, sessions, environments, signals, exit codes and what a process is called are as
they are without it.
"""

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from deepspeed.launcher import launch as deepspeeds

from launch import supervise
from launch.cli import main
from launch.trainings.fork_server import exits

STARTS = 2
"""How often the command may start its launcher."""


class Forked:
    """Takes the place of a `subprocess.Popen` of a Python script, or of ``-c``."""

    def __init__(self, command, env, start_new_session=False):
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            become(command, env, start_new_session)

    def poll(self):
        if self.returncode is None:
            try:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has asked
                ended, status = self.pid, 0
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.02)
        return self.returncode


class ForkedBefore(Forked):
    """The same of a process that checks and prepares: it has threads by then, and is forked while it has none."""

    waiting: ClassVar = []

    def __init__(self, command, env, start_new_session=False):
        self.returncode = None
        self.pid, order = self.waiting.pop(0)
        with open(order, "w") as file:
            file.write(json.dumps([command, env, start_new_session]) + "\n")

    @classmethod
    def prepare(cls):
        ours, own = os.pipe()
        if pid := os.fork():
            os.close(ours)
            cls.waiting.append((pid, own))
            return
        os.close(own)
        with open(ours) as file:
            order = file.readline()  # its end is not seen, which those have as well that were forked later
        if not order:  # the command has ended without
            os._exit(0)
        become(*json.loads(order))


def become(command, environment, new_session):
    """Be the process that a command would start."""
    with exits():
        if new_session:
            os.setsid()
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):  # what is ignored stays so
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        be_called(command)
        sys.stdout.reconfigure(line_buffering=True)
        words = command[2:] if command[1] == "-u" else command[1:]
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")


def be_called(command):
    """Have the system tell these words of this process, or as many as there is room for where its own are."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    said = b"".join(word.encode() + b"\0" for word in command)[: end - start - 1]
    ctypes.memmove(start, said.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    supervise.subprocess = SimpleNamespace(Popen=ForkedBefore)
    deepspeeds.subprocess = SimpleNamespace(Popen=Forked)
    for _ in range(STARTS):
        ForkedBefore.prepare()
    sys.exit(main(sys.argv[1:]))
