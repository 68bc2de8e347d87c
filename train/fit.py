"""Whether a run fits the GPUs that it is started on, by the plan's memory, before a process is spawned."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from shutil import which

from conf.schema import Config
from parallel.layout import Recompute
from parallel.memory import Memory
from parallel.plan.cluster import Cluster
from parallel.plan.job import Job
from parallel.plan.search import fullest
from train.job import job_of

_GIB = 2**30
_PIECES = 8
"""The pieces of the logits that are suggested where the head takes the most."""
FORMULA_ERROR = 0.05
"""The share by which the formula of `parallel/memory.py` may be off (`tests/parallel/test_memory.py`)."""


def judged(config: Config, num_processes: int, gpu_bytes: int | None) -> tuple[list[str], list[str]]:
    """Judge whether a run fits its GPUs: problems and warnings, a sentence each.

    What needs more than the GPU has, even if the formula counts too much, is a problem, or with ``launch.force=true`` a
    warning; what needs more than a plan would fill is a warning.

    Args:
        config: of the run, sound.
        num_processes: the ranks of the run.
        gpu_bytes: the memory of the smallest GPU that is seen; None where none is.
    """
    if gpu_bytes is None:
        return [], []
    job = job_of(config, num_processes=num_processes)
    rank, memory = fullest(job)
    room = gpu_bytes - Cluster().reserved_gib * _GIB
    if memory.peak <= room:
        return [], []
    said = sentence(job, rank, memory, gpu_bytes, room)
    if memory.peak * (1 - FORMULA_ERROR) <= gpu_bytes:
        return [], [f"{said} (the plan may be off by {FORMULA_ERROR:.0%}: it is tried)"]
    if config.launch.force:
        return [], [f"{said} (launch.force=true: it is tried)"]
    return [f"{said}; launch.force=true tries it all the same"], []


def sentence(job: Job, rank: int, memory: Memory, gpu_bytes: float, room: float) -> str:
    """Say that a rank needs more than its GPU has, what fills it, and what would fit."""
    parts = {
        "weights, gradients and optimizer": memory.state,
        "activations": memory.activations,
        "workspace": memory.workspace,
    }
    filled = ", ".join(f"{size / _GIB:.1f} {name}" for name, size in parts.items())
    works = next((text for text, other in changes(job) if fullest(other)[1].peak <= room), None)
    would = f"{works} would fit" if works else "more stages (parallel.pp) or tensor-parallel ranks (parallel.tp) would"
    return (
        f"parallel.pp={job.layout.pp} parallel.tp={job.layout.tp}: rank {rank} of a pipeline needs "
        f"{memory.peak / _GIB:.1f} GiB ({filled}) and has a GPU of {gpu_bytes / _GIB:.1f} GiB, of which about "
        f"{(gpu_bytes - room) / _GIB:.0f} are CUDA's, NCCL's and the allocator's; {would}"
    )


def changes(job: Job) -> Iterator[tuple[str, Job]]:
    """Yield changes that need less memory, as overrides, by how much time they cost: recomputation, then the batch."""
    ways = list(Recompute)
    batches = [job.settings.micro_batch, 1] if job.settings.micro_batch > 1 else [1]
    for micro_batch in batches:
        for pieces in sorted({job.settings.head_pieces, max(job.settings.head_pieces, _PIECES)}):
            for recompute in ways[ways.index(job.settings.recompute) :]:
                more = job.settings.accumulation * job.settings.micro_batch // micro_batch
                settings = replace(job.settings, micro_batch=micro_batch, accumulation=more, recompute=recompute,
                                   head_pieces=pieces)  # fmt: skip
                if settings == job.settings:
                    continue
                said = [f"parallel.recompute={recompute.name}"] * (recompute is not job.settings.recompute)
                said += [f"parallel.head_pieces={pieces}"] * (pieces != job.settings.head_pieces)
                said += [f"train.micro_batch={micro_batch}"] * (micro_batch != job.settings.micro_batch)
                yield " ".join(said), replace(job, settings=settings)


def smallest_gpu_bytes(visible: int) -> int | None:
    """Return the memory that the smallest of so many GPUs of this machine has; None where nothing tells.

    PyTorch would make a context on each GPU that it is asked about, which a launcher should not hold, and nvidia-smi
    tells of all GPUs, in an order of its own. Where fewer are visible, they are taken to be the largest: a run that
    might fit is not refused.

    Args:
        visible: how many GPUs there are by CUDA_VISIBLE_DEVICES.
    """
    if not visible or not (tool := which("nvidia-smi")):
        return None
    asked = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
        return sorted(int(line) for line in said.split())[-visible:][0] * 2**20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None
