import os

import numpy as np
import pytest

from train.data.packing import PackedSequences, TokenWriter


def write(path, documents, dtype="uint16", eos_id=9):
    with TokenWriter(path, dtype, eos_id) as writer:
        for document in documents:
            writer.write(document)
    return writer.num_tokens


def test_documents_are_joined_by_the_end_token(tmp_path):
    path = tmp_path / "t.bin"
    assert write(path, [[1, 2, 3], np.array([], np.int64), np.array([4])]) == 7
    assert np.fromfile(path, "uint16").tolist() == [1, 2, 3, 9, 9, 4, 9]


def test_pieces_of_a_document_have_no_end_between(tmp_path):
    with TokenWriter(tmp_path / "t.bin", "uint32", 9) as writer:
        writer.write([1, 2], end=False)
        writer.write([100_000])
    assert np.fromfile(tmp_path / "t.bin", "uint32").tolist() == [1, 2, 100_000, 9]


def test_an_id_that_does_not_fit_is_refused(tmp_path):
    with TokenWriter(tmp_path / "t.bin", "uint16", 9) as writer:
        writer.write([65_535])
        for bad in (65_536, -1):
            with pytest.raises(OverflowError, match="do not fit uint16"):
                writer.write([bad])
    assert writer.num_tokens == 2


def test_close_brings_the_file_to_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append((tmp_path / "t.bin").stat().st_size))
    write(tmp_path / "t.bin", [[1, 2, 3]])
    assert synced == [8]


@pytest.mark.parametrize("seq_len", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_every_token_but_the_first_is_predicted_once(tmp_path, seq_len, dtype):
    path = tmp_path / "t.bin"
    write(path, [range(20)], dtype)
    sequences = PackedSequences(path, dtype, seq_len)
    assert len(sequences) == 20 // seq_len and sequences.num_tokens == 21
    rows = [sequences[i] for i in range(len(sequences))]
    assert all(row.shape == (seq_len + 1,) and row.dtype == np.int64 for row in rows)
    tokens = [*range(20), 9]
    assert np.concatenate([row[:-1] for row in rows]).tolist() == tokens[: len(rows) * seq_len]
    assert np.concatenate([row[1:] for row in rows]).tolist() == tokens[1 : len(rows) * seq_len + 1]


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_length(tmp_path, tokens, expected):
    np.zeros(tokens, "uint16").tofile(tmp_path / "t.bin")
    assert len(PackedSequences(tmp_path / "t.bin", "uint16", 4)) == expected


def test_out_of_range(tmp_path):
    write(tmp_path / "t.bin", [range(8)])
    sequences = PackedSequences(tmp_path / "t.bin", "uint16", 4)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            sequences[index]
    with pytest.raises(ValueError, match="at least one token"):
        PackedSequences(tmp_path / "t.bin", "uint16", 0)
    with pytest.raises(FileNotFoundError):
        PackedSequences(tmp_path / "none.bin", "uint16", 4)


def test_reading_does_not_load_the_file(tmp_path):
    write(tmp_path / "t.bin", [range(8)])
    sequences = PackedSequences(tmp_path / "t.bin", "uint16", 4)
    row = sequences[0]
    row[:] = 0  # a copy: writing to it reaches neither the file nor a later reader
    assert sequences[0].tolist() == [0, 1, 2, 3, 4]
    os.truncate(tmp_path / "t.bin", 1 << 40)  # a terabyte of holes
    assert PackedSequences(tmp_path / "t.bin", "uint16", 4)[(1 << 37) - 1 >> 1].tolist() == [0] * 5
