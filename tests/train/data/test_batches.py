from itertools import islice

import numpy as np
import pytest
import torch

from model.loss import IGNORED
from train.data.batches import eval_micro_batches, train_micro_batches
from train.data.mixed_order import HeldOutSamples, MixedOrder, TrainSamples
from train.data.mixture import Mixture
from train.data.order import SampleOrder
from train.length import Consumed, length_by

SEQ = 4


class Sequences:
    """Packed sequences in memory, of which those at `broken` have a border before their third token."""

    def __init__(self, tokens, seq_len, broken=()):
        self._tokens, self._seq_len, self._broken = tokens, seq_len, broken

    def __len__(self):
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index):
        assert 0 <= index < len(self)
        return self._tokens[index * self._seq_len :][: self._seq_len + 1]

    def starts(self, index):
        return np.arange(self._seq_len + 1) == 2 if index in self._broken else None


class Corpus:
    """The prepared tokens of a corpus; sequence i of 4 starts with token first + 4 i."""

    def __init__(self, number, first=0):
        self._tokens = np.arange(first, first + number * SEQ + 1)

    def train(self, seq_len):
        return Sequences(self._tokens, seq_len)

    val = train


@pytest.fixture
def corpus():
    return Corpus(50)


@pytest.fixture
def held_out(corpus):
    return HeldOutSamples({"it": corpus.val(SEQ)}, Mixture({"it": 1}))


def firsts(tokens: torch.Tensor) -> list[int]:
    return (tokens[:, 0] // SEQ).tolist()


def micro_batches(corpora, length, mixtures=None, begun=None, **sizes):
    """Of one rank; the seed is 1."""
    begun = begun or Consumed()
    order = MixedOrder(length, mixtures or [Mixture(dict.fromkeys(corpora, 1.0))], begun)
    sizes = {"micro_batch": 2, "dp_rank": 0, "dp_size": 1, **sizes}
    return train_micro_batches(TrainSamples(order, corpora, 1), length.at, **sizes)


def steps(corpus, number, dp_size, micro_batch=2, first_step=1, global_batch=12, begun=None) -> list[list[list[int]]]:
    """Per step and rank, the sequences trained on."""
    length = length_by(global_batch, SEQ, [], 1e6, begun=begun)
    ranks: list[list[list[int]]] = []
    for rank in range(dp_size):
        sizes = {"micro_batch": micro_batch, "dp_rank": rank, "dp_size": dp_size, "first_step": first_step}
        batches = micro_batches({"it": corpus}, length, begun=begun, **sizes)
        ranks.append([])
        for step in range(first_step, first_step + number):
            each = length.at(step).global_batch // (micro_batch * dp_size)
            ranks[-1].append([i for batch in islice(batches, each) for i in firsts(batch.tokens)])
    return [[rank[step] for rank in ranks] for step in range(number)]


def test_shapes_and_labels(corpus):
    batch = next(micro_batches({"it": corpus}, length_by(6, SEQ, [], 1e6), micro_batch=3))
    tokens, labels = batch.tokens, batch.labels
    assert tokens.shape == labels.shape == (3, SEQ)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.is_contiguous() and labels.is_contiguous()
    assert torch.equal(labels, tokens + 1)


def test_micro_batch_m_of_rank_r(corpus):
    order = SampleOrder(50, 1)
    batches = micro_batches({"it": corpus}, length_by(12, SEQ, [], 1e6), dp_rank=1, dp_size=3)
    found = [firsts(batch.tokens) for batch in islice(batches, 4)]
    assert found == [order.take([2, 3]).tolist(), order.take([8, 9]).tolist(),
                     order.take([14, 15]).tolist(), order.take([20, 21]).tolist()]  # fmt: skip


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 12), (2, 2), (3, 2), (6, 1), (12, 1)])
@pytest.mark.parametrize("global_batch", [12, "0:12 100:24 200:12"])
def test_a_step_does_not_depend_on_dp(corpus, dp_size, micro_batch, global_batch):
    """Over more than an epoch, and while the batch changes."""
    order, length = SampleOrder(50, 1), length_by(global_batch, SEQ, [], 1e6)
    for step, ranks in enumerate(steps(corpus, 6, dp_size, micro_batch, global_batch=global_batch), 1):
        union = sorted(i for rank in ranks for i in rank)
        first = length.at(step).samples_before
        assert union == sorted(order.take(range(first, first + length.at(step).global_batch)).tolist())


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("global_batch", [12, "0:12 150:24"])
def test_resumption(corpus, dp_size, global_batch):
    whole = steps(corpus, 6, dp_size, global_batch=global_batch)
    assert steps(corpus, 3, dp_size, first_step=4, global_batch=global_batch) == whole[3:]
    skipped = steps(corpus, 1, dp_size, begun=Consumed(skip=36))
    assert skipped == steps(corpus, 4, dp_size)[3:]


def test_an_epoch_sees_every_sequence_once(corpus):
    seen = [i for ranks in steps(corpus, 5, 1, micro_batch=1, global_batch=10) for i in ranks[0]]
    assert sorted(seen) == list(range(50)) and seen != list(range(50))


