from itertools import islice

import numpy as np
import pytest
import torch

from model.loss import IGNORED
from train.data.batches import eval_micro_batches, train_micro_batches
from train.data.order import SampleOrder
from train.data.packing import PackedSequences

SEQ = 4


@pytest.fixture
def sequences(tmp_path):
    """Fifty sequences; sequence i starts with token 4 i."""
    np.arange(50 * SEQ + 1, dtype=np.uint16).tofile(tmp_path / "t.bin")
    return PackedSequences(tmp_path / "t.bin", "uint16", SEQ)


def firsts(tokens: torch.Tensor) -> list[int]:
    return (tokens[:, 0] // SEQ).tolist()


def steps(sequences, number, dp_size, micro_batch=2, start_sample=0, global_batch=12) -> list[list[list[int]]]:
    """Per step and rank, the sequences trained on."""
    order = SampleOrder(len(sequences), 1)
    each = global_batch // (micro_batch * dp_size)
    ranks = []
    for rank in range(dp_size):
        batches = train_micro_batches(
            sequences, order, global_batch=global_batch, micro_batch=micro_batch, dp_rank=rank, dp_size=dp_size,
            start_sample=start_sample,
        )  # fmt: skip
        ranks.append([firsts(batch.tokens) for batch in islice(batches, number * each)])
    return [[[i for m in rank[s * each : (s + 1) * each] for i in m] for rank in ranks] for s in range(number)]


def test_shapes_and_labels(sequences):
    order = SampleOrder(50, 1)
    batches = train_micro_batches(sequences, order, global_batch=6, micro_batch=3, dp_rank=0, dp_size=1)
    batch = next(batches)
    tokens, labels = batch.tokens, batch.labels
    assert tokens.shape == labels.shape == (3, SEQ)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.is_contiguous() and labels.is_contiguous()
    assert torch.equal(labels, tokens + 1)


def test_micro_batch_m_of_rank_r(sequences):
    order = SampleOrder(50, 1)
    batches = train_micro_batches(sequences, order, global_batch=12, micro_batch=2, dp_rank=1, dp_size=3)
    found = [firsts(batch.tokens) for batch in islice(batches, 4)]
    assert found == [order.take([2, 3]).tolist(), order.take([8, 9]).tolist(),
                     order.take([14, 15]).tolist(), order.take([20, 21]).tolist()]  # fmt: skip


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 12), (2, 2), (3, 2), (6, 1), (12, 1)])
def test_a_step_does_not_depend_on_dp(sequences, dp_size, micro_batch):
    """Over more than an epoch."""
    order = SampleOrder(50, 1)
    for s, ranks in enumerate(steps(sequences, 6, dp_size, micro_batch)):
        union = sorted(i for rank in ranks for i in rank)
        assert union == sorted(order.take(range(12 * s, 12 * s + 12)).tolist())


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_resumption(sequences, dp_size):
    whole = steps(sequences, 6, dp_size)
    assert steps(sequences, 3, dp_size, start_sample=36) == whole[3:]


def test_an_epoch_sees_every_sequence_once(sequences):
    seen = [i for ranks in steps(sequences, 5, 1, micro_batch=1, global_batch=10) for i in ranks[0]]
    assert sorted(seen) == list(range(50)) and seen != list(range(50))


@pytest.mark.parametrize(
    "changes", [{"global_batch": 10}, {"dp_rank": 3}, {"dp_rank": -1}, {"start_sample": -1}, {"order": 49}]
)
def test_sizes_that_do_not_fit(sequences, changes):
    settings = {"global_batch": 12, "micro_batch": 2, "dp_rank": 0, "dp_size": 3, **changes}
    order = SampleOrder(settings.pop("order", 50), 1)
    with pytest.raises(ValueError, match=r"must be a multiple|an order over 49"):
        next(train_micro_batches(sequences, order, **settings))


@pytest.mark.parametrize(("limit", "micro_batch", "dp_size"), [(7, 2, 1), (7, 2, 3), (8, 4, 2), (1, 4, 4), (99, 3, 2)])
def test_eval_covers_exactly_the_first(sequences, limit, micro_batch, dp_size):
    count = min(limit, 50)
    seen, totals, counts, numbers = [], [], [], set()
    per_token = torch.arange(50 * SEQ + 1, dtype=torch.float64) ** 2  # stands for the loss of predicting a token
    for rank in range(dp_size):
        batches, number = eval_micro_batches(sequences, limit, micro_batch=micro_batch, dp_rank=rank, dp_size=dp_size)
        numbers.add(number)
        assert len(list(batches)) == len(batches) == number
        for batch in batches:
            tokens, labels = batch.tokens, batch.labels
            assert tokens.shape == labels.shape == (micro_batch, SEQ)
            real = labels[:, 0] != IGNORED
            assert (labels[~real] == IGNORED).all() and torch.equal(labels[real], tokens[real] + 1)
            seen += firsts(tokens[real])
            totals.append(torch.where(labels == IGNORED, 0, per_token[labels]).sum())
            counts.append((labels != IGNORED).sum())
    assert sorted(seen) == list(range(count))
    (number,) = numbers
    assert number == -(-count // (micro_batch * dp_size))
    mean = torch.stack(totals).sum() / torch.stack(counts).sum()  # over the labels that count, as the engine divides
    torch.testing.assert_close(mean, per_token[1 : count * SEQ + 1].mean())


def test_eval_order_is_fixed(sequences):
    first, _ = eval_micro_batches(sequences, 6, micro_batch=2, dp_rank=1, dp_size=2)
    assert [firsts(batch.tokens) for batch in first] == [firsts(batch.tokens) for batch in first] == [[2, 3], [0, 0]]


def test_eval_of_nothing(sequences, tmp_path):
    (tmp_path / "empty.bin").touch()
    empty = PackedSequences(tmp_path / "empty.bin", "uint16", SEQ)
    for split, limit in ((sequences, 0), (empty, 5)):
        batches, number = eval_micro_batches(split, limit, micro_batch=2, dp_rank=0, dp_size=1)
        assert (list(batches), number) == ([], 0)


@pytest.mark.parametrize("changes", [{"micro_batch": 0}, {"limit": -1}, {"dp_rank": 2}])
def test_eval_sizes_that_do_not_fit(sequences, changes):
    settings = {"limit": 4, "micro_batch": 2, "dp_rank": 0, "dp_size": 2, **changes}
    with pytest.raises(ValueError, match="must be positive"):
        eval_micro_batches(sequences, **settings)
