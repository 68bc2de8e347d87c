"""Processes for dry runs, each of which is one rank after another."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from train.data.workers import default_workers


@contextmanager
def pool(tasks: int) -> Iterator[ProcessPoolExecutor]:
    """Start as many processes as there are cores, and no more than there are tasks."""
    how = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(tasks, default_workers())), mp_context=how, initializer=_one_thread) as found:
        yield found


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
