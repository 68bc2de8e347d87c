import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.train.data.helpers import VOCAB, corpus_texts, problems, ready, texts_of, tokens_of
from train.data import build, segments, tokenise, tokenizer_cache, units
from train.data.shards import token_file
from train.data.tokenizer import train_tokenizer


def test_every_document_is_on_one_side(jsonl, files_config):
    prepared = ready(files_config(jsonl))
    train, val = texts_of(prepared, "train"), texts_of(prepared, "val")
    assert sorted(train + val) == sorted(corpus_texts(jsonl))
    assert 3 <= len(val) <= 20
    held_out = set(val)
    assert train == [t for t in corpus_texts(jsonl) if t not in held_out]
    assert prepared.dtype == "uint16" and prepared.tokenizer_size <= VOCAB
    assert prepared.tally["documents"] == 50
    assert len(prepared.train(8)) == (prepared.num_train_tokens - 1) // 8
    assert len(prepared.val(16)) == (prepared.num_val_tokens - 1) // 16


def test_duplicates_stay_together_and_the_split_depends_on_text_alone(jsonl, files_config):
    once = set(texts_of(ready(files_config(jsonl)), "val"))
    lines = jsonl.read_text().splitlines()
    jsonl.write_text("\n".join([*reversed(lines), *lines]))
    prepared = ready(files_config(jsonl))
    train, val = texts_of(prepared, "train"), texts_of(prepared, "val")
    assert set(val) == once and len(val) == 2 * len(once) and not set(train) & set(val)
    assert len(train) + len(val) == 100


def test_a_larger_fraction_holds_out_more_of_the_same(jsonl, files_config):
    few, many = (set(texts_of(ready(files_config(jsonl, val_fraction=f)), "val")) for f in (0.1, 0.5))
    assert few < many and 15 <= len(many) <= 35


@pytest.mark.parametrize("fraction", [1e-30, 1 - 1e-9])
def test_each_side_gets_a_document_and_its_copies(jsonl, files_config, monkeypatch, fraction):
    monkeypatch.setattr(segments, "_BATCH_CHARS", 16)  # documents of several batches
    lines = jsonl.read_text().splitlines()
    jsonl.write_text("\n".join(lines * 2))
    prepared = ready(files_config(jsonl, val_fraction=fraction))
    train, val = texts_of(prepared, "train"), texts_of(prepared, "val")
    rare, rest = (val, train) if fraction < 0.5 else (train, val)
    pick = min if fraction < 0.5 else max
    chosen = pick(corpus_texts(jsonl), key=lambda text: build.document_hash(text, "split"))
    assert rare == [chosen] * 2
    assert rest == [text for text in corpus_texts(jsonl) if text != chosen]


def test_no_validation(jsonl, files_config):
    prepared = ready(files_config(jsonl, val_fraction=0.0))
    assert prepared.num_val_tokens == 0 and len(prepared.val(8)) == 0
    assert len(texts_of(prepared, "train")) == 50


def test_bad_documents_are_reported(jsonl, files_config, capsys):
    with jsonl.open("ab") as file:
        file.write(b'\n{"text": "\xff"}\n{')
    prepared = ready(files_config(jsonl))
    assert (prepared.tally["bad_utf8"], prepared.tally["bad_json"]) == (1, 1)
    said = capsys.readouterr().err
    assert "50 documents; skipped: 1 not UTF-8 (docs.jsonl:51); 1 not JSON (docs.jsonl:52)" in said
    assert len(said.splitlines()) == 1


def test_a_document_that_quotes_the_end_token_is_one_document(jsonl, files_config):
    from train.data.tokenizer import EOS

    with jsonl.open("a") as file:
        file.write("\n" + json.dumps({"text": f"before{EOS}after"}, ensure_ascii=False))
    prepared = ready(files_config(jsonl))
    assert f"before{EOS}after" in texts_of(prepared, "train") + texts_of(prepared, "val")


