"""A rank as the first of a host of its own, or under a launcher that sets no RANK: a main of `tests.ranks`."""

import os
import socket
import sys
import time
from pathlib import Path

LAUNCHERS = {
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


def main(kind: str, *arguments: str) -> None:
    """Play a kind of start, then the entry of training.

    Args:
        kind: a launcher of `LAUNCHERS`, or ``hosts=FOLDER``: this rank's home is FOLDER/RANK, or ``others=FOLDER``:
            that is its working directory as well, and what rank 0's host has the others have otherwise.
        arguments: of the entry; ``{rank}`` in one of them is this rank's number.
    """
    rank = os.environ["RANK"]
    if kind.startswith(("hosts=", "others=")):
        home = Path(kind.partition("=")[2]) / rank
        os.environ.update(HOME=str(home), LOCAL_RANK="0", LOCAL_SIZE="1")
        if kind.startswith("others="):
            os.chdir(home)
        if kind.startswith("others=") and rank != "0":
            be_another()
    else:
        for theirs, ours in zip(LAUNCHERS[kind], ("RANK", "WORLD_SIZE", "LOCAL_RANK"), strict=True):
            os.environ[theirs] = os.environ.pop(ours)
        del os.environ["LOCAL_SIZE"]
    from train import pretrain

    pretrain.main([argument.replace("{rank}", rank) for argument in arguments])


def be_another() -> None:
    """Have another name, code, PyTorch, limit of open files and interface than the first host, and a late clock."""
    import resource

    import torch

    from train import hosts, version

    now = time.time
    time.time = lambda: now() - 100
    socket.gethostname = lambda: "node1"
    torch.__version__ = "2.0.0"
    version.__file__ = str(Path.cwd() / "train" / "version.py")
    resource.setrlimit(resource.RLIMIT_NOFILE, (260, 260))
    os.environ["GLOO_SOCKET_IFNAME"] = "ib7"
    hosts.PATIENCE = 0.5


if __name__ == "__main__":
    main(*sys.argv[1:])
