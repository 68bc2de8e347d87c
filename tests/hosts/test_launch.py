"""`deepnarrow launch` over two hosts: what befalls one side ends all of it, and what can go on goes on by itself."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.train.checkpoint import runs

SECONDS = 240
"""Within which a start takes its first steps, on a machine where others compute."""


class Launched:
    """A run without end over both hosts, started on the first."""

    def __init__(self, hosts, overrides, folder):
        self.hosts, self.folder, self.said = hosts, folder / "run", folder / "said.txt"
        (folder / "hosts").write_text(hosts.do("hosts", "2", "1"))
        given = [*runs.DEFAULTS, *overrides, "parallel.pp=2", "train.max_steps=null", "train.total_tokens=1e12"]
        given = [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in given).items()]
        command = [sys.executable, "-m", "launch.cli", "launch", "--hostfile", str(folder / "hosts"), *given]
        settings = ["launch.stall_seconds=30", "checkpoint.every_steps=20", f"hydra.run.dir={self.folder}"]
        self.process = hosts.start("node1", *command, *settings, said=self.said)

    def wait_for(self, happens, seconds=SECONDS):
        end = time.monotonic() + seconds
        while not happens():
            assert self.process.poll() is None and time.monotonic() < end, self.said.read_text()[-4000:]
            time.sleep(0.2)

    def events(self, kind):
        events = self.folder / "events.jsonl"
        lines = events.read_text().splitlines() if events.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def steps(self):
        return len(runs.metrics(self.folder)) if (self.folder / "metrics.jsonl").exists() else 0

    def rank(self, number):
        """The process of a rank, by its id here."""
        (found,) = [pid for pid in self.hosts.ranks(self.folder) if f"RANK={number}" in environment(pid)]
        return found


def environment(pid):
    with open(f"/proc/{pid}/environ") as file:
        return file.read().split("\0")


@pytest.mark.launch
def test_a_run_over_two_hosts_goes_on_whatever_befalls_them_and_nothing_is_left_of_it(hosts, overrides, tmp_path):
    run = Launched(hosts, overrides, tmp_path)
    run.wait_for(lambda: run.steps() > 25)

    os.kill(run.rank(1), signal.SIGKILL)
    run.wait_for(lambda: len(run.events("recovered")) == 1)
    (failed,) = run.events("failed")
    assert (failed["rank"], failed["host"]) == (1, "node2") and "SIGKILL" in failed["cause"]

    hosts.do("link", "node2", "down")
    before = run.hosts.ranks(run.folder)
    run.wait_for(lambda: len(run.events("failed")) == 2)
    run.wait_for(lambda: not set(before) & set(run.hosts.ranks(run.folder)))  # on the side that is cut off, too
    hosts.do("link", "node2", "up")
    assert "host node2 is lost: nothing was heard of it for" in run.events("failed")[1]["cause"]
    run.wait_for(lambda: len(run.events("recovered")) == 2)

    os.kill(run.rank(1), signal.SIGSTOP)
    run.wait_for(lambda: len(run.events("failed")) == 3)
    failed = run.events("failed")[2]
    assert (failed["rank"], failed["host"], failed["cause"]) == (1, "node2", "was stopped (SIGSTOP)")
    said = run.said.read_text()
    assert "the others wait for rank 1 (process " in said and "node2 has failed 2 times and stays, since" in said
    run.wait_for(lambda: len(run.hosts.ranks(run.folder)) == 2)  # of the next start

    pid = int(
        subprocess.run(
            ["pgrep", "-f", f"launch.cli launch .*{run.folder}"], capture_output=True, text=True
        ).stdout.split()[-1]
    )
    os.kill(pid, signal.SIGKILL)
    run.process.wait(30)
    end = time.monotonic() + 60
    while run.hosts.ranks(run.folder) and time.monotonic() < end:
        time.sleep(0.2)
    assert not run.hosts.ranks(run.folder)
