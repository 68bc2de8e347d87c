"""The micro-batches of one data-parallel rank, read from packed sequences."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from model.batch import Batch
from model.loss import IGNORED
from train.data.documents import batch_of
from train.data.order import SampleOrder
from train.data.packing import PackedSequences


def train_micro_batches(
    sequences: PackedSequences,
    order: SampleOrder,
    *,
    global_batch: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    start_sample: int = 0,
    eos_id: int | None = None,
) -> Iterator[Batch]:
    """Yield the micro-batches of one rank without end, each (micro_batch, seq_len) on the CPU.

    Step s trains on the samples from start_sample + s * global_batch on, and its micro-batch m on rank r holds those
    from (m * dp_size + r) * micro_batch of them on. So what a step trains on depends neither on `dp_size` nor on
    `micro_batch`, and a run resumes at another size from the number of samples it has trained on.

    Args:
        sequences: the training tokens.
        order: which sequence each sample is.
        global_batch: samples per step over all ranks.
        micro_batch: samples per forward pass of one rank.
        dp_rank: this rank among the data-parallel ones.
        dp_size: how many those are.
        start_sample: samples trained on before.
        eos_id: the token after each document, at whose borders attention stops; None where it does not.

    Raises:
        ValueError: at the first item; sizes that do not divide, or an order over another number of sequences.
    """
    if global_batch % (micro_batch * dp_size) or not 0 <= dp_rank < dp_size or start_sample < 0:
        raise ValueError(
            f"{global_batch=} must be a multiple of {micro_batch=} x {dp_size=}, with {dp_rank=} below the latter "
            f"and {start_sample=} not negative"
        )
    if order.num_sequences != len(sequences):
        raise ValueError(f"an order over {order.num_sequences} sequences for {len(sequences)}")
    step_start = start_sample
    while True:
        for start in range(dp_rank * micro_batch, global_batch, dp_size * micro_batch):
            yield _batch(sequences, order.take(np.arange(micro_batch) + (step_start + start)), eos_id)
        step_start += global_batch


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

    def __init__(self, sequences: PackedSequences, count: int, micro_batch: int, starts: range, eos_id: int | None):
        self._sequences, self._count, self._micro_batch, self._starts = sequences, count, micro_batch, starts
        self._eos_id = eos_id

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        for start in self._starts:
            wanted = np.arange(start, start + self._micro_batch)
            # Beyond the last sequence stands sequence 0 with all labels ignored: every rank must run every
            # micro-batch, or the pipeline would hang.
            batch = _batch(self._sequences, np.where(wanted < self._count, wanted, 0), self._eos_id)
            batch.labels[torch.from_numpy(wanted >= self._count)] = IGNORED
            yield batch


def eval_micro_batches(
    sequences: PackedSequences,
    limit: int,
    *,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    eos_id: int | None = None,
) -> tuple[EvalMicroBatches, int]:
    """Cut exactly the first `limit` held-out sequences (or all, if fewer) into micro-batches, whatever `dp_size` is.

    Args:
        sequences: the held-out tokens.
        limit: how many sequences at most.
        micro_batch: sequences per forward pass of one rank.
        dp_rank: this rank among the data-parallel ones.
        dp_size: how many those are.
        eos_id: the token after each document, at whose borders attention stops; None where it does not.

    Returns:
        The micro-batches of this rank, and how many those are, the same on every rank. Labels beyond the last sequence
        are ignored, so that some micro-batches may hold fewer that count, or none.

    Raises:
        ValueError: `micro_batch` or `limit` out of range, or `dp_rank` not below `dp_size`.
    """
    if micro_batch < 1 or limit < 0 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"{micro_batch=} must be positive, {limit=} not negative, {dp_rank=} below {dp_size=}")
    count = min(limit, len(sequences))
    slots = -(-count // (micro_batch * dp_size)) * micro_batch * dp_size
    starts = range(dp_rank * micro_batch, slots, dp_size * micro_batch)
    return EvalMicroBatches(sequences, count, micro_batch, starts, eos_id), len(starts)


def _batch(sequences: PackedSequences, wanted: np.ndarray, eos_id: int | None) -> Batch:
    rows = np.stack([sequences[int(i)] for i in wanted])
    return batch_of(rows, eos_id=eos_id, document_mask=eos_id is not None)
