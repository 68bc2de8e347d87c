"""Text that spells special tokens, and documents in pieces, with tokenizers of every kind."""

import json
import random
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.faults.tokenizer_kinds import KINDS, TEXTS, word_level
from tests.train.data.helpers import local, problems, tokens_of
from train.data import segments
from train.data.prepare import prepare
from train.data.tokenizer import Encoder, eos_id, load_tokenizer


@pytest.fixture
def files(tmp_path):
    return partial(local, tmp_path, val_fraction=0.0)


# C12: special tokens spelled inside text


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Each kind as it comes from its file."""
    loaded = {}

    def load(kind: str) -> tuple[Tokenizer, Path]:
        if kind not in loaded:
            path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
            KINDS[kind]().save(str(path))
            loaded[kind] = path
        return load_tokenizer(loaded[kind]), loaded[kind]

    return load


@pytest.mark.parametrize("kind", KINDS, ids=[f"C12 {kind}" for kind in KINDS])
def test_no_text_spells_a_special_token(kinds, files, tmp_path, kind):
    tokenizer, path = kinds(kind)
    encoder = Encoder(tokenizer)
    special = {tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    for text in ("</s>", "x</s>x", "a </s> b", "</s></s>", "<s>\n</s>\n", "<s>x<s> </s>"):
        ids = encoder.encode(text)
        assert not special & set(ids), text
        if kind != "WordLevel" and "prefix space" not in kind and "x" in text and not kind.startswith("WordPiece"):
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
    rows = [json.dumps({"text": f"x {i} " + "</s> " * 8}) for i in range(40)]
    (tmp_path / "docs.jsonl").write_text("\n".join(rows))
    prepared = prepare(files(tmp_path / "docs.jsonl", tokenizer=str(path)), 70_000, 8, progress=False)
    tokens = tokens_of(prepared, "train")
    assert (tokens == eos_id(tokenizer)).sum() == 40


def test_prompts_keep_what_the_tokenizer_puts_around_them(kinds):
    tokenizer, _ = kinds("BPE, prepend and byte fallback")
    ids = Encoder(tokenizer).encode("<s>x", add_special_tokens=True)
    assert ids[0] == tokenizer.token_to_id("<s>") and ids.count(ids[0]) == 1


def test_the_unknown_token_stays_for_unknown_characters_and_not_for_its_name(kinds):
    tokenizer, _ = kinds("Unigram, metaspace always")
    encoder, unknown = Encoder(tokenizer), tokenizer.token_to_id("<unk>")
    assert encoder.encode("x<unk>x <unk><unk>").count(unknown) == 0
    assert encoder.encode("x\U000f1234x").count(unknown) == 1
    tokenizer, _ = kinds("WordPiece")
    assert tokenizer.decode(Encoder(tokenizer).encode("<unk>"), skip_special_tokens=False) == "<unk>"


def test_text_that_is_normalized_to_a_special_token():
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁ab</s>")], 0))
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    made.encode_special_tokens = True
    assert 1 in made.encode("a＜/s＞b").ids
    assert made.decode(Encoder(made).encode("a＜/s＞b"), skip_special_tokens=False) == "a</s>b"


def test_a_special_token_that_nothing_else_can_be_written_for_is_refused(files, tmp_path):
    made = word_level({"§": 3})
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "§"}')
    (tmp_path / "a.txt").write_text("word a b")
    (said,) = problems(files(tmp_path / "a.txt", tokenizer=str(tmp_path)))
    assert said.startswith(f"data.tokenizer={tmp_path}: text that spells '§' becomes that special token, and no other")
    assert said.endswith("would work")


def test_an_end_token_that_stands_for_unknown_characters_is_refused(files, tmp_path):
    made = Tokenizer(models.BPE({"</s>": 0, "a": 1}, [], unk_token="</s>"))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("abba")
    (said,) = problems(files(tmp_path / "a.txt", tokenizer=str(tmp_path)))
    assert said.startswith(
        f"data.tokenizer={tmp_path}: characters that it does not know become '</s>', which would end"
    )


def test_a_word_that_serves_as_padding_stays_a_word(tmp_path):
    made = KINDS["byte-level BPE"]()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "a", "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(Encoder(tokenizer).encode("a b a")) == "a b a"


def test_a_word_of_the_vocabulary_that_is_named_as_the_end_token(tmp_path):
    KINDS["byte-level BPE"]().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "One"}')
    tokenizer = load_tokenizer(tmp_path)
    end = eos_id(tokenizer, tmp_path)
    assert end not in (ids := Encoder(tokenizer).encode("One x, One")) and tokenizer.decode(ids) == "One x, One"
    assert end in tokenizer.encode("One x").ids


# C13: pieces of long documents


def drawn(kind: str, draw: random.Random) -> str:
    if kind == "WordPiece":
        return " ".join(draw.choice(TEXTS[0].split()) for _ in range(300))
    if kind == "WordLevel":
        return " ".join(draw.choice(["word", "a", "b", "x"]) for _ in range(300))
    if draw.random() < 0.3:
        return draw.choice("ax1") * 900
    if draw.random() < 0.5:
        return "x" + "".join(draw.choices("".join(TEXTS), k=900)) + "x"
    cuts = (text[(at := draw.randrange(100)) : at + draw.randrange(60)] for text in draw.choices(TEXTS, k=40))
    return "x" + "".join(cuts) + "x"


@pytest.mark.parametrize("kind", KINDS, ids=[f"C13 {kind}" for kind in KINDS])
def test_pieces_join_to_the_text(kinds, kind):
    tokenizer, _ = kinds(kind)
    encoder, draw = Encoder(tokenizer), random.Random(0)
    exact = 0
    for _ in range(60):
        text = drawn(kind, draw)
        pieces = list(segments.cut(text, 64))
        rows = encoder.encode_batch(list(zip(["", *pieces], pieces, strict=False)))
        made = tokenizer.decode([int(i) for row in rows for i in row], skip_special_tokens=False)
        assert len(rows) > 10 and made == tokenizer.decode(encoder.encode(text), skip_special_tokens=False)
        exact += made.removeprefix(" ") == text  # a prefix space is the document's own, and stands once
    if not any(name in kind for name in ("metaspace", "Unigram", "WordLevel")):  # what they do not know is lost to them
        assert exact == 60


def test_a_document_over_the_length_of_a_piece_has_no_space_of_its_own(kinds, files, tmp_path):
    tokenizer, path = kinds("BPE, prepend and byte fallback")
    text = "One line of text ends here.\n" * 20_000
    (tmp_path / "a.txt").write_text(text)
    prepared = prepare(files(tmp_path / "a.txt", tokenizer=str(path)), 70_000, 8, progress=False)
    tokens = tokens_of(prepared, "train")
    assert len(text) > 2 * segments._PIECE_CHARS and tokenizer.decode(tokens[:-1].tolist()) == text
