"""Real processes for distributed tests, forked from one that has imported everything: a start costs no imports."""

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from launch.trainings.forks import ForkedRanks, Forks

ROOT = Path(__file__).resolve().parent.parent


class Nursery:
    """One process for a whole session that all ranks are forked from."""

    def __init__(self) -> None:
        self.forks = Forks(1, {"PYTHONWARNINGS": "ignore"})
        atexit.register(self.forks.close)

    def start(self, module: str, num: int, arguments: Sequence[str], logs: Path, **environment: str) -> "Ranks":
        """Run `python -m module ARGUMENTS` as `num` ranks; each writes to rankN.log in `logs`."""
        return Ranks(self.forks.start(module, num, arguments, logs, environment))


class Ranks:
    """Started ranks; `codes` fills as they end, with -N for one ended by signal N."""

    def __init__(self, forked: ForkedRanks):
        self.pids, self.codes, self.signal = forked.pids, forked.codes, forked.signal

    def wait(self, timeout: float) -> list[int]:
        """Exit codes. A rank that fails leaves the others waiting for it, so that the first failure ends all."""
        deadline = time.monotonic() + timeout
        while None in self.codes and time.monotonic() < deadline and not any(self.codes):
            time.sleep(0.01)
        self.signal(signal.SIGKILL)
        while None in self.codes:
            time.sleep(0.01)
        return [code for code in self.codes if code is not None]


@cache
def nursery() -> Nursery:
    """One for the whole session."""
    return Nursery()


def run_ranks(module: str, num_processes: int, folder: Path, timeout: float = 300) -> list[Any]:
    """Run `python -m module FOLDER` as `num_processes` ranks; what each passed to `report`, by rank."""
    ranks = nursery().start(module, num_processes, [str(folder)], folder)
    codes = ranks.wait(timeout)
    # The others only say that the first left them.
    failed = [rank for rank, code in enumerate(codes) if code and code != -signal.SIGKILL]
    log_of = failed[0] if failed else 0
    text = (folder / f"rank{log_of}.log").read_text()
    assert codes == [0] * num_processes, f"exit codes {codes}; rank {log_of}:\n{text[-4000:]}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(num_processes)]


def report(run: Callable[[], Any]) -> None:
    """The main of a rank's module: run, and hand the result to `run_ranks`."""
    rank = os.environ["RANK"]  # a command that starts processes itself forgets what a launcher has set
    torch.save(run(), Path(sys.argv[1]) / f"rank{rank}.pt")
