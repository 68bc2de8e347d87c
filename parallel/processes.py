"""What a process knows of the others on its host, by the environment that a launcher sets."""

import os

import torch


def local_processes() -> int | None:
    """Processes that a launcher has started on this host; None without one."""
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    return int(local) if local else None


def use_cpus_fairly(device: torch.device) -> None:
    """On the CPU, share the cores among the processes of this host, unless OMP_NUM_THREADS says otherwise."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (local_processes() or 1)))
