"""Preparing small corpora, and reading back what was prepared."""

import json
from pathlib import Path

import numpy as np
import pytest

from conf.train_settings import DataConfig, Source
from model.problems import BadInput
from train.data.prepare import prepare

VOCAB = 320


def local(tmp_path: Path, path: Path | str, **changes) -> DataConfig:
    """Settings for a local corpus, cached in a folder of the test."""
    settings = {"cache_dir": str(tmp_path / "cache"), "tokenizer_sample_mb": 1, "val_fraction": 0.2, **changes}
    return DataConfig(source=Source.files, path=str(path), **settings)


def ready(data: DataConfig, vocab_size: int = VOCAB, seq_len: int = 8):
    return prepare(data, vocab_size, seq_len, progress=False)


def tokens_of(prepared, split: str) -> np.ndarray:
    """All tokens of a split, shard after shard."""
    sequences = getattr(prepared, split)(1)
    tokens = sequences.stream.read(0, sequences.num_tokens)
    assert len(tokens) == getattr(prepared, f"num_{split}_tokens")
    ends = np.concatenate([np.empty(0, np.int64), *prepared.ends(split)])
    assert np.array_equal(ends - 1, np.flatnonzero(tokens == prepared.eos_id))
    return tokens


def texts_of(prepared, split: str) -> list[str]:
    """The documents of a split, read back from its tokens."""
    tokens = tokens_of(prepared, split)
    assert not len(tokens) or tokens[-1] == prepared.eos_id
    tokenizer = prepared.tokenizer()
    ends = np.flatnonzero(tokens == prepared.eos_id)
    parts = np.split(tokens, ends + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


def corpus_texts(jsonl: Path) -> list[str]:
    return [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]


def problems(data, vocab_size=VOCAB, seq_len=8) -> list[str]:
    with pytest.raises(BadInput) as caught:
        ready(data, vocab_size, seq_len)
    return caught.value.problems
