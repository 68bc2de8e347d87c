"""What ranks tell each other between steps; small, over the CPU, so that no device has to stop for it."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a rank waits for another that is writing or reading a large checkpoint; one that dies ends all at once."""


def control_group() -> dist.ProcessGroup:
    """A group of all ranks over the CPU. All ranks call it together; what runs in another thread needs its own."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def max_over_ranks(values: Sequence[float], group: dist.ProcessGroup) -> list[float]:
    """The largest of each value over all ranks, on every rank. All ranks call it together, with equally many."""
    most = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return most.tolist()


def from_rank_0(value: T, group: dist.ProcessGroup) -> T:
    """What rank 0 has, on every rank. All ranks call it together."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
