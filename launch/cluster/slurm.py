"""The nodes of a Slurm allocation: their names, how many ranks each takes, and a task of srun's on one of them.

`deepnarrow launch` runs once, in the batch script on the first node. Its agents are steps of one task each: no ssh, and
whatever a node has of the allocation belongs to its agent.
"""

import shutil
import subprocess
from collections.abc import Mapping

from model.problems import BadInput


def is_allocation(environment: Mapping[str, str]) -> bool:
    """Tell whether this process runs in an allocation of Slurm's."""
    return bool(environment.get("SLURM_JOB_ID") and environment.get("SLURM_JOB_NODELIST"))


def slots_of_allocation(environment: Mapping[str, str], gpus_per_node: int | None) -> dict[str, int]:
    """Return the ranks of each node of an allocation, by name, in Slurm's order.

    Args:
        environment: of this process, with Slurm's variables.
        gpus_per_node: ranks of each node; None for as many as Slurm has given GPUs.

    Raises:
        BadInput: srun has started this command several times, or the nodes or their GPUs cannot be known.
    """
    problems = []
    if (tasks := environment.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
        problems.append(
            f"SLURM_STEP_NUM_TASKS={tasks}: srun has started this command {tasks} times, and it starts a task on each "
            "node itself; the same without srun, once in the batch script, would work"
        )
    given = environment.get("SLURM_GPUS_ON_NODE", "")
    slots = gpus_per_node or (int(given) if given.isdecimal() else 0)
    if slots < 1:
        problems.append(
            f"SLURM_GPUS_ON_NODE={given or '(not set)'}: Slurm has given this job no GPUs, and the ranks of a node are "
            "not known; #SBATCH --gpus-per-node=8, or --gpus-per-node 8 behind `deepnarrow launch`, would work"
        )
    if problems:
        raise BadInput(problems)
    return dict.fromkeys(_hostnames(environment["SLURM_JOB_NODELIST"]), slots)


def over_srun(name: str, command: list[str]) -> list[str]:
    """Write the command that runs another one as one task on a node of this allocation.

    Without ``--overlap`` a second step, such as one that looks at the run, would wait for the end of this one; without
    ``--cpu-bind=none`` all ranks of the node would share the core that one task gets.
    """
    where = ["--nodes=1", "--ntasks=1", f"--nodelist={name}"]
    return ["srun", *where, "--overlap", "--cpu-bind=none", "--unbuffered", *command]


def _hostnames(nodes: str) -> list[str]:
    """Spell out a list such as ``gpu[7-9],login1``, which scontrol alone reads."""
    if "[" not in nodes:
        return nodes.split(",")
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        works = "scontrol on the PATH, or --hostfile with a line `HOST slots=N` for each node, would work"
        raise BadInput([f"SLURM_JOB_NODELIST={nodes}: Slurm's scontrol, which spells it out, is not here; {works}"])
    done = subprocess.run([scontrol, "show", "hostnames", nodes], capture_output=True, text=True)
    names = done.stdout.split()
    if done.returncode or not names:
        said = " ".join(done.stderr.split()) or "no names"
        works = "--hostfile with a line `HOST slots=N` for each node would work"
        raise BadInput([f"SLURM_JOB_NODELIST={nodes}: `scontrol show hostnames` says {said}; {works}"])
    return names