def test_long_documents_tokenise_as_if_whole(tmp_path, files_config, monkeypatch):
    text = "".join(f"line {i}:\n    indented  {i}\n\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    data = files_config(tmp_path / "a.txt", val_fraction=0.0)
    whole = tokens_of(ready(data), "train")
    monkeypatch.setattr(segments, "_PIECE_CHARS", 60)
    monkeypatch.setattr(segments, "_BATCH_CHARS", 500)
    data.cache_dir += "2"
    assert np.array_equal(tokens_of(ready(data), "train"), whole)


@pytest.mark.parametrize("text", ["one two\n" * 50, "one two  three " * 40, "x" * 500, "語" * 500, "\n\n   \n" * 90])
def test_cut(text):
    pieces = list(segments.cut(text, 64))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 64 and min(map(len, pieces[:-1])) >= 32
    if "one" in text:
        assert all(piece.endswith("\n") or after.startswith(" ") for piece, after in pairwise(pieces))


def test_the_tokenizer_sample_is_bounded_and_even(tmp_path, files_config):
    root = tmp_path / "c"
    root.mkdir()
    for i in range(20):
        (root / f"{i:02}.txt").write_text(" ".join(f"{i:02}_{j:06}" for j in range(15_000)))  # 20 x 150 kB
    sample = list(tokenizer_cache.sample_texts(files_config(root), 10**6, progress=False)[0])
    sizes = np.bincount([int(piece[:3].strip(" _")) for piece in sample], [len(piece) for piece in sample], 20)
    assert 950_000 < sizes.sum() <= 1_000_000
    assert len(sizes) == 20 and (sizes > 0).sum() >= 15
    everything = list(tokenizer_cache.sample_texts(files_config(root), 4 * 10**6, progress=False)[0])
    assert sum(map(len, everything)) == 20 * 149_999


def test_an_existing_tokenizer(jsonl, files_config, folder_with_tokenizer):
    data = files_config(jsonl, tokenizer=str(folder_with_tokenizer))
    prepared = ready(data)
    given = folder_with_tokenizer / "tokenizer.json"
    assert prepared.tokenizer_path.read_bytes() == given.read_bytes()
    assert ready(files_config(jsonl, tokenizer=str(given))).folder == prepared.folder
    assert sorted(texts_of(prepared, "train") + texts_of(prepared, "val")) == sorted(corpus_texts(jsonl))
    (folder_with_tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<｜reserved▁0｜>"}')
    renamed = ready(data)
    assert renamed.folder != prepared.folder and renamed.eos_id == prepared.eos_id + 1


def test_large_vocabularies_take_four_bytes(jsonl, files_config, tmp_path):
    vocab = {"</s>" if i == 7 else f"t{i}": i for i in range(65_536)}
    for extra, dtype in ([], "uint16"), (["word"], "uint32"):
        made = Tokenizer(models.WordLevel({**vocab, **{w: 65_536 for w in extra}}, unk_token="t1"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(tmp_path / "t.json"))
        prepared = ready(files_config(jsonl, tokenizer=str(tmp_path / "t.json")), 70_000)
        assert (prepared.dtype, prepared.eos_id) == (dtype, 7)
        bytes_each = 2 if dtype == "uint16" else 4
        assert token_file(prepared.folder, 0, "train").stat().st_size == prepared.num_train_tokens * bytes_each


def test_settings_that_cannot_work_are_all_said(files_config, tmp_path):
    data = files_config(tmp_path / "nowhere", val_fraction=1.5)
    said = problems(data, vocab_size=100, seq_len=0)
    assert [s.split("=")[0] for s in said] == ["data.path", "data.val_fraction", "train.seq_len", "model.vocab_size"]
    assert said[3] == (
        "model.vocab_size=100: byte-level BPE needs 256 bytes and 15 special tokens; 271 or more would work"
    )


def test_tokenizer_to_be_trained_larger_than_the_model(jsonl, files_config):
    assert problems(files_config(jsonl, tokenizer_vocab_size=500)) == [
        "data.tokenizer_vocab_size=500: the model has only model.vocab_size=320 tokens; "
        "data.tokenizer_vocab_size=320, or model.vocab_size=512, would work"
    ]


def test_tokenizer_larger_than_the_model(jsonl, files_config, folder_with_tokenizer):
    data = files_config(jsonl, tokenizer=str(folder_with_tokenizer))
    size = train_tokenizer(iter(["document number squared says that is"] * 9), 300).get_vocab_size()
    expected = [
        f"model.vocab_size=280: the tokenizer {folder_with_tokenizer} has {size} tokens; "
        f"model.vocab_size={size} (or 384, the next multiple of 128, which is faster) would work"
    ]
    assert 280 < size <= 300
    assert problems(data, 280) == expected
    assert not list(Path(data.cache_dir).glob("*/meta.json"))  # said before tokenising
    assert ready(data, size).tokenizer_size == size
    assert problems(data, 280) == expected  # and from the cache


def test_tokenizer_without_end_token_and_too_large(jsonl, files_config, tmp_path):
    Tokenizer(models.WordLevel({"a": 0, "b": 999}, unk_token="a")).save(str(tmp_path / "t.json"))
    said = problems(files_config(jsonl, tokenizer=str(tmp_path / "t.json")))
    assert [s.split("=")[0] for s in said] == ["model.vocab_size", "data.tokenizer"]
    assert "has 1000 tokens" in said[0] and "no token ends a document" in said[1]


def test_no_usable_document(tmp_path, files_config):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n{"text": " "}')
    data = files_config(path)
    assert problems(data) == [
        f"data.path={path}: no usable document (0 documents; skipped: 1 empty (a.jsonl:2); 1 without text "
        "(a.jsonl:1)); UTF-8 text, with the text in data.text_field=text, would work"
    ]
    assert not list(Path(data.cache_dir).glob("*/meta.json"))


def test_too_few_tokens_also_from_the_cache(jsonl, files_config):
    data = files_config(jsonl)
    prepared = ready(data)
    train, val = prepared.num_train_tokens, prepared.num_val_tokens
    said = problems(data, seq_len=100_000)
    shorter = [1 << (n - 1).bit_length() - 1 for n in (train, val)]
    assert said[0] == (
        f"train.seq_len=100000: the corpus has only {train} training tokens and one sequence takes 100001; "
        f"train.seq_len={shorter[0]}, or a larger corpus would work"
    )
    assert said[1].startswith(f"data.val_fraction=0.2: only {val} tokens are held out")
    assert f"train.seq_len={shorter[1]}, or a larger data.val_fraction" in said[1]
    for i, split in enumerate(("train", "val")):
        assert len(getattr(prepared, split)(shorter[i])) == 1
    assert [s.split(":")[0] for s in problems(data, seq_len=val)] == ["data.val_fraction=0.2"]
    assert ready(data, seq_len=val - 1) == prepared
    assert len(problems(files_config(jsonl, val_fraction=0.0), seq_len=100_000)) == 1


def test_one_document_cannot_be_split(tmp_path, files_config):
    (tmp_path / "a.txt").write_text("all the text there is\n" * 9)
    data = files_config(tmp_path / "a.txt", val_fraction=0.001)
    (said,) = problems(data)
    assert said.startswith("data.val_fraction=0.001: the corpus is one document, or copies of one")
    assert "data.document_separator" in said
    data.document_separator = "is\n"
    assert len(problems(data)) == 1  # copies of one text
    (tmp_path / "a.txt").write_text("all the text there is\nand some more of it")
    assert ready(data, seq_len=4).num_val_tokens == 6


def test_threads_are_the_users_choice(jsonl, files_config, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with tokenise._threads(True):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    with tokenise._threads(True):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_a_cache_that_cannot_be_made(jsonl, files_config, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        (said,) = problems(files_config(jsonl, cache_dir=str(folder)))
        assert f"data.cache_dir={folder}: cannot be made" in said


def test_the_sample_is_the_same_in_whatever_order_and_parts_it_is_read(tmp_path, files_config, monkeypatch):
    rng = np.random.default_rng(0)
    pieces = [(int(rng.integers(0, 90)), "x" * int(rng.integers(1, 40))) for _ in range(120)]
    kept = set()
    for _ in range(50):
        sample = build.Sample(300)
        for at in rng.permutation(len(pieces)):
            sample.add(*pieces[at])
        kept.add(tuple(sample.pieces()))
    assert len(kept) == 1
    first = sample.pieces()
    largest = max(key for key, _ in first)
    assert first == sorted(piece for piece in pieces if piece[0] <= largest)
    assert 200 < sum(len(piece) for _, piece in first) <= 300
    words = (json.dumps({"text": f"{number} " * int(rng.integers(1, 400))}) for number in range(200))
    (tmp_path / "a.jsonl").write_text("\n".join(words))
    samples = set()
    for size, workers in (1 << 22, 1), (9000, 1), (30_000, 1), (9000, 2):
        monkeypatch.setattr(units, "SMALLEST", size)
        data = files_config(tmp_path / "a.jsonl", workers=workers)
        samples.add(tuple(tokenizer_cache.sample_texts(data, 40_000, progress=False)[0]))
    assert len(samples) == 1 and len(samples.pop()) > 20
