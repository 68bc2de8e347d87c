"""Real processes for distributed tests, forked from one that has imported everything: a start costs no imports."""

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from parallel.processes import free_port

ROOT = Path(__file__).resolve().parent.parent


class Ranks:
    """Started ranks; `codes` fills as they end, with -N for one ended by signal N."""

    def __init__(self, pids: list[int]):
        self.pids = pids
        self.codes: list[int | None] = [None] * len(pids)

    def signal(self, number: int, *ranks: int) -> None:
        """To the ranks named, or to all, and only where they still run."""
        for rank in ranks or range(len(self.pids)):
            if self.codes[rank] is None:
                with suppress(ProcessLookupError):  # it has ended, and it is not said yet
                    os.kill(self.pids[rank], number)

    def wait(self, timeout: float) -> list[int]:
        """Exit codes. A rank that fails leaves the others waiting for it, so that the first failure ends all."""
        deadline = time.monotonic() + timeout
        while None in self.codes and time.monotonic() < deadline and not any(self.codes):
            time.sleep(0.01)
        self.signal(signal.SIGKILL)
        while None in self.codes:
            time.sleep(0.01)
        return self.codes


class Nursery:
    """The process that all ranks are forked from (tests/nursery.py)."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery"],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._started: queue.Queue[Ranks | None] = queue.Queue()
        self._running: dict[int, tuple[Ranks, int]] = {}
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self._process.kill)

    def start(self, module: str, num: int, arguments: Sequence[str], logs: Path, **environment: str) -> Ranks:
        """Run `python -m module ARGUMENTS` as `num` ranks; each writes to rankN.log in `logs`."""
        shared = {"WORLD_SIZE": str(num), "LOCAL_SIZE": str(num), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), **environment}
        order = {"module": module, "num": num, "arguments": list(arguments), "logs": str(logs), "environment": shared}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        ranks = self._started.get(timeout=120)
        assert ranks is not None, "tests/nursery.py has ended: what it imports fails, as it has said on stderr"
        return ranks

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "started" in said:
                ranks = Ranks(said["started"])
                self._running |= {pid: (ranks, rank) for rank, pid in enumerate(ranks.pids)}
                self._started.put(ranks)
            else:  # and is forgotten here: a session is long enough for the system to use its process id again
                ranks, rank = self._running.pop(said["ended"])
                ranks.codes[rank] = said["code"]
        self._started.put(None)


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
