"""``deepnarrow scaling --print slurm``: the runs that are to be trained next as a job array, a task for each."""

import os
import re
import shlex
import sys
from collections.abc import Sequence

from launch.cluster.printed import GPUS_PER_NODE, SECONDS_TO_SAVE, ClusterJob, job_of, shell_words, waiting
from launch.trainings.train_all import Training
from model.problems import BadInput


def as_array(name: str, trainings: Sequence[Training], gpus_per_node: int | None, again: str) -> tuple[str, list[str]]:
    """Write an sbatch script of a job array, each task of which takes whole nodes.

    Args:
        name: of the study.
        trainings: its runs, which have one layout.
        gpus_per_node: GPUs of a node; None for `launch.cluster.printed.GPUS_PER_NODE`.
        again: what to do once all have run, a sentence.

    Returns:
        The script, and what the user should know of its runs, a sentence each.

    Raises:
        BadInput: with every problem of every run.
    """
    jobs, problems = list[ClusterJob](), list[str]()
    for training in trainings:
        try:
            jobs.append(job_of(training.arguments, gpus_per_node))
        except BadInput as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise BadInput(problems)
    nodes, slots = jobs[0].nodes, jobs[0].slots
    said = list(dict.fromkeys(sentence for job in jobs for sentence in job.said))
    gpus = GPUS_PER_NODE if gpus_per_node is None else gpus_per_node
    if slots < gpus:
        said.append(
            f"each run takes {slots} of the {gpus} GPUs of a node, which it has for itself: runs that share one "
            "might take the same GPU (one machine with all its GPUs, without --print, runs several at a time)"
        )
    label = re.sub(r"[^\w.-]", "-", name)
    cases = "\n".join(
        f"{at}) overrides=({' '.join(map(shlex.quote, training.arguments))}) ;;"
        for at, training in enumerate(trainings)
    )
    command = shell_words([sys.executable, "-m", "deepnarrow", "launch", "--gpus-per-node", str(slots)])
    script = f"""#!/bin/bash
# {len(jobs)} runs of a scaling study, each a task on {nodes} x {slots} GPUs. What this cluster wants besides stands in
# front of the file, and how many may run at a time in --array:
#   sbatch --partition=gpu --account=mine --time=4:00:00 --array=0-{len(jobs) - 1}%8 FILE
# {SECONDS_TO_SAVE} s before its time limit a run saves and ends, and is queued again and goes on from there.
# {again}
#SBATCH --job-name={label}
#SBATCH --array=0-{len(jobs) - 1}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={slots}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={label}-%A_%a.txt
#SBATCH --signal=B:USR1@{SECONDS_TO_SAVE}

cd {shlex.quote(os.getcwd())} || exit 1
case $SLURM_ARRAY_TASK_ID in
{cases}
*) echo "no run has the number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
{waiting(command + ' "${overrides[@]}"')}"""
    return script, said
