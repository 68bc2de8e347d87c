"""Two hosts under the launchers of docs/cluster.md: what they train is what one host trains.

Minutes: with DEEPNARROW_ALL_HOSTS=1 alone.
"""

import os
import shutil
import sys

import pytest

from conf.launch_settings import LaunchConfig
from tests.faults import injector_run
from tests.ranks import ROOT
from tests.train.checkpoint import runs

PRETRAIN = str(ROOT / "train" / "pretrain.py")
pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif("DEEPNARROW_ALL_HOSTS" not in os.environ, reason="minutes: DEEPNARROW_ALL_HOSTS=1 runs it"),
]


@pytest.fixture(scope="module")
def alone(overrides, tmp_path_factory):
    """Four ranks on one host."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert injector_run.run(overrides, "dp2 pp2", folder, [], LaunchConfig(0))[0] == 0
    return folder


def given(overrides, folder):
    words = [*runs.DEFAULTS, *injector_run.OVERRIDES, *overrides, "parallel.pp=2", f"hydra.run.dir={folder}"]
    return [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in words).items()]


def assert_trained_alike(process, said, folder, alone):
    assert process.wait(timeout=400) == 0, said.read_text()[-4000:]
    assert runs.curve(folder) == runs.curve(alone)
    assert runs.digests(runs.saved(folder, runs.STEPS)) == runs.digests(runs.saved(alone, runs.STEPS))


def test_deepspeed_over_pdsh(hosts, overrides, alone, tmp_path):
    if shutil.which("pdsh") is None:
        pytest.skip("DeepSpeed's launcher starts hosts by pdsh, which is not installed")
    (tmp_path / "hosts").write_text(hosts.do("hosts", "2", "2"))
    command = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), PRETRAIN, *given(overrides, tmp_path / "run")]
    process = hosts.start("node1", *command, said=tmp_path / "said.txt")
    assert_trained_alike(process, tmp_path / "said.txt", tmp_path / "run", alone)
    said = (tmp_path / "said.txt").read_text()
    assert "node1: " in said and "node2: " in said and "dp2 x pp2 x tp1" in said


def test_torchrun_on_each_of_two_nodes(hosts, overrides, alone, tmp_path):
    processes = []
    for node in (1, 2):
        of_torchrun = ["--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(node - 1)]
        where = ["--master-addr", "node1", "--master-port", "29713"]
        command = [sys.executable, "-m", "torch.distributed.run", *of_torchrun, *where, PRETRAIN]
        said = tmp_path / f"node{node}.txt"
        processes.append(hosts.start(f"node{node}", *command, *given(overrides, tmp_path / "run"), said=said))
    for node, process in enumerate(processes, 1):
        assert_trained_alike(process, tmp_path / f"node{node}.txt", tmp_path / "run", alone)
