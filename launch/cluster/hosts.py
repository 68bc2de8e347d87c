"""The hosts of a run as the command sees them: an agent on each, whose ranks' heartbeats are mirrored here."""

import base64
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.cluster.agent import SILENCE
from launch.stacks import STALLS, WANTED
from launch.supervise import PassedOn, shell_code
from launch.watchdog import HOST_LOST
from parallel import heartbeat
from parallel.heartbeat import FOLDER
from parallel.processes import SUPERVISOR, free_port

_ROOT = Path(__file__).resolve().parent.parent.parent
CONNECT = 300.0
"""Seconds within which an agent has to give its first sign: ssh, Python and PyTorch start meanwhile, perhaps all hosts'
from one disk."""
AFTER = 3.0
"""Seconds from the first sign that something has ended to the end of all, for whoever was the first to be known."""
GRACE = 15.0
"""Seconds that an agent has to end its ranks before its connection is cut."""
PASSED = (
    *("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUDA_DEVICE_", "DEEPNARROW_", "DS_", "HF_", "WANDB_"),
    *("OMP_", "MKL_", "UCX_", "FI_", "TRITON_"),
)
"""Variables that begin so are the same on all hosts."""


class Host:
    """One host of a start.

    Attributes:
        name: of the host, as the hostfile has it.
        ranks: of the run that are there.
        ended: the exit code of its ranks; None while they run.
        lost: why it is taken for gone.

    Args:
        order: what its agent is to do.
        folder: of the heartbeats here.
        reach: makes the command that starts another one there, such as `over_ssh`.
    """

    def __init__(
        self, name: str, ranks: range, order: dict[str, Any], folder: Path, reach: Callable[[str, list[str]], list[str]]
    ):
        self.name, self.ranks, self._folder = name, ranks, folder
        self.ended: int | None = None
        self.lost: str | None = None
        self._heard, self._patience = time.monotonic(), CONNECT
        agent = ["env", f"PYTHONPATH={_ROOT}", "PYTHONSAFEPATH=1", sys.executable, "-m", "launch.cluster.agent"]
        command = reach(name, agent)
        self._program = command[0]
        self._link = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is passed on by us, once
        )
        self.tell(order)
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"agent-of-{name}")
        self._reader.start()

    def tell(self, order: Mapping[str, Any]) -> None:
        """Send an order to the agent; threads may, and a signal's handler while one is being sent."""
        assert self._link.stdin is not None
        line = f"{json.dumps(order)}\n".encode()  # short, and so whole at once, but for the first order
        with suppress(OSError, ValueError):
            while line:
                line = line[os.write(self._link.stdin.fileno(), line) :]

    def check(self) -> None:
        """Notice that the host is gone."""
        if self.ended is not None or self.lost is not None:
            return
        if self._link.poll() is not None:
            self._reader.join(1.0)  # its last words
            if self.ended is None:
                self.lost = f"its connection has ended ({self._program}: {self._link.returncode})"
        elif time.monotonic() - self._heard > self._patience:
            self.lost = f"nothing was heard of it for {self._patience:g} s"  # the same for the same cause

    def cut(self) -> None:
        """End the connection, upon which the agent ends its ranks."""
        self._link.kill()
        self._link.wait()

    def _read(self) -> None:
        assert self._link.stdout is not None
        for line in self._link.stdout:
            with suppress(ValueError):
                said = json.loads(line)
                self._heard, self._patience = time.monotonic(), SILENCE
                for rank, told in said.get("ranks", {}).items():
                    self._mirror(int(rank), told, self._heard - said["now"])
                for rank, text in said.get("stacks", {}).items():
                    _write(heartbeat.stacks_of(self._folder, int(rank)), text.encode())
                if "ended" in said:
                    self.ended = said["ended"]

    def _mirror(self, rank: int, told: dict[str, Any], ahead: float) -> None:
        """Write what a rank has said into files of this host, with times by this host's clock.

        Args:
            rank: global.
            told: by its agent.
            ahead: the seconds that this host's clock is ahead of that one's.
        """
        content = heartbeat.moved(base64.b64decode(told["beat"]), ahead)
        _write(heartbeat.state_of(self._folder, rank), json.dumps(told["state"]).encode())
        _write(heartbeat.file_of(self._folder, rank), content)
        path = heartbeat.failure_of(self._folder, rank)
        if (failure := told.get("failure")) and not path.exists():
            # Not when it came: a rank that has only heard of another one's failure may be heard of before that one.
            _write(path, json.dumps({**failure, "time": failure["time"] + ahead}).encode())


