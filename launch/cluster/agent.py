"""The agent of a host: it starts the host's ranks, says how they are, and ends them when nobody asks any more.

The command that starts a run runs it over ssh, and talks to it in lines of JSON: its orders come in on stdin, what it
sees goes out on stdout; what the ranks print goes to stderr. Where the command is killed, stdin ends; where the link is
cut, nothing comes; either way the ranks are ended. Where the agent is killed, the ranks end with it.
"""

import base64
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from launch.stacks import collect, record_flights
from launch.supervise import PRETRAIN, Group, end_group, launcher_environment, launcher_of_host
from launch.watchdog import exit_code_of, heartbeats_folder, process_state, remove_heartbeats
from parallel import heartbeat
from parallel.heartbeat import FOLDER

SILENCE = 15.0
"""Seconds without a word of the other side after which it is taken for gone; each speaks every second."""
EVERY = 0.5
"""Seconds from one report to the next."""


class Agent:
    """The ranks of this host.

    Args:
        order: of the command: arguments, devices by host, node, address and port of the meeting, environment, cwd, and
            where the run keeps stacks.
        out: where reports go.
    """

    def __init__(self, order: dict[str, Any], out: TextIO):
        os.chdir(order["cwd"])
        os.environ.update(order["environment"])
        self._out, self.folder = out, heartbeats_folder()
        sizes = [len(devices) for devices in order["devices"].values()]
        first = sum(sizes[: order["node"]])
        self._ranks = range(first, first + sizes[order["node"]])
        self._said: dict[int, Any] = {}
        where = (order["devices"], order["node"], order["address"], order["port"])
        command = launcher_of_host(PRETRAIN, order["arguments"], *where)
        environment = {**launcher_environment(), FOLDER: str(self.folder)}
        self._stalls = Path(order["stalls"])
        record_flights(environment, self.folder, self._stalls)
        # The channel is ours alone: what ranks print goes where errors go.
        self.group = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
        )

    def run(self, orders: "queue.SimpleQueue[dict[str, Any] | None]") -> int:
        """Do as told until the launcher of this host has ended; its exit code."""
        heard = reported = time.monotonic()
        while self.group.poll() is None:
            try:
                told = orders.get(timeout=0.1)
                heard = time.monotonic()
                if told is None or "end" in told:
                    self._end("told to end" if told else "the command that has started it is gone")
                elif "signal" in told:
                    if not Group(self.group.pid).signal(told["signal"]) and not self._said:
                        self._end("told to stop before there were any ranks")
                elif "stacks" in told:
                    self._send_stacks()
            except queue.Empty:
                pass
            if time.monotonic() - heard > SILENCE:
                self._end(f"nothing was heard of the command that has started it for {SILENCE:g} s")
            if time.monotonic() - reported > EVERY:
                reported = time.monotonic()
                self.report()
        self.report()
        end_group(self.group.pid)
        return self.group.returncode

    def report(self) -> None:
        """Send where the ranks are and how, as far as that is new; an empty report says that this host is there."""
        new: dict[int, Any] = {}
        for rank in self._ranks:
            content = heartbeat.content_of(heartbeat.file_of(self.folder, rank))
            if content is None:
                continue
            beat = heartbeat.beat_of(content)
            state = process_state(beat.pid)
            code = exit_code_of(beat.pid) if state == "zombie" else None
            failure = heartbeat.failed(self.folder, rank)
            said = (beat.beats, beat.collectives, beat.in_collective, state, code, failure is not None)
            if said == self._said.get(rank):
                continue
            self._said[rank] = said
            new[rank] = {
                "beat": base64.b64encode(content.rstrip(b"\0")).decode(),
                "state": [state, code],
                **({"failure": failure} if failure else {}),
            }
        self.send({"ranks": new, "now": time.monotonic()})

    def send(self, what: dict[str, Any]) -> None:
        """Send a line; where nobody reads any more, the ranks end."""
        try:
            print(json.dumps(what), file=self._out, flush=True)
        except OSError:
            self._end("the command that has started it is gone")

    def _send_stacks(self) -> None:
        beats = {rank: heartbeat.read(heartbeat.file_of(self.folder, rank)) for rank in self._ranks}
        # Without native stacks: the command waits for no more than what ranks write themselves.
        self.send({"stacks": collect(beats, self.folder, [], self._stalls, native=0)})

    def _end(self, why: str) -> None:
        if self.group.poll() is None:
            print(f"{os.uname().nodename}: {why}: its ranks are ended", file=sys.stderr, flush=True)
            Group(self.group.pid).kill()
            self.group.wait()


def main() -> int:
    """Run as the agent of this host; exits as the ranks do."""
    orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()  # a signal's handler may put into it

    def listen() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        orders.put(None)

    order = json.loads(sys.stdin.readline())
    threading.Thread(target=listen, daemon=True, name="orders").start()
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):  # as when its connection ends
        signal.signal(number, lambda number, frame: orders.put(None))
    agent = Agent(order, sys.stdout)
    try:
        code = agent.run(orders)
        agent.send({"ended": code})
    finally:
        end_group(agent.group.pid)
        remove_heartbeats(agent.folder)
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
