"""`deepnarrow tokenizer`: its figures against ones made by hand, and that each of its probes can fail."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from conf.train_settings import DataConfig, Source
from launch.cli import main
from launch.tokenizer_probes import every_character, kinds_of_tokens, round_trip, spelled
from launch.tokenizer_report import _sample
from train.data.build import sample_pieces
from train.data.token_bytes import bytes_of_tokens
from train.data.tokenizer import EOS, Encoder, load_tokenizer, train_tokenizer
from train.data.tokenizer_cache import prepare_tokenizer, sample_texts

PROSE = "The tokenizer reads 1234 words, and writes them again.\n"
CODE = "def add(a, b):\n    return a + b  # 你好世界\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for name, text in (("web", PROSE), ("code", CODE)):
        (root / name).mkdir()
        for number in range(30):
            (root / name / f"{number:02}.txt").write_text(text * (number + 1) + str(number))
    sources = ", ".join(f"{name}: {{path: '{root}/{name}'}}" for name in ("web", "code"))
    return [f"data.sources={{{sources}}}", f"data.cache_dir='{root}/cache'", "data.tokenizer_vocab_size=700"], root


@pytest.fixture(scope="module")
def report(corpus, tmp_path_factory):
    overrides, root = corpus
    model = train_tokenizer(iter([PROSE] * 9), 300).model
    other = tmp_path_factory.mktemp("gpt2")
    model.save(str(other))
    out = other / "report.json"
    assert main(["tokenizer", *overrides, "--against", str(other), "--out", str(out), "--json"]) == 0
    return json.loads(out.read_text()), str(other), root


def test_rates_are_those_of_the_text(report):
    found, other, root = report
    tokenizer = load_tokenizer(found["tokenizer"]["path"])
    theirs = Tokenizer(models.BPE.from_file(f"{other}/vocab.json", f"{other}/merges.txt"))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name in ("web", "code"):
        texts = [file.read_text() for file in (root / name).iterdir()]
        size = sum(len(text.encode()) for text in texts)
        source = found["sources"][name]
        assert source["bytes"] == size and source["unseen"] is False
        for who, each in (("this", tokenizer), (other, theirs)):
            tokens = sum(len(each.encode(text, add_special_tokens=False).ids) for text in texts)
            rates = source["tokenizers"][who]
            assert rates["tokens"] == tokens
            assert rates["bytes_per_token"] == pytest.approx(size / tokens)
            assert rates["characters_per_token"] == pytest.approx(sum(map(len, texts)) / tokens)
            assert rates["tokens_per_word"] == pytest.approx(tokens / sum(len(text.split()) for text in texts))


def test_the_tokenizers_own_figures(report):
    found = report[0]
    ours = found["tokenizer"]
    assert ours["tokens"] == ours["merges"] + 256 + 15 < ours["wanted"] == 700
    assert len(ours["special"]) == 15 and EOS in ours["special"]
    assert ours["mixed"] == dict.fromkeys(ours["mixed"], 0)
    assert " tokenizer" in ours["longest"] and "你好世界" in ours["longest"]
    assert 0 < ours["unused"] < 1 and ours["parts_of_characters"] >= 128
    assert found["digits"]["0123456789"] == 10
    assert found["white_space"]["4 spaces"] == 1 and found["white_space"]["2 newlines"] == 2
    assert found["spelled"] == {"names": 15, "failed": []}
    assert found["round_trip"]["failed"] == 0 == found["corpus"]["failed"]
    assert found["round_trip"]["characters"] > 1_112_064


def test_it_is_said_to_people_as_well(corpus, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert main(["tokenizer", *corpus[0]]) == 0
    said = capsys.readouterr().out
    assert "700 tokens were wanted: the sample has no more pairs that come twice" in said
    assert said.count("(it was trained on this text)") == 2
    assert "gpt2 is not compared with: not in the cache of Hugging Face; --against gpt2 fetches it" in said
    assert "'0123456789' 10" in said and "each stays text where text spells it" in said


def test_text_that_it_was_not_trained_on_is_measured_where_there_is_any(tmp_path):
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(2000)]
    with open(tmp_path / "a.jsonl", "w") as file:
        for _ in range(500):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=600))}) + "\n")
    data = DataConfig(source=Source.files, path=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    data.tokenizer_sample_mb = 1
    prepared = prepare_tokenizer({"files": data}, 300, progress=False)
    sample = _sample(data, prepared, "files", 200_000)
    measured = {piece for _, piece in sample.pieces}
    trained = set(sample_texts(data, 10**6, progress=False)[0])
    assert sample.unseen is True and trained and not measured & trained
    assert 200_000 <= sum(len(piece.encode()) for piece in measured) < 220_000
    given = DataConfig(source=Source.files, path=data.path, cache_dir=data.cache_dir, tokenizer=str(prepared.path))
    assert _sample(given, prepare_tokenizer({"files": given}, 300, progress=False), "files", 100).unseen is None
    assert len(list(sample_pieces("x" * 40_000))) == 3


@pytest.fixture
def lossy(tmp_path):
    """A tokenizer that writes everything small, knows no character beyond ASCII, and merges digits."""
    made = Tokenizer(models.BPE(unk_token="?"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?", "</s>"], show_progress=False)
    made.train_from_iterator([PROSE.lower() * 9, "</s> 2024 2024"], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_that_changes_texts_ends_with_1(lossy, corpus, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert main(["tokenizer", str(lossy), *corpus[0][:2], "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["tokenizer"]["wanted"] is None and found["sources"]["web"]["unseen"] is None
    assert found["round_trip"]["failed"] > 4000 and found["corpus"]["failed"] == 60
    assert all("came back as 'the" in text or "came back as 'def" in text for text in found["corpus"]["examples"])
    assert found["digits"]["0123456789"] <= 10


def test_a_special_token_that_text_can_spell_is_found():
    tokenizer = train_tokenizer(iter([PROSE]), 300)
    special = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    assert spelled(tokenizer, Encoder(tokenizer), special)["failed"] == []
    tokenizer.encode_special_tokens = False
    naive = SimpleNamespace(encode=lambda text: tokenizer.encode(text).ids)
    assert spelled(tokenizer, naive, special)["failed"] == list(special.values())


def test_every_character_of_unicode_is_tried():
    texts = list(every_character())
    tried = {char for text in texts for char in text}
    assert len(tried) == sum(map(len, texts)) == sys.maxunicode + 1 - 2048
    assert {"\0", "\u0301", "\ufffe", "\U0001f600", "\U0010ffff"} <= tried and not tried & {"\ud800"}


def test_what_came_back_otherwise_is_shown():
    tokenizer = train_tokenizer(iter([PROSE]), 300)
    encoder = Encoder(tokenizer)
    wrong = SimpleNamespace(decode_batch=lambda ids, **_: [tokenizer.decode(each).replace("x", "y") for each in ids])
    found = round_trip(wrong, encoder, ["abc", "0123x567"])
    assert (found["texts"], found["failed"]) == (2, 1)
    assert found["examples"] == ["'0123x567' came back as '0123y567'"]


def test_tokens_that_mix_what_may_be_kept_apart_are_counted():
    tokens = ["12", "a1", "\n\n", "你a", "你好", "it's", "plain", " (", ".\n"]
    assert kinds_of_tokens(tokens) == {
        "several digits": 1,
        "digits and letters": 1,
        "a newline and something else": 2,
        "CJK and other letters": 1,
        "letters and punctuation": 1,
    }


def test_bytes_of_tokens_are_those_that_they_write():
    tokenizer = train_tokenizer(iter([CODE] * 9), 400)
    raw = bytes_of_tokens(tokenizer)
    assert len(raw) == tokenizer.get_vocab_size(with_added_tokens=False)
    assert sorted(value for value in raw.values() if len(value) == 1) == [bytes([byte]) for byte in range(256)]
    ids = tokenizer.encode(CODE).ids
    assert b"".join(raw[number] for number in ids).decode() == CODE


def test_what_cannot_work_is_said_at_once(tmp_path, capsys):
    given = ["data=files", "data.path=/nowhere", "--against", "/nowhere/else", "--sample-mb", "0", "data.bad=1"]
    (tmp_path / "empty").mkdir()
    assert main(["tokenizer", *given, "--against", str(tmp_path / "empty")]) == 2
    said = capsys.readouterr().err.splitlines()
    for start in (
        "data.bad=1: no such key",
        "data.path=/nowhere: no such file",
        "--sample-mb=0.0: nothing to measure on; 4 would work",
        "--against=/nowhere/else: cannot be read (no tokenizer is there); a tokenizer.json, a folder with one",
        f"--against={tmp_path}/empty: cannot be read (no tokenizer is there)",
    ):
        assert sum(line.startswith(start) for line in said) == 1, (start, said)
    sources = "data.sources={a: {path: /etc/passwd}, b: {path: /etc, source: tokens}}"
    assert main(["tokenizer", "/a", "/b"]) == 2
    assert "/a /b: one tokenizer is reported on at a time; /a --against /b would work" in capsys.readouterr().err
    assert main(["tokenizer", sources, "--against", "/nowhere"]) == 2
    assert "data.sources.b.source=tokens: a tokenizer is measured on text" in capsys.readouterr().err
    assert main(["tokenizer", "/nowhere/tokenizer.json"]) == 2
    assert "data.tokenizer=/nowhere/tokenizer.json: no such file or folder" in capsys.readouterr().err
