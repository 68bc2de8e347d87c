"""Rows of tokens to micro-batches, and what a model then computes of documents wherever they were packed."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from model.context import Context
from model.init import initialise
from model.loss import IGNORED, cross_entropy
from model.transformer import Transformer
from tests.shapes import small
from train.data.documents import batch_of
from train.data.packing import PADDING

EOS = 9


def rows(*rows):
    return np.array(rows, dtype=np.int64)


def positions(batch):
    return batch.documents.positions_BL.tolist()


def test_an_end_token_begins_the_next_document_and_no_label_is_lost():
    batch = batch_of(rows([5, 6, EOS, 7, EOS, EOS], [EOS, 1, 2, 3, 4, 5]), eos_id=EOS, document_mask=True)
    assert batch.tokens.tolist() == [[5, 6, EOS, 7, EOS], [EOS, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [[6, EOS, 7, EOS, EOS], [1, 2, 3, 4, 5]]
    assert positions(batch) == [[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]
    assert batch.documents.lengths == (2, 2, 1, 5)
    assert batch.tokens.dtype == batch.labels.dtype == batch.documents.positions_BL.dtype == torch.int64
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()


def test_without_a_mask_the_same_tokens_and_labels_have_no_documents():
    given = rows([5, EOS, 6, 7])
    with_mask, without = (batch_of(given, eos_id=EOS, document_mask=mask) for mask in (True, False))
    assert without.documents is None and with_mask.documents.lengths == (1, 2)
    assert torch.equal(without.tokens, with_mask.tokens) and torch.equal(without.labels, with_mask.labels)
    assert (without.lengths, with_mask.lengths) == ((3,), (1, 2))


@pytest.mark.parametrize(("eos_id", "end"), [(None, IGNORED), (EOS, EOS)])
def test_borders_that_are_given_end_a_document_in_the_end_token_or_in_nothing(eos_id, end):
    starts = np.array([[True, False, True, False, True]])
    batch = batch_of(rows([1, 2, 3, 4, 5]), eos_id=eos_id, document_mask=True, starts=starts)
    assert batch.tokens.tolist() == [[1, 2, 3, 4]]
    assert batch.labels.tolist() == [[2, end, 4, end]]  # 5 begins a document that the next row has
    assert positions(batch) == [[0, 1, 0, 1]]


@pytest.mark.parametrize("eos_id", [None, EOS])
def test_padding_is_a_document_without_labels(eos_id):
    row = [1, 2, 3, PADDING, PADDING, PADDING]
    batch = batch_of(rows(row), eos_id=eos_id, document_mask=True)
    assert batch.labels.tolist() == [[2, 3, IGNORED, IGNORED, IGNORED]]
    assert batch.tokens[0, :3].tolist() == [1, 2, 3] and (batch.tokens >= 0).all()
    assert positions(batch) == [[0, 1, 2, 0, 1]]


def test_a_model_learns_from_documents_what_it_would_from_each_alone_however_they_are_packed():
    """Losses and gradients, with documents longer than a sequence, which go on at position 0 in the next."""
    model = Transformer(small(2))
    initialise(model, "", 3, 0.2)
    generator = np.random.default_rng(0)
    lengths, seq_len = [1, 30, 7, 2, 44, 0, 12], 16
    stream = np.concatenate([np.append(generator.integers(10, 300, length), EOS) for length in lengths])
    stream = np.append(stream, generator.integers(10, 300, -(len(stream) - 1) % seq_len))
    parameters = list(model.parameters())

    def learned(loss):
        return [loss.item(), *torch.autograd.grad(loss, parameters)]

    def packed(rows):
        batch = batch_of(rows, eos_id=EOS, document_mask=True)
        return learned(cross_entropy(model(batch.tokens, Context(batch.documents)), batch.labels).total)

    windows = np.stack([stream[start : start + seq_len + 1] for start in range(0, len(stream) - 1, seq_len)])
    alone = 0.0
    for window in windows:
        cuts = [0, *(np.flatnonzero(window[1:-1] == EOS) + 1), seq_len]
        for start, stop in pairwise(cuts):
            part = torch.from_numpy(window[start : stop + 1]).unsqueeze(0)
            alone += cross_entropy(model(part[:, :-1]), part[:, 1:]).total
    expected = learned(alone)
    in_order = packed(windows)
    by_one = [packed(windows[index : index + 1]) for index in generator.permutation(len(windows))]
    one_at_a_time = [sum(parts) for parts in zip(*by_one, strict=True)]
    for got in (in_order, one_at_a_time):
        assert got[0] == pytest.approx(expected[0], rel=1e-5)
        for one, other in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
