#!/bin/bash
# Tokenises the corpus of train.sh on nodes without GPUs, which share the work through DEEPNARROW_CACHE. A node that
# fails costs what it had under way: the same job again does what is left.
#SBATCH --job-name=7b-corpus-prepare
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=7b-corpus-prepare-%j.txt
#SBATCH --partition=cpu
#SBATCH --account=mine
#SBATCH --time=04:00:00

export DEEPNARROW_CACHE=/shared/cache

cd /shared/deepnarrow || exit 1
srun --cpu-bind=none /shared/deepnarrow/.venv/bin/python -m deepnarrow prepare model=7b parallel.pp=4 \
    parallel.dp=8 data=files 'data.path=/shared/corpus/*.jsonl.zst' name=7b-corpus
