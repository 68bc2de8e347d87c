"""Best-fit packing against packing one document at a time, and against the documents themselves."""

import errno
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from conf.train_settings import Packing
from model.loss import IGNORED
from model.problems import BadInput
from tests.train.data.helpers import ready, texts_of
from train.data import best_fit
from train.data.best_fit import BestFitSequences, Cut, open_best_fit, plan, summary
from train.data.documents import batch_of
from train.data.packing import PADDING, ChangedTokens, FileTokens, PackedSequences, TokenFile

EOS, SEQ = 7, 16


def one_at_a_time(lengths, seq_len):
    """Best-fit decreasing, written out slowly: the room that is left in each sequence."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        insort(rooms, (rooms.pop(at) if at < len(rooms) else seq_len) - length)
    return rooms


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_what_packing_one_piece_at_a_time_makes(seed):
    generator = np.random.default_rng(seed)
    seq_len = int(generator.integers(1, 60))
    lengths = generator.integers(1, seq_len + 1, int(generator.integers(1, 400)))
    if seed % 3 == 1:
        lengths = np.ceil(lengths**2 / seq_len).astype(int)  # many short ones
    elif seed % 3 == 2:
        lengths = -(-lengths // 4)  # short ones alone, of which several go into each new sequence
    counts = np.bincount(lengths, minlength=seq_len + 1)
    groups = plan(counts, seq_len)
    rooms = [group.room for group in groups for _ in range(group.start, group.stop)]
    assert sorted(rooms) == one_at_a_time(lengths.tolist(), seq_len)
    assert [group.start for group in groups] == [0, *(group.stop for group in groups[:-1])]
    taken = Counter()
    for group in groups:
        assert sum(length * each for length, each, _ in group.pieces) == seq_len - group.room
        for length, each, first in group.pieces:
            taken.update((length, first + i) for i in range(each * (group.stop - group.start)))
    assert taken == Counter((length, i) for length in range(seq_len + 1) for i in range(counts[length]))


def test_a_plan_for_a_hundred_million_documents_is_short():
    lengths = np.arange(1, 4097)
    counts = np.concatenate([[0], (1e8 * np.exp(-lengths / 500) / 500).astype(np.int64)])
    groups = plan(counts, 4096)
    assert counts.sum() > 9e7 and len(groups) < 20_000
    used = (counts * np.arange(4097)).sum()
    assert groups[-1].stop == pytest.approx(used / 4096, rel=1e-3)  # next to no padding


@pytest.fixture
def documents():
    """Documents of ids other than the end token's: short ones, of a sequence's length, longer ones, an empty one."""
    generator = np.random.default_rng(3)
    lengths = [1, 0, 15, 16, 14, 3, 31, 32, 47, 2, 2, 5, 100, *generator.integers(0, 20, 30)]
    return [generator.integers(10, 300, length) for length in lengths]


def opened(documents, folder, parts=3):
    ended = [np.append(document, EOS) for document in documents]
    np.concatenate(ended).astype(np.uint16).tofile(folder / "tokens.bin")
    ends = np.cumsum([len(document) for document in ended])
    stream = PackedSequences(FileTokens([TokenFile(folder / "tokens.bin", "uint16")]), SEQ, vocab_size=300)
    return open_best_fit(stream, lambda: np.array_split(ends, parts), EOS, "of these tokens", folder / "cache")


def pieces_of(sequences):
    """Inputs and labels of every document or part of one in all sequences, without padding."""
    found = Counter()
    for index in range(len(sequences)):
        rows, starts = sequences[index][None], sequences.starts(index)[None]
        batch = batch_of(rows, eos_id=EOS, document_mask=True, starts=starts)
        assert batch.tokens.shape == batch.labels.shape == (1, SEQ)
        parts = zip(*(x[0].split(batch.documents.lengths) for x in (batch.tokens, batch.labels)), strict=True)
        for tokens, labels in parts:
            if (labels == IGNORED).all():
                continue
            found[tuple(tokens.tolist()), tuple(labels.tolist())] += 1
    return found


def test_every_document_that_fits_is_whole_and_every_token_is_predicted_once(documents, tmp_path):
    sequences, _ = opened(documents, tmp_path)
    expected = Counter()
    for document in documents:
        tokens = [EOS, *document.tolist(), EOS]
        for start in range(0, len(tokens) - 1, SEQ):
            part = tokens[start : start + SEQ + 1]
            expected[tuple(part[:-1]), tuple(part[1:])] += 1
    assert pieces_of(sequences) == expected
    used = sum(len(document) + 1 for document in documents)
    assert len(sequences) * SEQ == used + sequences.padding
    for index in (-1, len(sequences)):
        with pytest.raises(IndexError, match=f"sequence {index} of {len(sequences)}"):
            sequences[index]


def test_what_is_cut_and_padded_is_counted_and_said(documents, tmp_path):
    sequences, cut = opened(documents, tmp_path)
    ends = np.cumsum([len(document) + 1 for document in documents])
    # In concatenated sequences token t is predicted by sequence (t - 1) // SEQ, the first token by none.
    owners = [
        {(token - 1) // SEQ for token in range(max(1, end - len(document) - 1), end)}
        for document, end in zip(documents, ends, strict=True)
    ]
    long = sum(len(document) + 1 > SEQ for document in documents)
    assert cut == Cut(len(documents), long, sum(len(owner) > 1 for owner in owners))
    assert 0 < cut.cut < cut.concatenated
    said = summary(sequences, cut)
    assert f"{len(sequences):,} sequences of 16 tokens, of which {sequences.padding / SEQ / len(sequences):.2%}" in said
    assert f"{cut.cut / len(documents):.2%} of {len(documents)} documents" in said
    assert said.endswith(f"concatenation cuts {cut.concatenated / len(documents):.2%}")


def test_the_same_packing_whatever_is_looked_at_together(documents, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("whole", "parts")]
    rows = []
    for folder, parts, chunk in zip(folders, (1, 7), (1 << 20, 2), strict=True):
        folder.mkdir()
        monkeypatch.setattr(best_fit, "_CHUNK", chunk)
        sequences, cut = opened(documents, folder, parts)
        rows.append(([sequences[index].tolist() for index in range(len(sequences))], cut))
    assert rows[0] == rows[1]
    files = [sorted((folder / "cache").glob("*/places.bin")) for folder in folders]
    assert files[0][0].read_bytes() == files[1][0].read_bytes()


def test_a_corpus_of_one_empty_document(tmp_path):
    sequences, cut = opened([np.array([], dtype=int)], tmp_path, parts=1)
    assert len(sequences) == 1 and cut == Cut(1, 0, 0)
    assert sequences[0].tolist() == [EOS, EOS, *[PADDING] * (SEQ - 1)]


def test_documents_without_their_end_token_are_refused_before_a_run_or_as_they_are_read(documents, tmp_path):
    sequences, _ = opened(documents, tmp_path)
    tokens = np.fromfile(tmp_path / "tokens.bin", np.uint16)
    tokens[tokens == EOS] = 8
    tokens.tofile(tmp_path / "tokens.bin")
    with pytest.raises(ChangedTokens, match=r"tokens.bin, token .*: a document ends here, and not in the end token 7"):
        for index in range(len(sequences)):
            sequences[index]
    stream = PackedSequences(FileTokens([TokenFile(tmp_path / "tokens.bin", "uint16")]), SEQ, vocab_size=300)
    with pytest.raises(BadInput, match=r"data.packing=best_fit: .*tokens.bin, token 1 ends .*; data.packing=concat"):
        open_best_fit(stream, lambda: [np.array([2, 3])], EOS, "of other tokens", tmp_path / "cache")


def test_a_full_disk_is_said_with_what_would_work(jsonl, files_config, monkeypatch):
    prepared = ready(files_config(jsonl, packing=Packing.best_fit), seq_len=64)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(best_fit, "_write_places", full)
    with pytest.raises(BadInput, match=r"data.cache_dir=.*: cannot be written .*a folder with room in it would work"):
        prepared.train(64)
    monkeypatch.undo()
    assert len(prepared.train(64))


def test_tokens_that_were_changed_are_named(documents, tmp_path):
    sequences, _ = opened(documents, tmp_path)
    tokens = np.fromfile(tmp_path / "tokens.bin", np.uint16)
    tokens[tokens != EOS] = 999
    tokens.tofile(tmp_path / "tokens.bin")
    with pytest.raises(ChangedTokens, match=r"tokens.bin, token .* holds id 999"):
        for index in range(len(sequences)):
            sequences[index]


def test_prepared_documents_are_packed_for_training_and_concatenated_for_validation(jsonl, files_config):
    data = files_config(jsonl, packing=Packing.best_fit)
    packed, plain = ready(data, seq_len=64), ready(replace(data, packing=Packing.concat), seq_len=64)
    assert packed.fingerprint == plain.fingerprint  # the tokens are prepared once
    sequences, texts = packed.train(64), []
    assert isinstance(sequences, BestFitSequences) and isinstance(plain.train(64), PackedSequences)
    for index in range(len(sequences)):
        row = sequences[index][sequences[index] != PADDING]
        documents = np.split(row, np.flatnonzero(row == packed.eos_id))
        texts += [document[1:] for document in documents if len(document) > 1]
    decoded = sorted(packed.tokenizer().decode(text.tolist()) for text in texts)
    assert decoded == sorted(texts_of(plain, "train"))
    held_out = packed.val(64), plain.val(64)
    assert all(np.array_equal(held_out[0][index], held_out[1][index]) for index in range(len(held_out[1])))
