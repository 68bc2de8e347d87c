import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from train.data import segments
from train.data.segments import DocumentEncoder, segment_pattern
from train.data.tokenizer import Encoder, load_tokenizer, train_tokenizer

ATOMS = [
    *(" ", " ", "  ", "    ", "\t", "\n", "\n\n", "\r", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000"),
    *("\u200b", "a", "foo", "Bar", "x", "s", "t", "re", "S", "'", "''", "'s", '"', "(", ").", "/", "//", "_", "self"),
    *("<|endoftext|>", "0", "1", "12", "1234", "é", "e\u0301", "\u0301", "ñ", "語", "日本", "カ", "ー", "한", "Ж", "д"),
    *("😀", "\x00", "\x7f", "٣", "²", "-", "\ufeff", "ß"),
]
TEXTS = [
    "def foo(self, x):\n    return self.bar[x]  # don't\n\n",
    "naïve été ça 語 日本 'self n't 12345 ): \n\n  x",
] * 40


def foreign(pattern: str, normalizer=None, **changes) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizer
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])
    made.pre_tokenizer = changes.get("pre_tokenizer", split)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=letters, show_progress=False))
    made.add_special_tokens(["<|endoftext|>"])
    made.add_tokens(changes.get("added", []))
    return made


FAMILIES = {
    "ours": lambda: train_tokenizer(iter(TEXTS), 600),
    "GPT-2": lambda: foreign("", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "Llama 3": lambda: foreign(segments._CL100K),
    "Qwen 2": lambda: foreign(segments._QWEN2, normalizers.NFC()),
}


def ready(tokenizer: Tokenizer, tmp_path) -> Tokenizer:
    tokenizer.save(str(tmp_path / "t.json"))
    return load_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_have_the_tokens_of_their_text(family, tmp_path):
    tokenizer = ready(FAMILIES[family](), tmp_path)
    encoder = DocumentEncoder(Encoder(tokenizer), "uint16")
    assert segment_pattern(Encoder(tokenizer)) is not None
    draw = random.Random(family)
    texts = ["".join(draw.choices(ATOMS, k=draw.randint(1, 14))) for _ in range(8000)]
    expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for (text, got), wanted in zip(encoder.documents(texts), expected, strict=True):
        assert np.concatenate(got).tolist() == wanted.ids, (text, encoder._segments.findall(text))
        assert "".join(encoder._segments.findall(text)) == text
    assert len(encoder._known) < 50_000


@pytest.mark.parametrize(
    "other",
    [
        foreign(segments._CL100K.replace("{1,3}", "{1,4}")),
        foreign(segments._CL100K, normalizers.Lowercase()),
        foreign(segments._CL100K, added=["<tool_call>"]),
        foreign("", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        foreign("", pre_tokenizer=pre_tokenizers.Metaspace()),
    ],
    ids=["pattern", "normalizer", "added token", "prefix space", "metaspace"],
)
def test_documents_of_tokenizers_that_are_not_known_are_encoded_whole(other, tmp_path):
    tokenizer = ready(other, tmp_path)
    encoder = DocumentEncoder(Encoder(tokenizer), "uint32")
    assert encoder._segments is None
    texts = [text * 3 for text in TEXTS[:2]]
    got = [np.concatenate(ids).tolist() for _, ids in encoder.documents(texts)]
    assert got == [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def test_documents_over_a_batch_and_a_full_memory_change_nothing(tmp_path, monkeypatch):
    tokenizer = ready(FAMILIES["ours"](), tmp_path)
    draw = random.Random(1)
    texts = ["".join(draw.choices(ATOMS, k=draw.choice([3, 30, 900, 4000]))) for _ in range(60)]
    expected = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    for name, value in ("_BATCH_CHARS", 400), ("_PIECE_CHARS", 200), ("_MAX_SEGMENTS", 20), ("_MAX_KEPT", 3):
        monkeypatch.setattr(segments, name, value)
    encoder = DocumentEncoder(Encoder(tokenizer), "uint16")
    got = list(encoder.documents(texts))
    assert [text for text, _ in got] == texts and [np.concatenate(ids).tolist() for _, ids in got] == expected
    assert max(len(ids) for _, ids in got) > 1 and len(encoder._known) < 60
    assert all(ids.dtype == np.uint16 for _, parts in got for ids in parts)


def test_the_memory_of_short_documents_is_bounded(tmp_path, monkeypatch):
    for name, value in ("_BATCH_CHARS", 400), ("_MAX_SEGMENTS", 20), ("_MAX_KEPT", 3):
        monkeypatch.setattr(segments, name, value)
    encoder = DocumentEncoder(Encoder(ready(FAMILIES["ours"](), tmp_path)), "uint16")
    for _ in encoder.documents(f"word{number} of{number}\n" for number in range(500)):
        assert len(encoder._known) <= 20 + 400
    assert len(encoder._known) <= 20 and max(map(len, encoder._known), default=0) <= 3


def test_an_id_that_does_not_fit_is_refused(tmp_path):
    vocabulary = {"a": 1, "b": 70_000, "</s>": 0}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "t.json"))
    encoder = DocumentEncoder(Encoder(load_tokenizer(tmp_path / "t.json")), "uint16")
    with pytest.raises(OverflowError, match="do not fit uint16"):
        list(encoder.documents(["a", "b"]))
