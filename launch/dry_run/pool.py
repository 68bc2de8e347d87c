"""Processes for dry runs, each of which is one rank after another."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from train.data.workers import default_workers


@contextmanager
def pool(tasks: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Start as many processes as there are cores, and no more than there are tasks, where that is known.

    They are forked from one that has imported what they need, which takes seconds.
    """
    how = multiprocessing.get_context("forkserver")
    how.set_forkserver_preload(["parallel.deepspeed_engine", "parallel.dry_run", "train.optimizer"])
    cores = default_workers()
    number = cores if tasks is None else max(1, min(tasks, cores))
    with ProcessPoolExecutor(number, mp_context=how, initializer=_one_thread) as found:
        yield found


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
