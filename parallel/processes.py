"""A process among others: what its launcher says of them, a free port, and an end with its supervisor's."""

import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from model.problems import BadInput

OF_A_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("CROSS_RANK", "CROSS_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
)
"""Environment variables by which torchrun and DeepSpeed's launcher tell a process its place."""
_KERNELS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT, _SLURM_PORT = 10000, 29500


@dataclass(frozen=True)
class _Names:
    """The variables of a launcher that sets no RANK; an empty name for what it does not say."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_OTHERS = (
    # A launcher that itself was started by Slurm leaves Slurm's variables of that to its processes: Slurm comes last.
    _Names(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),  # Open MPI
    _Names(*(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),  # MVAPICH2
    _Names(*(f"JSM_NAMESPACE_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),  # jsrun
    _Names("PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),  # Cray
    _Names("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    _Names("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
    _Names("PMIX_RANK", "", "PMIX_LOCAL_RANK", ""),
)


def read_launcher(environment: MutableMapping[str, str]) -> bool:
    """Read this process's place from what a launcher has set, and set RANK and the like where it has not.

    Args:
        environment: of this process; what the launcher left out and others need is added.

    Returns:
        Whether there is a launcher: one that has started this process alone and sets no RANK is none.

    Raises:
        BadInput: it leaves out what has to be known, or what it says cannot be.
    """
    if "RANK" not in environment and not _translate(environment):
        return False
    if environment.get("WORLD_SIZE") == "1":
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(free_port()))
    missing = [key for key in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(key)]
    numbers = {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if key in environment}
    problems = [f"{key}={value}: not a number from 0 up" for key, value in numbers.items() if not value.isdecimal()]
    if missing:
        works = "a launcher that sets them, such as torchrun, or unset RANK for a run of one process, would work"
        problems.append(f"RANK={environment['RANK']}: {', '.join(missing)} not set; {works}")
    elif not problems and int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        problems.append(f"RANK={environment['RANK']}: not below WORLD_SIZE={environment['WORLD_SIZE']}")
    if "LOCAL_RANK" not in environment and torch.cuda.is_available() and environment.get("WORLD_SIZE") != "1":
        problems.append("LOCAL_RANK: not set, and it says which GPU is this process's; one from 0 up on each host "
                        "would work")  # fmt: skip
    if problems:
        raise BadInput(problems)
    return True


def started_by_launcher(environment: MutableMapping[str, str]) -> bool:
    """Tell whether a launcher has started this process, for a command that may be one of several ranks.

    What is left over of a launcher that started something else is removed.

    Raises:
        BadInput: one has, and does not say enough.
    """
    if "RANK" in environment and not says_all(environment):
        forget_launcher(environment)
    launched = read_launcher(environment)
    if not launched:
        forget_launcher(environment)
    return launched


def forget_launcher(environment: MutableMapping[str, str]) -> None:
    """Remove a launcher's variables, for a command that starts its processes itself: they are another run's."""
    for key in OF_A_LAUNCHER:
        environment.pop(key, None)


def a_later_rank(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher has started this process as another rank than 0; a RANK left over alone tells nothing."""
    return says_all(environment) and environment["RANK"] != "0"


