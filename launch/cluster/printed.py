"""``deepnarrow launch --print``: the same run as an sbatch script, as a Kubernetes JobSet, or as a hostfile.

JobSet (kubernetes-sigs/jobset) and not Kubeflow's PyTorchJob: it is what is maintained, and what Kubeflow's own trainer
makes of its jobs since its second version.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from conf.validate import Machine, validate, warnings
from launch.cluster import slurm
from model.problems import BadInput
from train.like import take_over
from train.uptrain import compose_with_source

GPUS_PER_NODE = 8
"""Of a node, where nobody says."""
SECONDS_TO_SAVE = 300
"""Before the time limit of a job at which it is told to save and end."""
IMAGE_ROOT = "/opt/deepnarrow"
"""Where the Dockerfile puts the code."""
_SHARED = "/shared"
_PORT = 29500


@dataclass(frozen=True)
class ClusterJob:
    """A run as a cluster is asked for it.

    Attributes:
        name: of the run.
        nodes: how many.
        slots: ranks, and so GPUs, of each.
        overrides: of the run, with the options of where they are composed from.
        restarts: within a job, after which it has failed.
        said: what the user should know of how these came about, one sentence each.
    """

    name: str
    nodes: int
    slots: int
    overrides: Sequence[str]
    restarts: int
    said: Sequence[str] = ()


def job_of(overrides: Sequence[str], gpus_per_node: int | None) -> ClusterJob:
    """Compose a run and work out the nodes that its layout needs.

    Args:
        overrides: of the run.
        gpus_per_node: GPUs of each node; None for `GPUS_PER_NODE`.

    Raises:
        BadInput: with every problem of the configuration, or where the ranks do not fill whole nodes.
    """
    composition, _, _ = compose_with_source(take_over(overrides), checked=False)
    config = composition.config
    layout, problems = validate(config, Machine(gpus=0, elsewhere=True))
    gpus = GPUS_PER_NODE if gpus_per_node is None else gpus_per_node
    if gpus < 1:
        problems.append(f"--gpus-per-node={gpus}: must be at least 1; {GPUS_PER_NODE} would work")
    elif layout and layout.world_size > gpus and layout.world_size % gpus:
        ranks = layout.world_size
        works = " or ".join(str(n) for n in range(min(ranks, 2 * gpus), 1, -1) if ranks % n == 0)
        problems.append(
            f"--gpus-per-node={gpus}: the {ranks} ranks of {layout} do not fill nodes of {gpus}; "
            + (f"{works} would work" if works else f"a layout of a multiple of {gpus} ranks would work")
        )
    if problems := composition.all_problems(problems):
        raise BadInput(problems)
    assert layout is not None
    slots = min(gpus, layout.world_size)
    said = warnings(config, layout, Machine(gpus=0, local_processes=slots, elsewhere=True))
    nodes = layout.world_size // slots
    if config.parallel.dp is None:
        said.append(f"parallel.dp=null: printed for one replica of {layout}; with parallel.dp=2 it is for two")
    return ClusterJob(config.name, nodes, slots, list(overrides), config.launch.restarts, said)


def as_slurm(job: ClusterJob) -> str:
    """Write an sbatch script, which starts the job again where its time was too short for the run."""
    command = [sys.executable, "-m", "deepnarrow", "launch", "--gpus-per-node", str(job.slots), *job.overrides]
    name = re.sub(r"[^\w.-]", "-", job.name)
    return f"""#!/bin/bash
# A run of deepnarrow on {job.nodes} x {job.slots} GPUs. What this cluster wants besides stands in front of the file:
#   sbatch --partition=gpu --account=mine --time=24:00:00 FILE
# {SECONDS_TO_SAVE} s before the time limit the run saves and ends, and the job is queued again and goes on from there.
# So it does after a node has failed. `scancel --batch --signal=USR1 JOB` saves and queues it again as well, TERM in
# place of USR1 saves and ends it; `scancel JOB` ends it with what was saved last.
#SBATCH --job-name={name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.slots}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.txt
#SBATCH --signal=B:USR1@{SECONDS_TO_SAVE}

