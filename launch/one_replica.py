"""Processes that hold one replica of trained weights: --pp x --tp of them, started here or by a launcher."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException

from model.config import ModelConfig
from model.problems import BadInput
from parallel import layout as layouts
from parallel.environment import timeout
from parallel.layout import Layout, ParallelConfig
from parallel.processes import free_port, local_processes, started_by_launcher, use_cpus_fairly


class _Asked(Protocol):
    @property
    def layout(self) -> Layout: ...


T = TypeVar("T", bound=_Asked)


def run_on_replica(
    options: argparse.Namespace, prepare: Callable[[argparse.Namespace, bool], T], work: Callable[[T], int]
) -> int:
    """Prepare what a command asks for, and work at it on as many processes as its layout has.

    Args:
        options: of the command, with pp and tp.
        prepare: makes of them what each process needs, its layout among it; the second argument is whether it is to
            be checked, which one process does for all. It can be pickled, as can `work`.
        work: is called by all processes together; returns the exit code, the same on each.

    Returns:
        The exit code; 2 on the later ranks of a launcher where the input cannot work, which rank 0 says.

    Raises:
        BadInput: the input cannot work.
    """
    launched = started_by_launcher(os.environ)
    rank = int(os.environ.get("RANK", "0"))
    try:
        asked = prepare(options, rank == 0)
    except BadInput:
        if rank == 0:
            raise
        return 2  # rank 0 says why
    if launched or asked.layout.world_size == 1:
        code = work(asked)
        return 0 if rank else code  # another rank's would have a launcher end rank 0 before it has printed
    try:
        torch.multiprocessing.spawn(_rank, (options, prepare, work, free_port()), asked.layout.world_size)
    except ProcessExitedException as error:
        if error.exit_code > 0:
            return int(error.exit_code)
        raise
    return 0


def layout_problems(options: argparse.Namespace, config: ModelConfig) -> list[str]:
    """Say why a model cannot be cut so, or the layout does not fit the processes that are there, or this machine."""
    problems = layouts.problems(ParallelConfig(pp=options.pp, tp=options.tp), config)
    return [problem.replace("parallel.", "--") for problem in problems] or _processes(options)


@contextmanager
def joined(layout: Layout) -> Iterator[torch.device]:
    """Join the processes of a layout, and leave them behind this context; yield the device of this one."""
    several, on_gpu = layout.world_size > 1, torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if several:
        use_cpus_fairly(device)
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout(), device_id=device if on_gpu else None)
    yield device
    if several:
        dist.destroy_process_group()


def is_first() -> bool:
    """Tell whether this process is rank 0, which prints."""
    return os.environ.get("RANK", "0") == "0"


def _processes(options: argparse.Namespace) -> list[str]:
    """Why the layout does not fit the processes that are there, or this machine."""
    asked, gpus = options.pp * options.tp, torch.cuda.device_count()
    started = int(os.environ.get("WORLD_SIZE", asked))
    if started != asked:
        return [f"--pp={options.pp} --tp={options.tp}: needs {asked} processes, and {started} were started"]
    here = local_processes() or asked
    if gpus and here > gpus:
        return [f"--pp={options.pp} --tp={options.tp}: {here} processes on this machine, which has {gpus} GPUs; "
                f"--pp x --tp <= {gpus} works here"]  # fmt: skip
    return []


def _rank(
    rank: int,
    options: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, bool], T],
    work: Callable[[T], int],
    port: int,
) -> None:
    """One of the processes that `run_on_replica` starts."""
    world = str(options.pp * options.tp)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = work(prepare(options, False))
    if code and rank == 0:  # another rank's would have rank 0 ended before it has printed
        raise SystemExit(code)
