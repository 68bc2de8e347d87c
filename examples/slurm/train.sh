#!/bin/bash
# A run of deepnarrow on 4 x 8 GPUs. What this cluster wants besides stands below, as partition, account and time.
# 300 s before the time limit the run saves and ends, and the job is queued again and goes on from there.
# So it does after a node has failed. `scancel --batch --signal=USR1 JOB` saves and queues it again as well, TERM in
# place of USR1 saves and ends it; `scancel JOB` ends it with what was saved last.
#SBATCH --job-name=7b-corpus
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=7b-corpus-%j.txt
#SBATCH --signal=B:USR1@300
#SBATCH --partition=gpu
#SBATCH --account=mine
#SBATCH --time=24:00:00

# A file system that all nodes see holds the code, the corpus, what is prepared of it, and the run folder.
export DEEPNARROW_CACHE=/shared/cache
# The network between the nodes, by the name that `ip link` shows there.
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

cd /shared/deepnarrow || exit 1
again=
/shared/deepnarrow/.venv/bin/python -m deepnarrow launch --gpus-per-node 8 model=7b parallel.pp=4 \
    parallel.dp=8 data=files 'data.path=/shared/corpus/*.jsonl.zst' name=7b-corpus &
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
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    scontrol requeue "${job:-$SLURM_JOB_ID}"  # where the run is complete by now, it says so and ends
fi
exit $code
