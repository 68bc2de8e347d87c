"""A run that `deepnarrow launch` keeps going over two hosts, a rank on each."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.hosts.network import NAMES, Hosts, pids
from tests.train.checkpoint import runs

SECONDS = 180
"""Within which a start takes its first steps, on a machine where others compute."""


class Launched:
    """A run over both hosts, started on the first.

    Args:
        hosts: where.
        overrides: of the run.
        folder: for the run folder, the hostfile and what is said.
        stall: seconds that it may stand still.
    """

    def __init__(self, hosts: Hosts, overrides: list[str], folder: Path, stall: float = 30.0):
        self.hosts, self.folder, self.said = hosts, folder / "run", folder / "said.txt"
        (folder / "hosts").write_text(hosts.do("hosts", "2", "1"))
        given = [*runs.DEFAULTS, "checkpoint.every_steps=20", *overrides, "parallel.pp=2"]
        given += [f"launch.stall_seconds={stall}", f"hydra.run.dir={self.folder}"]
        given = [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in given).items()]
        self._command = [sys.executable, "-m", "launch.cli", "launch", "--hostfile", str(folder / "hosts"), *given]
        self.begin()

    def begin(self) -> None:
        """Type the command."""
        self.process = self.hosts.start("node1", *self._command, said=self.said)

    def wait_for(self, happens, seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not happens():
            assert self.process.poll() is None and time.monotonic() < end, self.said.read_text()[-4000:]
            time.sleep(0.1)

    def events(self, kind: str) -> list[dict]:
        events = self.folder / "events.jsonl"
        lines = events.read_text().splitlines() if events.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        metrics = self.folder / "metrics.jsonl"
        with suppress(OSError, IndexError, ValueError):  # not there, empty, or a line is being written
            return json.loads(metrics.read_text().splitlines()[-1])["step"]
        return 0

    def rank(self, number: int) -> int:
        """The process of a rank, by its id here."""
        (found,) = [pid for pid in self.hosts.ranks(self.folder) if f"RANK={number}" in environment(pid)]
        return found

    def kill_command(self) -> float:
        """Kill the command itself; seconds until nothing of the run is left on any host."""
        began = time.monotonic()
        for pid in pids("-f", f"launch.cli launch .*{self.folder}"):
            if "launch.cli" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[2:3]:
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        while self.left() and time.monotonic() < began + 60:
            time.sleep(0.1)
        assert not self.left(), f"on the hosts are left: {self.left()}"
        return time.monotonic() - began

    def left(self) -> list[int]:
        """What is left of the run on the hosts."""
        agents = [pid for name in NAMES for pid in self.hosts.processes(name, "-f", "launch.cluster.agent")]
        return self.hosts.ranks(self.folder) + agents


def environment(pid: int) -> list[str]:
    with open(f"/proc/{pid}/environ") as file:
        return file.read().split("\0")
