"""The micro-batches of one data-parallel rank, read from the packed sequences of its sources."""

from collections import deque
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch

from model.batch import Batch
from model.loss import IGNORED
from train.data.documents import batch_of
from train.data.mixed_order import HeldOutSamples, Located, TrainSamples
from train.length import StepSize


def train_micro_batches(
    samples: TrainSamples,
    size_of: Callable[[int], StepSize],
    *,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    first_step: int = 1,
    eos_id: int | None = None,
    document_mask: bool = False,
    passed_over: Container[int] = (),
) -> Iterator[Batch]:
    """Yield the micro-batches of one rank without end, each (micro_batch, seq_len) on the CPU.

    A step trains on the global_batch samples from `samples_before` on, and its micro-batch m on rank r holds those from
    (m * dp_size + r) * micro_batch of them on. So what a step trains on depends neither on `dp_size` nor on
    `micro_batch`, and a run resumes at another size from the number of steps it has taken.

    Args:
        samples: where the samples of the run lie.
        size_of: the size of each step, as `train.length.Length.at` says it.
        micro_batch: samples per forward pass of one rank.
        dp_rank: this rank among the data-parallel ones.
        dp_size: how many those are.
        first_step: number of the step to begin with.
        eos_id: the token after each document; None where there is none.
        document_mask: whether attention and positions stop at the borders of documents.
        passed_over: steps whose batches are not read.

    Raises:
        ValueError: at the first item of a step whose sizes do not divide.
    """
    for step in count(first_step):
        if step in passed_over:
            continue
        size = size_of(step)
        if size.global_batch % (micro_batch * dp_size) or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"global_batch={size.global_batch} must be a multiple of {micro_batch=} x {dp_size=}, with {dp_rank=} "
                "below the latter"
            )
        for start in range(dp_rank * micro_batch, size.global_batch, dp_size * micro_batch):
            yield _batch(samples.locate(np.arange(micro_batch) + (size.samples_before + start)), eos_id, document_mask)


def ahead(batches: Iterator[Batch], *, pinned: bool, depth: int = 4) -> Iterator[Batch]:
    """Prefetch micro-batches in a thread while those before are trained on.

    Args:
        batches: without end, or with one.
        pinned: in memory that a GPU copies from by itself, while it computes.
        depth: how many are read ahead.
    """

    def read() -> Batch | None:
        batch = next(batches, None)
        return batch.pin_memory() if pinned and batch else batch

    with ThreadPoolExecutor(1, thread_name_prefix="micro-batches") as thread:  # one, so that their order stays
        coming = deque(thread.submit(read) for _ in range(depth))
        while (batch := coming.popleft().result()) is not None:
            coming.append(thread.submit(read))
            yield batch


class EvalMicroBatches:
    """The held-out micro-batches of one rank; iterate as often as wanted, the same each time."""

    def __init__(
        self,
        samples: HeldOutSamples,
        number: int,
        micro_batch: int,
        starts: range,
        eos_id: int | None,
        document_mask: bool,
    ):
        self._samples, self._number, self._micro_batch, self._starts = samples, number, micro_batch, starts
        self._borders = eos_id, document_mask

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        for start in self._starts:
            wanted = np.arange(start, start + self._micro_batch)
            # Beyond the last sequence stands the first with all labels ignored: every rank must run every
            # micro-batch, or the pipeline would hang.
            batch = _batch(self._samples.locate(np.where(wanted < self._number, wanted, 0)), *self._borders)
            batch.labels[torch.from_numpy(wanted >= self._number)] = IGNORED
            yield batch


def eval_micro_batches(
    samples: HeldOutSamples,
    limit: int,
    *,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    eos_id: int | None = None,
    document_mask: bool = False,
) -> tuple[EvalMicroBatches, int]:
    """Cut exactly the first `limit` held-out sequences (or all, if fewer) into micro-batches, whatever `dp_size` is.

    Args:
        samples: where the held-out sequences lie.
        limit: how many sequences at most.
        micro_batch: sequences per forward pass of one rank.
        dp_rank: this rank among the data-parallel ones.
        dp_size: how many those are.
        eos_id: the token after each document; None where there is none.
        document_mask: whether attention and positions stop at the borders of documents.

    Returns:
        The micro-batches of this rank, and how many those are, the same on every rank. Labels beyond the last sequence
        are ignored, so that some micro-batches may hold fewer that count, or none.

    Raises:
        ValueError: `micro_batch` or `limit` out of range, or `dp_rank` not below `dp_size`.
    """
    if micro_batch < 1 or limit < 0 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"{micro_batch=} must be positive, {limit=} not negative, {dp_rank=} below {dp_size=}")
    number = min(limit, len(samples))
    slots = -(-number // (micro_batch * dp_size)) * micro_batch * dp_size
    starts = range(dp_rank * micro_batch, slots, dp_size * micro_batch)
    return EvalMicroBatches(samples, number, micro_batch, starts, eos_id, document_mask), len(starts)


def _batch(located: Located, eos_id: int | None, document_mask: bool) -> Batch:
    rows = np.stack([sequences[index] for sequences, index in located])
    starts = [sequences.starts(index) for sequences, index in located]
    if any(one is not None for one in starts):
        none = np.zeros(rows.shape[1], dtype=np.bool_)
        marks = np.stack([none if one is None else one for one in starts])
        return batch_of(rows, eos_id=eos_id, document_mask=document_mask, starts=marks)
    return batch_of(rows, eos_id=eos_id, document_mask=document_mask)
