"""Two hosts on this machine: network, mount, name and process namespaces each, joined by a bridge, with an sshd."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ranks import ROOT

SCRIPT = Path(__file__).parent / "netns.sh"
TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "pgrep")
NAMES = ("node1", "node2")


class NoHosts(Exception):
    """This machine makes none; the message says why."""


class Hosts:
    """Hosts node1 and node2 that share all of the file system but the home of root."""

    def __init__(self, state: Path, number: int):
        self.state = state
        prefix = f"dn{number}"  # several may be tested at a time
        self.environment = {
            **os.environ,
            **{"NETNS_STATE": str(state), "NETNS_PREFIX": prefix, "NETNS_NET": f"10.{100 + number % 100}.0"},
            **{"OMP_NUM_THREADS": "1", "PDSH_RCMD_TYPE": "ssh", "PYTHONPATH": str(ROOT)},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def do(self, *words: str) -> str:
        done = subprocess.run(["bash", SCRIPT, *words], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise NoHosts(done.stderr.strip())
        return done.stdout

    def start(self, host: str, *command: str, said: Path) -> subprocess.Popen:
        """Start a command on a host; what it says is added to a file."""
        with open(said, "a") as file:
            return subprocess.Popen(
                ["bash", SCRIPT, "exec", host, *command],
                **dict(env=self.environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file),
            )

    def ranks(self, folder: Path) -> list[int]:
        """The ranks of a run on all hosts and the launchers of them, by their ids here."""
        return pids("-f", f"pretrain.py .*{folder}")

    def processes(self, host: str, *words: str) -> list[int]:
        """The processes of a host that `pgrep` finds, by their ids here."""
        return pids("--ns", self.do("pid", host).strip(), "--nslist", "pid", *words)


def pids(*words: str) -> list[int]:
    """What `pgrep` finds."""
    found = subprocess.run(["pgrep", *words], capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr
    return [int(pid) for pid in found.stdout.split()]


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Make them, and remove them again.

    Raises:
        NoHosts: they cannot be made here.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None and not Path("/usr/sbin", tool).exists()]
    if os.geteuid():
        raise NoHosts("hosts are made of network namespaces by root alone")
    if missing:
        raise NoHosts(f"hosts need {', '.join(missing)}, which is not installed")
    made = Hosts(folder / "state", os.getpid() % 1000)
    try:
        made.do("up", str(len(NAMES)))
        yield made
    finally:
        made.do("down")