cd {shlex.quote(os.getcwd())} || exit 1
{waiting(shell_words(command))}"""


def waiting(command: str) -> str:
    """Write the lines of an sbatch script that run a command, pass signals on, and queue the job again after USR1.

    Args:
        command: for the shell.
    """
    return f"""again=
{command} &
run=$!
trap 'again=1 told=1; kill -USR1 $run' USR1
trap 'told=1; kill -TERM $run' TERM
told=1
while [ -n "$told" ]; do  # a trap ends `wait` before the run has ended
    told=
    wait $run; code=$?
done
if [ -n "$again" ] && [ $code -eq 0 ]; then
    # of an array the task alone: the array's own number would queue all of its tasks again
    job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
    scontrol requeue "${{job:-$SLURM_JOB_ID}}"  # where the run is complete by now, it says so and ends
fi
exit $code
"""


def as_kubernetes(job: ClusterJob) -> str:
    """Write a JobSet: a pod on each node, torchrun in it, all of them started again together where one fails."""
    name = (re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-") or "run")[:40].rstrip("-")
    if not name[0].isalpha():  # it is the name of a service, too
        name = f"run-{name}"
    torchrun = [
        *["torchrun", f"--nnodes={job.nodes}", f"--nproc-per-node={job.slots}", "--node-rank=$(JOB_COMPLETION_INDEX)"],
        *["--master-addr=$(MASTER_ADDR)", "--master-port=$(MASTER_PORT)", f"{IMAGE_ROOT}/train/pretrain.py"],
        *[word.replace("$(", "$$(") for word in job.overrides],  # else Kubernetes would read it as a variable
    ]
    container = {
        "name": "ranks",
        "image": "deepnarrow",
        "command": torchrun,
        "workingDir": _SHARED,
        "env": [
            {"name": "MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
            {"name": "MASTER_PORT", "value": str(_PORT)},
            {"name": "DEEPNARROW_CACHE", "value": f"{_SHARED}/cache"},
        ],
        "ports": [{"containerPort": _PORT}],
        "resources": {"limits": {"nvidia.com/gpu": job.slots}},
        "volumeMounts": [{"name": "shared", "mountPath": _SHARED}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 60,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": "deepnarrow"}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    one_a_node = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [_other_pods(name)]}}
    spec = {"parallelism": job.nodes, "completions": job.nodes, "backoffLimit": 0, "completionMode": "Indexed"}
    manifest: dict[str, Any] = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": {"maxRestarts": job.restarts},
            "replicatedJobs": [
                {"name": "node", "template": {"spec": {**spec, "template": {"spec": {**pod, "affinity": one_a_node}}}}}
            ],
        },
    }
    return f"""# A run of deepnarrow on {job.nodes} x {job.slots} GPUs, for clusters with JobSet (kubernetes-sigs).
# Yours to replace: the image, as the Dockerfile builds it, and the claim, a volume that all nodes write, on which run
# folder, prepared corpus and relative paths lie. Whatever a pod fails with, all are started again and go on from the
# newest sound checkpoint, {job.restarts} times at most (launch.restarts); `kubectl logs` of any pod says why.
{yaml.safe_dump(manifest, sort_keys=False, width=10_000, allow_unicode=True)}"""


def as_hostfile(job: ClusterJob) -> str:
    """Write a hostfile: the nodes of this allocation of Slurm's, or else names to replace."""
    names: Sequence[str] = [f"node{number}" for number in range(1, job.nodes + 1)]
    if slurm.is_allocation(os.environ):
        names = [*slurm.slots_of_allocation(os.environ, job.slots)][: job.nodes]
        if len(names) < job.nodes:
            works = f"sbatch --nodes={job.nodes} would work"
            raise BadInput([f"SLURM_JOB_NODELIST: has {len(names)} nodes, and the layout needs {job.nodes}; {works}"])
    return "".join(f"{name} slots={job.slots}\n" for name in names)


KINDS: dict[str, Callable[[ClusterJob], str]] = {"slurm": as_slurm, "k8s": as_kubernetes, "hostfile": as_hostfile}


def _other_pods(name: str) -> dict[str, Any]:
    of_this_run = {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": name}}
    return {"labelSelector": of_this_run, "topologyKey": "kubernetes.io/hostname"}


def shell_words(command: Sequence[str]) -> str:
    """Write a command for a shell, in lines of a bearable length."""
    lines = [""]
    for word in map(shlex.quote, command):
        if len(lines[-1]) + len(word) > 100:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