def says_all(environment: Mapping[str, str]) -> bool:
    """Tell whether an environment has all that a launcher sets by PyTorch's names."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()


def _translate(environment: MutableMapping[str, str]) -> bool:
    """Say what another launcher's variables say by PyTorch's names; whether it has started several processes."""
    for names in _OTHERS:
        rank, size = environment.get(names.rank), environment.get(names.size) if names.size else None
        if not rank or (size is None and rank == "0") or size == "1":
            continue
        if size is None:
            raise BadInput([f"{names.rank}={rank}: a launcher has started this process and does not say how many there "
                            f"are; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT would"])  # fmt: skip
        found = {"RANK": rank, "WORLD_SIZE": size}
        if local_rank := environment.get(names.local_rank):
            found["LOCAL_RANK"] = local_rank
        slurm = names.rank == "SLURM_PROCID"
        local_size = _tasks_here(environment) if slurm else environment.get(names.local_size)
        if local_size:
            found["LOCAL_SIZE"] = local_size
        one_host = local_size == size or (slurm and environment.get("SLURM_NNODES") == "1")
        address = environment.get("MASTER_ADDR") or _first_host(environment, slurm, one_host)
        if address is None:
            works = "MASTER_ADDR=HOST, where rank 0 runs, and a free MASTER_PORT on all processes would work"
            raise BadInput([f"{names.rank}={rank} {names.size}={size}: a launcher has started {size} processes, and "
                            f"MASTER_ADDR is not set; {works}"])  # fmt: skip
        job = environment.get("SLURM_JOB_ID", "0")
        # Jobs of one host each have their own, below those that Linux hands to connections (32768 and up).
        port = str(_SLURM_PORT + (int(job) % 3000 if job.isdecimal() else 0))
        environment.update({**found, "MASTER_ADDR": address, "MASTER_PORT": environment.get("MASTER_PORT") or port})
        return True
    return False


def _tasks_here(environment: Mapping[str, str]) -> str | None:
    """Read how many processes Slurm has started on this host, from lists such as ``4(x2),3``."""
    said = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[str] = []
    for part in said.split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [match[1]] * int(match[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _first_host(environment: Mapping[str, str], slurm: bool, all_here: bool) -> str | None:
    """Find the host of rank 0; None where nothing says it."""
    if all_here:
        return "127.0.0.1"
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not slurm or not nodes:
        return None
    if "[" not in nodes:
        return nodes.partition(",")[0]
    if scontrol := shutil.which("scontrol"):
        said = subprocess.run([scontrol, "show", "hostnames", nodes], capture_output=True, text=True).stdout.split()
        return said[0] if said else None
    return None


def local_processes() -> int | None:
    """Processes that a launcher has started on this host; None without one."""
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    return int(local) if local else None


def use_cpus_fairly(device: torch.device) -> None:
    """On the CPU, share the cores among the processes of this host, unless OMP_NUM_THREADS says otherwise."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (local_processes() or 1)))


def free_port() -> int:
    """A TCP port of this machine that nothing listens on, nor will before it is used.

    It is used seconds later, once other processes have imported what they need. Of those that the kernel hands out, it
    would give the same to any connection in the meantime; those below are for who asks by number, and one is drawn at
    random, so that two that ask at the same time have different ones. Where the kernel leaves no thousand of them, it
    is one of its own after all.
    """
    draw = random.SystemRandom()  # the seed of a run is for its data
    below = _first_of_kernel()
    for _ in range(100 if below - _FIRST_PORT >= 1000 else 0):
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port := draw.randrange(_FIRST_PORT, min(below, _SLURM_PORT))))
            return port
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _first_of_kernel() -> int:
    """The lowest port that the kernel hands out to connections by itself."""
    with suppress(OSError, ValueError):
        return int(_KERNELS.read_text().split()[0])
    return 49152  # IANA's, as macOS and the BSDs have it


SUPERVISOR = "DEEPNARROW_SUPERVISOR"
"""Environment variable: the process that started the launcher and must not be outlived."""


def die_with(supervisor: str | None) -> None:
    """End this process's whole group once the process with this id is gone, killed without a word perhaps.

    The launcher passes no death on to its ranks; each watches by itself. Does nothing where the system has no pidfd.
    """
    if supervisor is None or not hasattr(os, "pidfd_open"):
        return

    def watch(fd: int) -> None:
        select.select([fd], [], [])
        os.killpg(os.getpgrp(), signal.SIGKILL)

    try:
        fd = os.pidfd_open(int(supervisor))
    except ProcessLookupError:
        raise SystemExit(1) from None
    threading.Thread(target=watch, args=(fd,), daemon=True, name="die-with-supervisor").start()
