import os

import numpy as np
import pytest

from train.data import packing
from train.data.packing import ChangedTokens, FileTokens, PackedSequences, TokenFile


def write(path, tokens, dtype="uint16"):
    np.asarray(tokens, dtype).tofile(path)
    return FileTokens([TokenFile(path, dtype)])


@pytest.mark.parametrize("seq_len", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_every_token_but_the_first_is_predicted_once(tmp_path, seq_len, dtype):
    path = tmp_path / "t.bin"
    sequences = PackedSequences(write(path, [*range(20), 9], dtype), seq_len)
    assert len(sequences) == 20 // seq_len and sequences.num_tokens == 21
    rows = [sequences[i] for i in range(len(sequences))]
    assert all(row.shape == (seq_len + 1,) and row.dtype == np.int64 for row in rows)
    tokens = [*range(20), 9]
    assert np.concatenate([row[:-1] for row in rows]).tolist() == tokens[: len(rows) * seq_len]
    assert np.concatenate([row[1:] for row in rows]).tolist() == tokens[1 : len(rows) * seq_len + 1]


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_length(tmp_path, tokens, expected):
    assert len(PackedSequences(write(tmp_path / "t.bin", [0] * tokens), 4)) == expected


def test_out_of_range(tmp_path):
    stream = write(tmp_path / "t.bin", [*range(8), 9])
    sequences = PackedSequences(stream, 4)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            sequences[index]
    with pytest.raises(ValueError, match="at least one token"):
        PackedSequences(stream, 0)
    with pytest.raises(FileNotFoundError):
        TokenFile(tmp_path / "none.bin", "uint16")


def test_reading_does_not_load_the_file(tmp_path):
    stream = write(tmp_path / "t.bin", [*range(8), 9])
    sequences = PackedSequences(stream, 4)
    row = sequences[0]
    row[:] = 0  # a copy: writing to it reaches neither the file nor a later reader
    assert sequences[0].tolist() == [0, 1, 2, 3, 4]
    os.truncate(tmp_path / "t.bin", 1 << 40)  # a terabyte of holes
    stream = FileTokens([TokenFile(tmp_path / "t.bin", "uint16")])
    assert PackedSequences(stream, 4)[(1 << 37) - 1 >> 1].tolist() == [0] * 5


def files_of(folder, tokens, rng, dtype="uint16"):
    """Tokens cut anywhere into files, some of them empty and then not there."""
    cuts = np.sort(rng.integers(0, len(tokens) + 1, 299))
    made = []
    for number, part in enumerate(np.split(tokens, cuts)):
        if len(part):
            part.astype(dtype).tofile(folder / f"{number}.bin")
        made.append(TokenFile(folder / f"{number}.bin", dtype, len(part)))
    return made


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_many_files_are_one_stream_of_which_few_are_open(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(packing, "_MAX_OPEN", 5)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 60_000, 1001)
    stream = FileTokens(files_of(tmp_path, tokens, rng, dtype))
    before = len(os.listdir("/proc/self/fd"))
    for seq_len in (1, 7, 100, 1000):
        sequences = PackedSequences(stream, seq_len)
        for index in rng.permutation(len(sequences)):
            assert np.array_equal(sequences[index], tokens[index * seq_len : index * seq_len + seq_len + 1])
    assert sequences.num_tokens == 1001 and len(os.listdir("/proc/self/fd")) <= before + 5
    for start, count in rng.integers(0, 500, (200, 2)):
        assert np.array_equal(stream.read(start, count), tokens[start : start + count])
    del stream, sequences
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_token_beyond_the_vocabulary_is_named_with_its_file_and_place(tmp_path):
    np.array([1, 2, 3], "uint16").tofile(tmp_path / "a.bin")
    np.array([4, 500, 6], "uint16").tofile(tmp_path / "b.bin")
    stream = FileTokens([TokenFile(tmp_path / f"{name}.bin", "uint16") for name in "ab"])
    assert PackedSequences(stream, 2, vocab_size=501)[1].tolist() == [3, 4, 500]
    with pytest.raises(ChangedTokens, match=r"b\.bin, token 1: holds id 500 in sequence 1, beyond .* of 500"):
        PackedSequences(stream, 2, vocab_size=500)[1]
