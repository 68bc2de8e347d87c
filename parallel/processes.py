"""A process among the others of its host: how many there are, a free port, and an end with its supervisor's."""

import os
import select
import signal
import socket
import threading

import torch


def local_processes() -> int | None:
    """Processes that a launcher has started on this host; None without one."""
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    return int(local) if local else None


def use_cpus_fairly(device: torch.device) -> None:
    """On the CPU, share the cores among the processes of this host, unless OMP_NUM_THREADS says otherwise."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (local_processes() or 1)))


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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
