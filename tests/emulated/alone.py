"""This process as one rank of a job whose other ranks are not there, on PyTorch's fake process group.

What it says to `torch.distributed` and what it launches is noted as `tests.emulated.notes` describes, and which process
groups it makes is kept. What would come from other ranks is zero, so that values are made up and control flow is real.
"""

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.environment import quiet
from tests.emulated.notes import Note

COLLECTIVES = [
    *["all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single"],
    *["broadcast", "all_gather", "barrier"],
]
"""Those that are noted; any other way to communicate fails."""
READS = ["tolist", "numpy", "cpu"]
"""Methods of a tensor that make the host wait, beside those that come to `aten::_local_scalar_dense`."""

Group = tuple[tuple[int, ...], int]
"""A group's ranks, and how many groups of the same ranks were made before it: the same on all of them."""


@dataclass
class Said:
    """What this rank has said.

    Attributes:
        notes: see `tests.emulated.notes`.
        groups: for each call that makes process groups and that the whole job takes part in, its name, the sets of
            ranks, and how many groups this process was in before.
    """

    notes: list[Note] = field(default_factory=list)
    groups: list[tuple[str, tuple[tuple[int, ...], ...], int]] = field(default_factory=list)
    _keys: dict[Any, Group] = field(default_factory=dict)
    _made: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def making(self, call: str, sets: Any) -> None:
        """Note a call that makes groups."""
        self.groups.append((call, tuple(tuple(sorted(ranks)) for ranks in sets), len(self._keys)))

    def made(self, group: Any) -> None:
        """Give a new group of this process its key."""
        ranks = tuple(dist.get_process_group_ranks(group))
        self._keys[group] = ranks, self._made[ranks]
        self._made[ranks] += 1

    def key(self, group: Any) -> Group:
        """The key of a group, or of the world."""
        return self._keys[group or dist.group.WORLD]


class NotedWork:
    """What the call that was noted last returns."""

    def __init__(self, said: Said) -> None:
        self._notes, self._number = said.notes, len(said.notes) - 1

    def wait(self, timeout: Any = None) -> bool:
        """Note that the compute stream waits."""
        self._notes.append(("wait", self._number))
        return True


class Launches(TorchDispatchMode):
    """Notes that kernels are launched, and that values are read."""

    def __init__(self, said: Said) -> None:
        super().__init__()
        self._said = said

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        notes = self._said.notes
        assert func.namespace != "c10d", f"{func} is a way to communicate that is not noted"
        if func is torch.ops.aten._local_scalar_dense.default:
            notes.append(("read", "a value"))
        elif not func.is_view and (not notes or notes[-1][0] != "compute"):
            notes.append(("compute", "kernels"))
        return func(*args, **(kwargs or {}))


@contextmanager
def one_of_many(rank: int, world: int) -> Iterator[Said]:
    """Within, this process is a rank of a job, and is told that the backend is NCCL.

    Args:
        rank: which one.
        world: processes of the job.
    """
    import deepspeed  # seconds, which a process that only reads what others noted should not pay
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    said = Said()
    environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    with ExitStack() as stack:
        if (real := get_accelerator()).device_name() == "cuda":
            set_accelerator(CPU_Accelerator())
            stack.callback(set_accelerator, real)
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.dict(deepspeed.ops.__compatible_ops__, {"deepspeed_shm_comm": False}))
        for name, noting in _noting(said, rank).items():
            stack.enter_context(mock.patch.object(dist, name, noting))
        for name in READS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, _read(said, name)))
        stack.enter_context(mock.patch.object(torch.cuda.nccl, "version", lambda: (2, 30, 7)))  # PyTorch logs it
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        said.made(dist.group.WORLD)
        with quiet():
            deepspeed.init_distributed("fake", auto_mpi_discovery=False, dist_init_required=None)
        stack.enter_context(mock.patch.object(dist, "get_backend", lambda group=None: "nccl"))
        stack.enter_context(Launches(said))
        try:
            yield said
        finally:
            dist.destroy_process_group()
            deepspeed.comm.comm.cdb = None


def _noting(said: Said, rank: int) -> dict[str, Callable[..., Any]]:
    """What stands in the place of the functions of `torch.distributed`, by name."""
    make_group = dist.new_group

    def new_group(ranks: Any, *args: Any, **kwargs: Any) -> Any:
        said.making("new_group", [ranks])
        group = make_group(ranks, *args, **kwargs)
        if rank in ranks:
            said.made(group)
        return group

    def split_group(parent_pg: Any = None, split_ranks: Any = None, **kwargs: Any) -> Any:
        assert parent_pg is None, "the world is what is split"
        said.making("split_group", split_ranks)
        own = next((ranks for ranks in split_ranks if rank in ranks), None)
        group = None if own is None else make_group(own)
        if group is not None:
            said.made(group)
        return group

    noting: dict[str, Callable[..., Any]] = {"new_group": new_group, "split_group": split_group}
    noting |= {name: _message(said, name) for name in ("isend", "irecv", "send", "recv")}
    return noting | {name: _collective(said, name) for name in COLLECTIVES if hasattr(dist, name)}


def _message(said: Said, name: str) -> Callable[..., Any]:
    signature = inspect.signature(getattr(dist, name))

    def say(*args: Any, **kwargs: Any) -> NotedWork | None:
        given = signature.bind(*args, **kwargs).arguments
        tensor, kind = given["tensor"], name.removeprefix("i")
        if kind == "recv":
            tensor.zero_()
        peer = given["dst" if kind == "send" else "src"]
        said.notes.append((kind, said.key(given.get("group")), peer, tensor.numel()))
        work = NotedWork(said)
        if name != kind:
            return work
        work.wait()
        return None

    return say


def _collective(said: Said, name: str) -> Callable[..., Any]:
    signature = inspect.signature(getattr(dist, name))

    def say(*args: Any, **kwargs: Any) -> NotedWork | None:
        given = signature.bind(*args, **kwargs).arguments
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        asynchronous = bool(given.get("async_op"))
        for filled in [*given.get("tensor_list", []), *tensors[: len(tensors) - 1]]:
            filled.zero_()
        key = said.key(given.get("group"))
        what = f"{name} {[(tensor.numel(), str(tensor.dtype)) for tensor in tensors]}"
        said.notes.append(("collective", key, key[0], asynchronous, what))
        if name == "barrier":  # the one collective for which the host waits
            said.notes.append(("read", name))
        return NotedWork(said) if asynchronous else None

    return say


def _read(said: Said, name: str) -> Callable[..., Any]:
    real = getattr(torch.Tensor, name)

    def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        said.notes.append(("read", name))
        return real(tensor, *args, **kwargs)

    return read
