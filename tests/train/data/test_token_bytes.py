"""The bytes that tokens stand for, against the text that they were made of."""

import numpy as np
import pytest

from model.loss import IGNORED
from tests.faults import tokenizer_kinds as kinds
from train.data.token_bytes import token_bytes
from train.data.tokenizer import Encoder, eos_id, load_tokenizer, train_tokenizer

TEXTS = [*kinds.TEXTS, "a", "\n\n  naïve ☃", "x" * 70, "\U0001f600 \u0301 tab\tand  two"]
EXACT = ["ours", "byte level", "llama 2"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Loaded from files, as a run loads them."""
    made = {
        "ours": train_tokenizer(iter(kinds.TEXTS), 400),
        "byte level": kinds._byte_level(prefix=True),
        "llama 2": kinds._llama_2(),
        "word piece": kinds._word_piece(),
        "unigram": kinds._unigram("first"),
    }
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in made.items():
        tokenizer.save(str(folder / f"{name}.json"))
    return {name: load_tokenizer(folder / f"{name}.json") for name in made}


def counted(tokenizer, texts):
    """Bytes of documents one after another, an end token before the first and behind each."""
    end = eos_id(tokenizer)
    encoder = Encoder(tokenizer)
    ids = np.array([end, *(one for text in texts for one in [*encoder.encode(text), end])])
    return token_bytes(tokenizer, end), ids


@pytest.mark.parametrize("name", EXACT)
def test_bytes_are_those_of_the_text(name, tokenizers):
    table, ids = counted(tokenizers[name], TEXTS)
    assert table.of_labels(ids[:-1], ids[1:]) == sum(len(text.encode("utf-8")) for text in TEXTS)
    assert table.inexact is None
    assert (
        table.of_labels(ids[:1], ids[1:2]) == table.first_counts[ids[1]]
    )  # what begins a document has no space before


@pytest.mark.parametrize("name", ["word piece", "unigram"])
def test_where_they_cannot_be_they_are_those_of_what_is_spelled(name, tokenizers):
    texts = ["return a + b", "another begins", "x = [1, 2, 3]"]
    table, ids = counted(tokenizers[name], texts)
    assert table.of_labels(ids[:-1], ids[1:]) == sum(len(text.encode("utf-8")) for text in texts)
    assert "does not know" in table.inexact and ("one space" in table.inexact) == (name == "word piece")


def test_a_normalizer_that_changes_text_is_said(tokenizers):
    from tokenizers import normalizers

    changed = train_tokenizer(iter(kinds.TEXTS), 400)
    changed.normalizer = normalizers.Sequence([normalizers.NFC()])
    assert "NFC" in token_bytes(changed, 0).inexact


def test_labels_that_are_ignored_and_special_tokens_have_no_bytes(tokenizers):
    table, ids = counted(tokenizers["ours"], ["abc"])
    labels = ids[1:].copy()
    assert table.counts[table.end] == 0
    labels[0] = IGNORED
    assert table.of_labels(ids[:-1], labels) == len(b"abc") - table.first_counts[ids[1]]
