"""What `deepnarrow launch --print` writes is read back by who will read it: bash, torchrun, YAML, DeepSpeed."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from torch.distributed.run import get_args_parser

from launch import cli
from launch.hostfile import slots_of
from tests.ranks import ROOT

HARD = ["data.path='/cor pus/$(x)/*.zst'", "name='a b'"]
"""Overrides that a shell or Kubernetes would read something into."""


@pytest.fixture
def printed(monkeypatch, capsys):
    """Print a run of so many ranks on nodes of 8 GPUs."""
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)

    def printed(kind, *overrides, gpus="8"):
        assert cli.main(["launch", "--print", kind, "--gpus-per-node", gpus, *overrides]) == 0
        return capsys.readouterr().out

    return printed


def sbatch_lines(script):
    lines = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert all(line.startswith("--") for line in lines)
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


def test_an_sbatch_script_asks_for_the_nodes_of_the_layout_and_runs_the_same_command(printed, tmp_path, monkeypatch):
    echo = tmp_path / "python of this"  # tells how it was called
    echo.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n")
    echo.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(echo))
    overrides = ["model=67b", "parallel.pp=6", "parallel.tp=8", "parallel.dp=2", *HARD]
    script = printed("slurm", *overrides)
    asked = sbatch_lines(script)
    assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == ("12", "8", "1")
    assert asked["signal"] == "B:USR1@300" and "requeue" in asked and asked["job-name"] == "a-b"
    ran = subprocess.run(["bash"], input=script, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [os.getcwd(), "-m", "deepnarrow", "launch", "--gpus-per-node", "8", *overrides]


@pytest.mark.parametrize(
    ("code", "told", "again", "task"),
    [
        *[(0, True, "7", {}), (1, True, None, {}), (0, False, None, {})],
        (0, True, "5_2", {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}),
    ],
)
def test_a_job_is_queued_again_where_it_was_told_to_and_the_run_is_saved(
    code, told, again, task, printed, tmp_path, monkeypatch
):
    run = tmp_path / "python"  # ends when it is told to; as a run that saves, not at once
    run.write_text(f"#!/bin/bash\ntrap 'sleep 0.3; exit {code}' USR1\n{'kill -USR1 $PPID; sleep 60 & wait' * told}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/said\n')
    for file in (run, tmp_path / "scontrol"):
        file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(run))
    script = printed("slurm", "model=7b", "parallel.pp=8", "parallel.dp=1")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **task}
    assert subprocess.run(["bash"], input=script, env=environment, text=True, timeout=60).returncode == code
    assert (tmp_path / "said").exists() == (again is not None)
    assert again is None or (tmp_path / "said").read_text() == f"requeue {again}\n"


def test_a_jobset_has_a_pod_for_each_node_in_which_torchrun_starts_the_ranks(printed):
    overrides = ["model=67b", "parallel.pp=4", "parallel.tp=4", "parallel.dp=1", "launch.restarts=5", *HARD]
    found = yaml.safe_load(printed("k8s", *overrides))
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, spec = found["metadata"]["name"], found["spec"]
    assert name == "a-b" and spec["failurePolicy"] == {"maxRestarts": 5}
    (nodes,) = spec["replicatedJobs"]
    job = nodes["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"], job["completionMode"]) == (2, 2, 0, "Indexed")
    (container,) = job["template"]["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": "1"}
    # JobSet's name of the first pod: JobSet, job, its index, the pod's, and the service of the name of the JobSet.
    assert environment["MASTER_ADDR"] == f"{name}-{nodes['name']}-0-0.{name}"
    words = [expanded(word, environment) for word in container["command"]]
    assert words[0] == "torchrun"
    asked = get_args_parser().parse_args(words[1:])
    assert (asked.nnodes, asked.nproc_per_node, asked.node_rank) == ("2", "8", 1)
    assert (asked.master_addr, asked.master_port) == (environment["MASTER_ADDR"], 29500)
    assert asked.training_script.endswith("/train/pretrain.py") and asked.training_script_args == overrides
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    volumes = {one["name"]: one for one in job["template"]["spec"]["volumes"]}
    mounted = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
    assert "emptyDir" in mounted["/dev/shm"] and "persistentVolumeClaim" in mounted[container["workingDir"]]
    affinity = job["template"]["spec"]["affinity"]["podAntiAffinity"]  # or two pods would share a node's GPUs
    (rule,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["labelSelector"]["matchLabels"] == {"jobset.sigs.k8s.io/jobset-name": name}
    (copied,) = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY . ")]
    assert asked.training_script == f"{copied.split()[2]}/train/pretrain.py"


def expanded(word, environment):
    """As Kubernetes expands it: $(NAME) is a variable, and $$( is $(."""
    for name, value in environment.items():
        word = word.replace(f"$({name})", value)
    assert "$(" not in word.replace("$$(", "")
    return word.replace("$$(", "$(")


@pytest.mark.parametrize("name", ["7b-stdlib-574187f", "é" * 5, "x" * 200 + "-y", "A_b.c"])
def test_any_name_of_a_run_makes_a_name_that_kubernetes_takes(name, printed):
    found = yaml.safe_load(printed("k8s", "model=7b", f"name='{name}'"))["metadata"]["name"]
    assert found.strip("-") == found and found[0].isalpha() and found.isascii() and found == found.lower()
    assert len(f"{found}-node-0-10000-abcde") <= 63  # a pod's, which is a label


def test_a_hostfile_is_read_by_us_and_by_deepspeed(printed, tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    (tmp_path / "hosts").write_text(printed("hostfile", "model=7b", "parallel.pp=4", "parallel.dp=3", gpus="4"))
    assert (
        slots_of(tmp_path / "hosts")
        == fetch_hostfile(tmp_path / "hosts")
        == dict.fromkeys(("node1", "node2", "node3"), 4)
    )
    (tmp_path / "hosts").write_text(printed("hostfile", "model=7b", "parallel.pp=2", "parallel.dp=1"))
    assert slots_of(tmp_path / "hosts") == {"node1": 2}  # fewer than a node has


def test_what_cannot_be_printed_is_said_and_what_should_be_known(capsys):
    given = ["launch", "--print", "slurm", "model=67b", "parallel.pp=5", "parallel.tp=2"]
    assert cli.main([*given, "--gpus-per-node", "8", "train.seq_len=0"]) == 2
    said = capsys.readouterr().err
    assert "--gpus-per-node=8: the 10 ranks of dp1 x pp5 x tp2" in said and "; 10 or 5 or 2 would work" in said
    assert "train.seq_len=0" in said
    assert cli.main([*given, "--gpus-per-node=0"]) == 2
    assert "--gpus-per-node=0: must be at least 1; 8 would work" in capsys.readouterr().err
    assert cli.main([*given, "--gpus-per-node=5"]) == 0
    said = capsys.readouterr().err
    assert "parallel.dp=null: printed for one replica of dp1 x pp5 x tp2" in said
    assert "parallel.tp=2: 5 processes on each machine split some tensor-parallel groups" in said
    assert cli.main([*given, "--hostfile=hosts"]) == 2
    assert "--hostfile=hosts --print=slurm: " in capsys.readouterr().err
