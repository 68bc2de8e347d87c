"""Two hosts on this machine: network, mount, name and process namespaces each, joined by a bridge, with an sshd."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

SCRIPT = Path(__file__).parent / "netns.sh"
TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "pgrep")


class Hosts:
    """Hosts node1 and node2, of two slots each, that share all of the file system but the home of root."""

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
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, host: str, *command: str, said: Path) -> subprocess.Popen:
        """Start a command on a host; what it says goes to a file."""
        with open(said, "w") as file:
            return subprocess.Popen(
                ["bash", SCRIPT, "exec", host, *command],
                **dict(env=self.environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file),
            )

    def ranks(self, folder: Path) -> list[int]:
        """The ranks of a run on all hosts, by their ids here."""
        found = subprocess.run(
            ["pgrep", "-f", f"pretrain.py .*{folder}"], capture_output=True, text=True
        ).stdout.split()
        return [int(pid) for pid in found]


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None and not Path("/usr/sbin", tool).exists()]
    if os.geteuid() or missing:
        pytest.skip(f"hosts are made by root, with {', '.join(missing) or 'all tools there'}")
    made = Hosts(tmp_path_factory.mktemp("hosts") / "state", os.getpid() % 1000)
    try:
        made.do("up", "2")
    except AssertionError as error:
        made.do("down")
        pytest.skip(f"no network namespaces here: {error}")
    yield made
    made.do("down")
