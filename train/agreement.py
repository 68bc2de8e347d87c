"""Collectives over the CPU, by which ranks agree between steps; they are small, and no device has to stop for them."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel.environment import timeout

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a rank waits for another that is writing or reading a large checkpoint; one that dies ends all at once."""


def control_group() -> dist.ProcessGroup:
    """Make a Gloo group of all ranks, for what takes seconds. All ranks call it together."""
    return dist.new_group(backend="gloo", timeout=timeout())


def checkpoint_group() -> dist.ProcessGroup:
    """Make a Gloo group of all ranks in which one waits for hours, while others read or save or rank 0 asks tasks.

    All ranks call it together. A thread that saves needs one that no other uses meanwhile.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def max_over_ranks(values: Sequence[float], group: dist.ProcessGroup) -> list[float]:
    """All-reduce the largest of each value over all ranks. All ranks call it together, with equally many values."""
    most = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return most.tolist()


def on_rank_0(value: T, group: dist.ProcessGroup) -> list[T]:
    """Gather a value of every rank on rank 0; elsewhere the list is empty. All ranks call it together."""
    of_all: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object(value, of_all, dst=0, group=group)
    return of_all or []


def from_rank_0(value: T, group: dist.ProcessGroup) -> T:
    """Broadcast the value of rank 0. All ranks call it together."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
