"""What a process sets before it touches a device, and keeps off the terminal."""

import contextlib
import io
import logging
import math
import os
import resource
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from datetime import timedelta

import torch

from model.problems import BadInput

TIMEOUT_MINUTES = "DEEPNARROW_TIMEOUT_MINUTES"
"""Environment variable: how long ranks wait for one that does not come or does not answer, 10 minutes without it. All
of them must have the same. Only what reads or writes a whole checkpoint may take longer."""

_GPU_DEFAULTS = {
    # Streams that share a hardware queue wait for each other: a rank has one for computing and one for each group.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # A message is a small kernel that others wait for; it should not stand behind a matrix product.
    "TORCH_NCCL_HIGH_PRIORITY": "1",
    # Memory that is given back in parts is not given back with a wait for the whole device.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


def name_accelerator(environment: MutableMapping[str, str]) -> None:
    """Say in an environment that DeepSpeed is to run on the CPU, where there is nothing else: unasked, it warns."""
    if not torch.accelerator.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")


def prepare_gpu_environment(environment: MutableMapping[str, str]) -> None:
    """Set what CUDA, NCCL and PyTorch's allocator read once, before they are used; what is set already stays."""
    for key, value in _GPU_DEFAULTS.items():
        if key == "PYTORCH_ALLOC_CONF" and "PYTORCH_CUDA_ALLOC_CONF" in environment:  # its older name
            continue
        environment.setdefault(key, value)


def problems(environment: Mapping[str, str], pp: int) -> list[str]:
    """Name variables under which a run on GPUs would hang, or wait where it need not, each with what would work.

    Args:
        environment: of the ranks.
        pp: ranks of a pipeline.
    """
    found = []
    if environment.get("NCCL_LAUNCH_ORDER_IMPLICIT") == "1":
        found.append(
            "NCCL_LAUNCH_ORDER_IMPLICIT=1: has messages of different groups wait for each other, which a pipeline does "
            "not survive; unset it"
        )
    if pp > 1 and environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        found.append(
            "CUDA_DEVICE_MAX_CONNECTIONS=1: all streams of a GPU share one queue, in which a pipeline waits behind its "
            f"own messages (parallel.pp={pp}); unset it, or 8 to 32 would work"
        )
    return found


def timeout() -> timedelta:
    """Read how long ranks wait for each other.

    Raises:
        BadInput: the variable holds no time.
    """
    said = os.environ.get(TIMEOUT_MINUTES, "10")
    try:
        minutes = float(said)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= 24 * 60:
        raise BadInput([f"{TIMEOUT_MINUTES}={said}: not a number of minutes up to a day; 10 would work"])
    return timedelta(minutes=minutes)


def file_limit_problem(processes: int) -> str | None:
    """Say that this system lets a process open too few files for a run, and what would do; None where it does not.

    Args:
        processes: of the run. Each group over Gloo has a socket to every process.
    """
    hard, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[1], _files(processes)
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return None
    return f"ulimit -n {hard}: {processes} processes need {needed} open files each; ulimit -Hn {needed} would work"


def raise_file_limit(processes: int) -> None:
    """Let this process open as many files as a run needs, where the system allows that.

    Args:
        processes: of the run.

    Raises:
        RuntimeError: it does not; says how many would do.
    """
    if problem := file_limit_problem(processes):
        raise RuntimeError(problem)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _files(processes):
        resource.setrlimit(resource.RLIMIT_NOFILE, (_files(processes), hard))


def _files(processes: int) -> int:
    return 4 * processes + 256  # two groups over Gloo, the store twice, and what a process has open anyway


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's prints and log lines, dozens per rank at start, off the terminal; errors pass."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
