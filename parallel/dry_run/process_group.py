"""A backend of `torch.distributed` on which this process is one rank of a job whose others are not there.

It stands for NCCL: a call returns at once, and what it says is recorded. What others would send is left as it is, which
is nothing on the meta device.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.dry_run.record import Awaited, Record
from parallel.groups import DRY

_current: Record | None = None
"""The record of the rank that this process is, since PyTorch calls the maker of a group without one."""


class _Call(Work):
    """What a call of a group returns; waiting for it is recorded."""

    def __init__(self, record: Record, number: int):
        super().__init__()
        self._record, self._awaited = record, Awaited(record.step, number)

    def wait(self, timeout: Any = None) -> bool:
        """Record that the compute stream waits."""
        self._record.operation(self._awaited)
        return True

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def is_success(self) -> bool:
        """Return True."""
        return True


_ProcessGroup: Any = dist.ProcessGroup  # whose annotations differ between versions of PyTorch


class DryGroup(_ProcessGroup):
    """A process group that records what it is told.

    Args:
        rank: of this process in the group.
        ranks: the global ranks of the group.
        record: where to.
    """

    def __init__(self, rank: int, ranks: Sequence[int], record: Record):
        super().__init__(rank, len(ranks))
        self._rank, self.ranks, self._record = rank, ranks, record

    def size(self) -> int:
        """Return the number of its ranks."""
        return len(self.ranks)

    def rank(self) -> int:
        """Return the rank of this process in it."""
        return self._rank

    def getBackendName(self) -> str:
        """Return the name of the backend."""
        return DRY

    @property
    def group_name(self) -> str:
        """The name that PyTorch knows it by."""
        return dist.distributed_c10d._world.pg_names[self]

    pg_name = group_name

    def _say(self, operation: str, tensor: torch.Tensor | None, how: Any = "", peer: int = -1) -> _Call:
        call = self._record.call(operation, self, tensor, str(how).rpartition(".")[2], peer)
        return _Call(self._record, call.number)

    # The methods have the names and arguments of PyTorch's, old and new.
    def allreduce(self, tensors: Sequence[torch.Tensor], options: Any = None) -> _Call:
        """Record an all-reduce."""
        return self._say("all_reduce", tensors[0], _how(options))

    def broadcast(self, tensors: Sequence[torch.Tensor], options: Any = None) -> _Call:
        """Record a broadcast."""
        return self._say("broadcast", tensors[0])

    def barrier(self, opts: Any = None) -> _Call:
        """Record a barrier."""
        return self._say("barrier", None)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, options: Any = None) -> _Call:
        """Record an all-gather."""
        return self._say("all_gather", output)

    _allgather_base = all_gather_single

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, options: Any = None) -> _Call:
        """Record a reduce-scatter."""
        return self._say("reduce_scatter", input, _how(options))

    _reduce_scatter_base = reduce_scatter_single

    def send(self, tensors: Sequence[torch.Tensor], to: int, tag: int = 0) -> _Call:
        """Record that a message is sent."""
        self._record.passes(tensors)
        return self._say("send", tensors[0], peer=to)

    def recv(self, tensors: Sequence[torch.Tensor], source: int, tag: int = 0) -> _Call:
        """Record that a message is asked for."""
        self._record.passes(tensors)
        return self._say("receive", tensors[0], peer=source)


def _how(options: Any) -> str:
    return str(options.reduceOp.op) if options is not None else ""


def _make(options: Any, more: Any) -> DryGroup:
    assert _current is not None, "a group outside of a dry run"
    ranks = options.global_ranks_in_group or range(options.group_size)
    return DryGroup(options.group_rank, ranks, _current)


def _split_group(parent_pg: Any = None, split_ranks: Any = None, **more: Any) -> Any:
    """Make this rank's group of those that the world is split into; nobody else has to be asked."""
    assert parent_pg is None, "the world is what is split"
    own = next((ranks for ranks in split_ranks if dist.get_rank() in ranks), None)
    return None if own is None else dist.new_group(own, use_local_synchronization=True)


@contextmanager
def one_of_many(rank: int, world_size: int, record: Record) -> Iterator[None]:
    """Within, this process is a rank of a job, which has a process group to itself.

    Args:
        rank: which one.
        world_size: the number of ranks of the job.
        record: of what it says.
    """
    global _current
    assert _current is None and not dist.is_initialized(), "a process is one rank at a time"
    if DRY.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(DRY, _make, extended_api=True, devices=["cpu", "cuda"])
    environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    _current = record
    try:
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(dist, "split_group", _split_group),
            mock.patch.object(sys, "excepthook", sys.excepthook),  # PyTorch puts one that names the rank around it
        ):
            dist.init_process_group(DRY, store=FakeStore(), rank=rank, world_size=world_size)
            try:
                yield
            finally:
                dist.destroy_process_group()
    finally:
        _current = None
