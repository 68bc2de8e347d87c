"""`deepnarrow launch` in a job of Slurm's, whose commands are played: its nodes are this machine."""

import json
import os
import subprocess
import sys

import pytest

from launch.cluster import printed
from launch.cluster.hosts import Cluster
from launch.cluster.slurm import over_srun, slots_of_allocation
from launch.supervise import PassedOn
from model.problems import BadInput
from parallel.heartbeat import FOLDER
from tests.ranks import ROOT
from tests.train.checkpoint import runs

FAKE_SLURM = {
    "srun": """#!/bin/bash
echo "$@" >> {folder}/steps
while [[ "$1" == --* ]]; do shift; done
exec "$@"
""",
    "scontrol": """#!/bin/bash
case "$1" in
    show) case "$2 $3" in
        "hostnames n[1-2]") printf 'localhost\\n127.0.0.1\\n' ;;
        "hostnames n[1]") echo localhost ;;
    esac ;;
    requeue) echo $2 >> {folder}/queued ;;
esac
""",
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
"""As in a batch script: it is task 0 of a job of two tasks, which srun has not started."""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    for name, text in FAKE_SLURM.items():
        (tmp_path / name).write_text(text.replace("{folder}", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for key, value in JOB.items():
        monkeypatch.setenv(key, value)


def test_the_nodes_of_an_allocation_take_as_many_ranks_as_it_has_gpus(slurm):
    assert slots_of_allocation({**os.environ, "SLURM_GPUS_ON_NODE": "8"}, None) == {"localhost": 8, "127.0.0.1": 8}
    assert slots_of_allocation({**os.environ, "SLURM_GPUS_ON_NODE": "8"}, 4) == {"localhost": 4, "127.0.0.1": 4}
    in_order = slots_of_allocation({**JOB, "SLURM_JOB_NODELIST": "b,a"}, 1)  # rank 0 is on b
    assert [*in_order.items()] == [("b", 1), ("a", 1)]
    assert over_srun("b", ["env"])[-1] == "env" and "--nodelist=b" in over_srun("b", ["env"])


def test_what_an_allocation_does_not_say_is_asked_for(slurm, monkeypatch):
    with pytest.raises(BadInput) as found:
        slots_of_allocation({**os.environ, "SLURM_STEP_NUM_TASKS": "2"}, None)
    tasks, gpus = found.value.problems
    assert "srun has started this command 2 times" in tasks and "the same without srun" in tasks
    assert gpus.startswith("SLURM_GPUS_ON_NODE=(not set): ") and "--gpus-per-node 8" in gpus
    with pytest.raises(BadInput, match=r"SLURM_JOB_NODELIST=n\[1-3\]: `scontrol show hostnames` says no names"):
        slots_of_allocation({**JOB, "SLURM_JOB_NODELIST": "n[1-3]"}, 1)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match=r"scontrol, which spells it out, is not here; .* would work"):
        slots_of_allocation(JOB, 1)


def test_a_printed_hostfile_has_the_nodes_of_the_allocation(slurm):
    job = printed.ClusterJob("a", 2, 4, [], 10)
    assert printed.as_hostfile(job) == "localhost slots=4\n127.0.0.1 slots=4\n"
    with pytest.raises(BadInput, match="has 2 nodes, and the layout needs 3; sbatch --nodes=3 would work"):
        printed.as_hostfile(printed.ClusterJob("a", 3, 4, [], 10))


def test_each_node_is_reached_and_told_which_it_is(slurm, tmp_path):
    """The agent of a node is played: it writes down what it is told, and says that its ranks have ended."""
    heartbeats = tmp_path / "heartbeats"
    heartbeats.mkdir()
    agent = f'read -r order; echo "$order" > {tmp_path}/order-of-$0; echo \'{{"ended": 0}}\''
    cluster = Cluster(
        slots_of_allocation(JOB, 2), tmp_path, PassedOn(), lambda name, _: over_srun(name, ["bash", "-c", agent, name])
    )
    assert cluster.start(["a=1"], {FOLDER: str(heartbeats)}, lambda: False) == 0 and cluster.lost == []
    orders = [json.loads((tmp_path / f"order-of-{name}").read_text()) for name in ("localhost", "127.0.0.1")]
    assert [order["node"] for order in orders] == [0, 1]
    assert all(order["devices"] == {"localhost": [0, 1], "127.0.0.1": [0, 1]} for order in orders)
    assert all(order["address"] == "localhost" and order["arguments"] == ["a=1"] for order in orders)
    assert [cluster.host_of(rank) for rank in range(4)] == ["localhost"] * 2 + ["127.0.0.1"] * 2
    first, second = sorted((tmp_path / "steps").read_text().splitlines())  # they are started at once
    assert "--nodelist=127.0.0.1" in first and "--nodelist=localhost" in second


@pytest.mark.launch
def test_a_job_trains_on_its_node_and_is_saved_and_queued_again_before_its_time_is_over(
    slurm, overrides, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1]")
    folder, said = tmp_path / "run", tmp_path / "said"
    given = [*runs.DEFAULTS, *overrides, "parallel.pp=1", "train.max_steps=null", "train.total_tokens=1e12"]
    given = [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in given).items()]
    script = printed.as_slurm(printed.job_of([*given, f"hydra.run.dir={folder}"], 1))
    # Slurm's signal comes once there is a step to save; the script's shell gets it, as --signal=B:… has it.
    tells = f"( until [ -s {folder}/metrics.jsonl ]; do sleep 0.1; done; kill -USR1 $$ ) &\n"
    script = script.replace("again=\n", f"again=\n{tells}", 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(said, "w") as out:
        ran = subprocess.run(["bash"], input=script, env=environment, text=True, timeout=200, stdout=out, stderr=out)
    assert ran.returncode == 0, said.read_text()[-4000:]
    assert (tmp_path / "queued").read_text() == "7\n"
    summary = json.loads((folder / "summary.json").read_text())
    assert not summary["complete"] and (folder / "checkpoints" / "latest").exists()
    (step,) = (tmp_path / "steps").read_text().splitlines()
    assert "--nodelist=localhost" in step and f"{sys.executable} -m launch.cluster.agent" in step
