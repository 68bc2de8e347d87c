"""A rank as the first of a host of its own, or under a launcher that sets no RANK: a main of `tests.ranks`."""

import os
import sys
from pathlib import Path

LAUNCHERS = {
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


def main(kind: str, *arguments: str) -> None:
    """Play a kind of start, then the entry of training.

    Args:
        kind: a launcher of `LAUNCHERS`, or ``hosts=FOLDER``: this rank's home is FOLDER/RANK.
        arguments: of the entry; ``{rank}`` in one of them is this rank's number.
    """
    rank = os.environ["RANK"]
    if kind.startswith("hosts="):
        home = Path(kind.partition("=")[2]) / rank
        os.environ.update(HOME=str(home), LOCAL_RANK="0", LOCAL_SIZE="1")
    else:
        for theirs, ours in zip(LAUNCHERS[kind], ("RANK", "WORLD_SIZE", "LOCAL_RANK"), strict=True):
            os.environ[theirs] = os.environ.pop(ours)
        del os.environ["LOCAL_SIZE"]
    from train import pretrain

    pretrain.main([argument.replace("{rank}", rank) for argument in arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
