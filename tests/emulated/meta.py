"""Engines on PyTorch's meta device, which no CPU tensor can be taken for: what in a step is on another device.

A main of `tests.ranks`. Values that a host asks for are made up.
"""

import os
from typing import Any
from unittest import mock

import torch
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.deepspeed_engine import on_meta
from parallel.dry_run.process_group import one_of_many
from parallel.dry_run.record import Record
from parallel.groups import DRY
from tests.emulated.engines import RATE, Job, batches
from tests.ranks import report

META = torch.device("meta")
SHARES = [(Job(2, 2, 2, "1f1b"), 0), (Job(1, 4, 2, "zbv"), 0), (Job(2, 4, 1, "zero_bubble"), 7)]
"""Jobs and one rank of each: with the embedding, with embedding and head, with the head."""


class Strays(TorchDispatchMode):
    """Notes tensors that are made on another device, and values that are read from this one."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.reads += 1
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device", META) != META:
            self.reads += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        made = func(*args, **kwargs)
        self.elsewhere += [
            f"{func} on {one.device}" for one in tree_leaves(made) if isinstance(one, torch.Tensor) and not one.is_meta
        ]
        return made


def strays_of(job: Job, rank: int) -> dict[str, Any]:
    """What strays in a step and in an evaluation, after one of each."""
    data, found = batches(), {}
    with one_of_many(rank, job.layout.world_size, Record("meta")), on_meta(DRY), Strays():
        engine = job.build(META)
        for _ in range(2):  # the first makes what is kept: rotary tables, Adam's moments
            with Strays() as strays:
                engine.step(data, RATE)
            found["step"] = {"elsewhere": strays.elsewhere, "reads": strays.reads}
            with Strays() as strays:
                engine.evaluate(data, job.micro_batches)
            found["evaluation"] = {"elsewhere": strays.elsewhere, "reads": strays.reads}
    return found


def main() -> list[dict[str, Any]]:
    """What strays in this process's share of `SHARES`."""
    mine, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with mock.patch.object(adam, "_device_dtype_check_for_fused", lambda *how, **more: None):
        return [strays_of(job, rank) for job, rank in SHARES[mine::processes]]


if __name__ == "__main__":
    report(main)