@pytest.mark.parametrize("changes", [{"global_batch": 10}, {"dp_rank": 3}, {"dp_rank": -1}])
def test_sizes_that_do_not_fit(corpus, changes):
    settings = {"global_batch": 12, "micro_batch": 2, "dp_rank": 0, "dp_size": 3, **changes}
    with pytest.raises(ValueError, match="must be a multiple"):
        next(micro_batches({"it": corpus}, length_by(settings.pop("global_batch"), SEQ, [], 1e6), **settings))


def test_sources_and_lengths_of_a_step_are_those_of_its_stage():
    """Every row is one whole sequence of the source and the length that the stage says, and no rank differs."""
    corpora = {"a": Corpus(50), "b": Corpus(30, first=1000)}
    length = length_by("0:8 128:16", SEQ, [(96, None), (1e6, 2 * SEQ)], 1e6)
    mixtures = [Mixture({"a": 3, "b": 1}), Mixture({"a": 1, "b": 1})]
    of_ranks = [[*islice(micro_batches(corpora, length, mixtures, dp_rank=r, dp_size=2), 10)] for r in range(2)]
    rows = [row for pair in zip(*of_ranks, strict=True) for batch in pair for row in batch.tokens]
    orders = {(name, n): SampleOrder(n, 1) for name, n in [("a", 50), ("b", 30), ("a", 25), ("b", 15)]}
    seen = dict.fromkeys(orders, 0)
    assert [len(row) for row in rows] == [SEQ] * 24 + [2 * SEQ] * 16  # the step before which 96 tokens are trained on
    for row in rows:
        name = "b" if row[0] >= 1000 else "a"
        number = {SEQ: {"a": 50, "b": 30}, 2 * SEQ: {"a": 25, "b": 15}}[len(row)][name]
        index = orders[name, number].take([seen[name, number]])[0]
        assert row.tolist() == [*range(first := 1000 * (name == "b") + index * len(row), first + len(row))]
        seen[name, number] += 1
    assert seen == {("a", 50): 18, ("b", 30): 6, ("a", 25): 8, ("b", 15): 8}


def test_held_out_sequences_have_the_shares_of_the_mixture_and_end_with_its_first_source():
    sequences = {"a": Corpus(50).val(SEQ), "b": Corpus(4, first=1000).val(SEQ)}
    held_out = HeldOutSamples(sequences, Mixture({"a": 2, "b": 1}))
    assert held_out.first_to_end == "b" and 12 <= len(held_out) <= 14
    batches, _ = eval_micro_batches(held_out, 99, micro_batch=1, dp_rank=0, dp_size=1)
    starts = [int(batch.tokens[0, 0]) for batch in batches]
    assert [start for start in starts if start >= 1000] == [1000, 1004, 1008, 1012]
    assert [start for start in starts if start < 1000] == [*range(0, SEQ * (len(held_out) - 4), SEQ)]


def test_borders_are_those_of_end_tokens_and_those_that_a_source_knows():
    corpus = Sequences(np.arange(9 * SEQ + 1), SEQ, broken=(1,))
    held_out = HeldOutSamples({"it": corpus}, Mixture({"it": 1}))
    reading = {"micro_batch": 3, "dp_rank": 0, "dp_size": 1, "eos_id": 2 * SEQ + 1}
    batches, _ = eval_micro_batches(held_out, 9, document_mask=True, **reading)
    first = next(iter(batches))
    assert first.documents.positions_BL.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 2]]
    assert first.labels[1].tolist() == [5, 2 * SEQ + 1, 7, 8]  # the token before the border ends a document
    batches, _ = eval_micro_batches(held_out, 9, document_mask=False, **reading)
    assert next(iter(batches)).documents is None


@pytest.mark.parametrize(("limit", "micro_batch", "dp_size"), [(7, 2, 1), (7, 2, 3), (8, 4, 2), (1, 4, 4), (99, 3, 2)])
def test_eval_covers_exactly_the_first(held_out, limit, micro_batch, dp_size):
    count = min(limit, 50)
    seen, totals, counts, numbers = [], [], [], set()
    per_token = torch.arange(50 * SEQ + 1, dtype=torch.float64) ** 2  # stands for the loss of predicting a token
    for rank in range(dp_size):
        batches, number = eval_micro_batches(held_out, limit, micro_batch=micro_batch, dp_rank=rank, dp_size=dp_size)
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


def test_eval_order_is_fixed(held_out):
    first, _ = eval_micro_batches(held_out, 6, micro_batch=2, dp_rank=1, dp_size=2)
    assert [firsts(batch.tokens) for batch in first] == [firsts(batch.tokens) for batch in first] == [[2, 3], [0, 0]]


def test_eval_of_nothing(held_out):
    empty = HeldOutSamples({"it": Corpus(0).val(SEQ)}, Mixture({"it": 1}))
    for split, limit in ((held_out, 0), (empty, 5)):
        batches, number = eval_micro_batches(split, limit, micro_batch=2, dp_rank=0, dp_size=1)
        assert (list(batches), number) == ([], 0)


@pytest.mark.parametrize("changes", [{"micro_batch": 0}, {"limit": -1}, {"dp_rank": 2}])
def test_eval_sizes_that_do_not_fit(held_out, changes):
    settings = {"limit": 4, "micro_batch": 2, "dp_rank": 0, "dp_size": 2, **changes}
    with pytest.raises(ValueError, match="must be positive"):
        eval_micro_batches(held_out, **settings)