def over_ssh(name: str, command: list[str]) -> list[str]:
    """Write the command that runs another one on a host over ssh."""
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=5"]
    return ["ssh", *options, name, shlex.join(command)]


class Cluster:
    """The hosts of a run, and each start of it over them.

    Attributes:
        slots: the ranks of each host, by name, in order.
        reach: makes the command that starts another one on a host.

    Args:
        run_dir: of the run.
        signals: to this process.
    """

    def __init__(
        self,
        slots: dict[str, int],
        run_dir: Path,
        signals: PassedOn,
        reach: Callable[[str, list[str]], list[str]] = over_ssh,
    ):
        self.slots, self._run_dir, self._signals, self.reach = slots, run_dir, signals, reach
        self._hosts: list[Host] = []
        self._ending = 0.0

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], look: Callable[[], bool]) -> int:
        """Start the run once on all hosts, and stay until all of it has ended, on every host that can be reached.

        Returns:
            An exit code for the shell: 0, or that of the first host that ended otherwise; 1 where one is lost.
        """
        folder = Path(environment[FOLDER])
        order = {
            "arguments": list(arguments),
            "devices": {name: list(range(number)) for name, number in self.slots.items()},
            "address": next(iter(self.slots)),
            "port": free_port(),
            "environment": _passed({**os.environ, **environment}),
            "cwd": os.getcwd(),
            "stalls": str(self._run_dir / STALLS),
        }
        self._ending, first = 0.0, 0
        self._hosts = []
        for node, (name, number) in enumerate(self.slots.items()):
            ranks = range(first, first + number)
            self._hosts.append(Host(name, ranks, {**order, "node": node}, folder, self.reach))
            first += number
        self._signals.to(self)
        over = threading.Event()
        # What asks for stacks waits for them, in `look`: another thread passes that on.
        threading.Thread(target=self._pass_on_wishes, args=(folder / WANTED, over), daemon=True).start()
        try:
            self._stay(folder, look)
        finally:
            over.set()
            for host in self._hosts:
                host.cut()
            self._signals.to(None)
        return self._code()

    def _stay(self, folder: Path, look: Callable[[], bool]) -> None:
        pinged = 0.0
        while any(host.ended is None and host.lost is None for host in self._hosts):
            now = time.monotonic()
            if now - pinged > 1.0:
                pinged = now
                for host in self._hosts:
                    host.tell({"here": True})
            for host in self._hosts:
                host.check()
            if look():
                self.kill()
            if not self._ending and any(host.lost or host.ended for host in self._hosts):
                self._ending = now
            if self._ending and now - self._ending > AFTER:
                for host in self._hosts:
                    host.tell({"end": True})
            if self._ending and now - self._ending > AFTER + GRACE:
                break
            time.sleep(0.1)
        for host in self._hosts:
            if host.lost:
                reason = f"host {host.name} is lost: {host.lost}"
                failure = {"time": HOST_LOST, "reason": reason, "by_itself": False}
                _write(heartbeat.failure_of(folder, host.ranks[0]), json.dumps(failure).encode())
        look()

    def _pass_on_wishes(self, wanted: Path, over: threading.Event) -> None:
        while not over.wait(0.2):
            if wanted.exists():
                for host in self._hosts:
                    host.tell({"stacks": True})
                return

    def _code(self) -> int:
        if self._signals.fatal is not None:
            return 128 + self._signals.fatal
        codes = [host.ended for host in self._hosts if host.ended]
        if codes and not any(host.lost for host in self._hosts):
            return shell_code(codes[0])
        return int(any(host.lost or host.ended is None for host in self._hosts))

    @property
    def lost(self) -> list[str]:
        """The names of the hosts that were lost in the last start."""
        return [host.name for host in self._hosts if host.lost is not None]

    def host_of(self, rank: int | None) -> str | None:
        """Return the name of the host of a rank."""
        return next((host.name for host in self._hosts if rank in host.ranks), None)

    def signal(self, number: int) -> bool:
        """Send a signal to all ranks; return whether there are any."""
        for host in self._hosts:
            host.tell({"signal": number})
        return any(host.ended is None and host.lost is None for host in self._hosts)

    def kill(self) -> None:
        """End all at once."""
        for host in self._hosts:
            host.tell({"end": True})
        self._ending = self._ending or time.monotonic() - AFTER


def _passed(environment: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that are the same on all hosts, without those that are of this process."""
    own = (FOLDER, SUPERVISOR)
    return {key: value for key, value in environment.items() if key.startswith(PASSED) and key not in own}


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}.tmp")
    with suppress(OSError):  # its folder is gone once the start is over
        unfinished.write_bytes(content)
        unfinished.rename(path)
