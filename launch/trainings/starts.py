"""How the trainings of a study are started on this machine: forked on a CPU, as commands on GPUs."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from launch.trainings.forks import Forks
from parallel.processes import SUPERVISOR
from train.preflight import PreparedRun
from train.pretrain import for_ranks

LOGS = "logs"
"""The folder of a run folder with what its ranks print: rankN.log, or command.log."""
_COMMAND = """
import os, sys
sys.path[:] = filter(None, sys.path)
from parallel.processes import SUPERVISOR, die_with
die_with(os.environ.get(SUPERVISOR))
from launch.cli import main
sys.exit(main())
"""
"""A command that ends with the study, whose own ranks end with the command."""


class Started(Protocol):
    """A training that has been started."""

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""

    def signal(self, number: int) -> bool:
        """Send a signal to it; return whether it still runs."""

    def kill(self) -> None:
        """End it at once."""


class Starter(Protocol):
    """What starts trainings, at most `slots` of them at a time."""

    slots: int

    def start(self, prepared: PreparedRun, slot: int) -> Started:
        """Start a training in a slot that is free."""


Starts = Callable[[int, int | None], AbstractContextManager[Starter]]
"""What makes a starter, of the ranks of the largest training and how many are to run at a time, as `starter` does."""


class ForkStarter:
    """Forks the ranks of each training, which share the cores.

    Args:
        ranks: of the largest training.
        at_once: trainings at a time; None is as many as the cores allow.
        forks: what forks them; None is a process of its own, which imports everything.
    """

    def __init__(self, ranks: int, at_once: int | None = None, forks: Forks | None = None):
        cores = len(os.sched_getaffinity(0))
        self.slots = at_once or max(1, cores // ranks)
        # A run of its own takes as many threads as OMP_NUM_THREADS says; so do these.
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // (ranks * self.slots)))
        self._forks = forks or Forks(threads)

    def start(self, prepared: PreparedRun, slot: int) -> Started:
        """Fork the ranks of a training."""
        arguments = for_ranks(prepared.arguments, prepared.run_dir)
        logs = _logs(prepared.run_dir)
        return self._forks.start("train.pretrain", prepared.layout.world_size, arguments, logs, append=True)

    def close(self) -> None:
        """End what still runs."""
        self._forks.close()


class CommandStarter:
    """Starts ``deepnarrow train`` for each training, which sees as many GPUs as it has ranks.

    A process cannot be forked from one that has used a GPU, and what is trained there takes longer than an import.

    Args:
        ranks: of the largest training.
        at_once: trainings at a time; None is as many as the GPUs allow.
    """

    def __init__(self, ranks: int, at_once: int | None = None):
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        self._devices = visible or [str(number) for number in range(torch.cuda.device_count())]
        self._ranks = ranks
        self.slots = at_once or max(1, len(self._devices) // ranks)
        self._running: list[Command] = []

    def start(self, prepared: PreparedRun, slot: int) -> Started:
        """Start the command of a training."""
        shown = ",".join(self.devices(slot))
        arguments = ["train", *for_ranks(prepared.arguments, prepared.run_dir)]
        with open(_logs(prepared.run_dir) / "command.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *arguments],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": shown, "PYTHONSAFEPATH": "1", SUPERVISOR: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append(Command(process))
        return self._running[-1]

    def devices(self, slot: int) -> list[str]:
        """Return the GPUs that the trainings of a slot see; where there are more slots than fit, they share them."""
        first = slot % max(1, len(self._devices) // self._ranks) * self._ranks
        return self._devices[first : first + self._ranks]

    def close(self) -> None:
        """End what still runs."""
        for command in self._running:
            command.kill()


class Command:
    """A command that trains."""

    def __init__(self, process: "subprocess.Popen[bytes]"):
        self._process = process

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> bool:
        """Send a signal to the command, which passes it on to its ranks; return whether it still runs."""
        if self._process.poll() is not None:
            return False
        self._process.send_signal(number)
        return True

    def kill(self) -> None:
        """End it at once, and by it its ranks: SIGQUIT is not passed on."""
        self.signal(signal.SIGQUIT)


@contextmanager
def starter(ranks: int, at_once: int | None) -> Iterator[Starter]:
    """Make what starts trainings on this machine, and end what it has started behind this context.

    Args:
        ranks: of the largest training.
        at_once: trainings at a time; None is as many as the cores, or GPUs, allow.
    """
    with ExitStack() as held:
        kind = CommandStarter if torch.cuda.is_available() else ForkStarter
        found = kind(ranks, at_once)
        held.callback(found.close)
        yield found


def log_tail(run_dir: Path, length: int = 2000) -> str:
    """Return the end of what a training has printed, of the rank that printed last."""
    logs = sorted(_logs(run_dir).glob("*.log"), key=lambda path: path.stat().st_mtime)
    return logs[-1].read_text("utf-8", errors="replace")[-length:].strip() if logs else ""


def _logs(run_dir: Path) -> Path:
    folder = run_dir / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    return folder
