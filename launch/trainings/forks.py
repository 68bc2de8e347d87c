"""Ranks that are forked from a process that has imported everything: a start costs no imports (5 to 20 s each)."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from parallel.environment import name_accelerator
from parallel.processes import SUPERVISOR, forget_launcher, free_port

ROOT = Path(__file__).resolve().parents[2]
GRACE = 10.0
"""Seconds that the other ranks have to end by themselves after the first that failed."""
START_TIMEOUT = 300.0
"""Seconds that its imports may take."""
_SERVER = "import sys; sys.path[:] = filter(None, sys.path); from launch.trainings.fork_server import main; main()"
"""Not with ``-m``, for the reason that `launch.supervise` gives."""


class ForkedRanks:
    """The ranks of one start.

    Attributes:
        pids: their process ids, by rank.
        codes: their exit codes by rank, -N for one ended by signal N; None while it runs.
    """

    def __init__(self, pids: list[int]):
        self.pids = pids
        self.codes: list[int | None] = [None] * len(pids)
        self._failed_at: float | None = None

    def signal(self, number: int, *ranks: int) -> bool:
        """Send a signal to the ranks named, or to all, where they still run; return whether any does."""
        sent = False
        for rank in ranks or range(len(self.pids)):
            if self.codes[rank] is None:
                with suppress(ProcessLookupError):  # it has ended, and it is not said yet
                    os.kill(self.pids[rank], number)
                    sent = True
        return sent

    def kill(self) -> None:
        """End all at once."""
        self.signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """Return the exit code of all, None while they run: 0, or that of the first rank in order that failed.

        A rank that fails leaves the others waiting for it, so that they are ended a while after it.
        """
        if None in self.codes:
            if any(self.codes):
                self._failed_at = self._failed_at or time.monotonic()
                if time.monotonic() - self._failed_at > GRACE:
                    self.kill()
            return None
        failed = [code for code in self.codes if code]
        by_itself = [code for code in failed if code != -signal.SIGKILL]
        return next(iter([*by_itself, *failed]), 0)


class Forks:
    """The process that ranks are forked from (`launch.trainings.fork_server`); closed, it ends, and its ranks with it.

    Args:
        threads: of a rank, for OpenMP.
        environment: of all ranks besides this process's.
    """

    def __init__(self, threads: int = 1, environment: Mapping[str, str] | None = None):
        inherited = {**os.environ, **(environment or {}), "OMP_NUM_THREADS": str(threads)}
        forget_launcher(inherited)
        name_accelerator(inherited)
        path = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
        inherited |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            env=inherited,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started: queue.Queue[ForkedRanks | None] = queue.Queue()
        self._running: dict[int, tuple[ForkedRanks, int]] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def server(self) -> int:
        """The id of the process."""
        return self._process.pid

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and what it has forked."""
        for ranks, _ in list(self._running.values()):
            ranks.kill()
        self._process.kill()
        self._process.wait()

    def start(
        self,
        module: str,
        num: int,
        arguments: Sequence[str],
        logs: Path,
        environment: Mapping[str, str] | None = None,
        append: bool = False,
    ) -> ForkedRanks:
        """Run ``python -m module ARGUMENTS`` as so many ranks, which end with this process.

        Args:
            module: its name.
            num: ranks.
            arguments: of the module.
            logs: a folder; rank N writes what it prints to rankN.log there.
            environment: of these ranks, besides the others'.
            append: whether their logs go on, and do not begin anew.

        Raises:
            RuntimeError: the process has ended: what it imports fails, as it has said.
        """
        shared = {"WORLD_SIZE": str(num), "LOCAL_SIZE": str(num), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), SUPERVISOR: str(os.getpid()), **(environment or {})}
        order = {"module": module, "num": num, "arguments": list(arguments), "logs": str(logs), "append": append}
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({**order, "environment": shared}) + "\n")
            self._process.stdin.flush()
            ranks = self._started.get(timeout=START_TIMEOUT)
        except (OSError, queue.Empty):
            ranks = None
        if ranks is None:
            raise RuntimeError(f"{module}: no rank could be forked; what the process imports fails, as said above")
        return ranks

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "started" in said:
                ranks = ForkedRanks(said["started"])
                self._running |= {pid: (ranks, rank) for rank, pid in enumerate(ranks.pids)}
                self._started.put(ranks)
            else:  # and is forgotten here: a session is long enough for the system to use its process id again
                ranks, rank = self._running.pop(said["ended"])
                ranks.codes[rank] = said["code"]
        # Nobody says any more how they end, and they would be waited for without end.
        for ranks, rank in list(self._running.values()):
            ranks.signal(signal.SIGKILL, rank)
            ranks.codes[rank] = -signal.SIGKILL
        self._running.clear()
        self._started.put(None)
