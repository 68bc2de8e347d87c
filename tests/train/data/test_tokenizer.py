import json

import pytest
from tokenizers import Tokenizer, models

from model.problems import BadInput
from train.data.tokenizer import (
    BOS,
    EOS,
    MIN_VOCAB,
    SPECIAL_TOKENS,
    eos_id,
    load_tokenizer,
    size,
    train_tokenizer,
)

TEXTS = [
    "def add(a, b):\n        return a + b  # the sum\n" * 20,
    "In 1234 and 1234, 12:34!? (1234)\n\n\n" * 20,
    "你好世界，你好世界abc你好世界 コーヒー 한국어\n" * 20,
    "\t\tif x:\r\n\t\t\tpass\r\n" * 20,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), 600)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [text[start:end] for start, end in tokenizer.encode(text).offsets]


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS,
        "",
        " leading and trailing  ",
        "".join(map(chr, range(0x250))),
        "e\u0301 \u200b\u2028 \U0001f600\U0001f1e8\U0001f1ed ١٢٣ ½ ﷽",
        f"a document on {BOS} and {EOS}",
        "\x00\x1f\ufeff\ufffd\U0010ffff",
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_byte_has_a_token_and_specials_come_last(tokenizer):
    assert size(tokenizer) == tokenizer.get_vocab_size() <= 600
    first = size(tokenizer) - 15
    assert [tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(first, first + 15))
    assert SPECIAL_TOKENS[:2] == (BOS, EOS)
    untrained = train_tokenizer(iter([]), MIN_VOCAB)
    assert size(untrained) == 271
    assert len(untrained.encode("語 \x00\n").ids) == 6
    assert sum(len(token) == 1 for token in untrained.get_vocab()) == 256


def test_the_names_of_special_tokens_are_text(tokenizer):
    ids = tokenizer.encode(f"x{EOS}y").ids
    assert max(ids) < size(tokenizer) - 15


def test_digits_and_newlines_stand_alone(tokenizer):
    assert pieces(tokenizer, "1234") == ["1", "2", "3", "4"]
    assert pieces(tokenizer, "\n\n\r\n") == ["\n", "\n", "\r", "\n"]


def test_no_token_mixes_kinds(tokenizer):
    """Of text in which every pair of neighbours is frequent enough to merge, were it allowed."""

    def kind(char: str) -> str:
        if char in "\r\n" or char.isnumeric():
            return "alone"
        if "\u3040" <= char <= "\u30ff" or "\u4e00" <= char <= "\u9fff" or "\uac00" <= char <= "\ud7a3":
            return "cjk"
        return "letter" if char.isalpha() else "space" if char.isspace() else "punctuation"

    for text in TEXTS:
        for piece in pieces(tokenizer, text):
            body = piece[1:] if piece.startswith(" ") and piece.strip() else piece
            kinds = {kind(char) for char in body}
            assert len(kinds) == 1, piece
            assert kinds != {"alone"} or len(piece) == 1, piece
            assert kinds != {"cjk"} or piece == body, piece


def test_what_may_merge_does(tokenizer):
    assert pieces(tokenizer, "def add(a):\n        return a") == [
        "def", " add", "(", "a", "):", "\n", "       ", " return", " a",
    ]  # fmt: skip
    assert "你好世界" in pieces(tokenizer, "，你好世界a")
    assert pieces(tokenizer, "\t\tif x") == ["\t\t", "if", " x"]


def test_training_is_repeatable(tokenizer):
    assert train_tokenizer(iter(TEXTS), 600).to_str() == tokenizer.to_str()


def test_too_small_a_vocabulary():
    with pytest.raises(BadInput, match=r"^data\.tokenizer_vocab_size=270: .*; 271 or more would work$"):
        train_tokenizer(iter([]), MIN_VOCAB - 1)


def test_load(tokenizer, tmp_path):
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert [e.ids for e in loaded.encode_batch([f"one two 3 4 5 {EOS}", "a"])] == [
            tokenizer.encode(f"one two 3 4 5 {EOS}").ids, tokenizer.encode("a").ids,
        ]  # fmt: skip


def test_load_what_is_none(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    for path in (tmp_path / "t.json", tmp_path / "missing.json"):
        with pytest.raises(BadInput, match=rf"^data\.tokenizer={path}: cannot be read"):
            load_tokenizer(path)


def foreign(*names: str) -> Tokenizer:
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    made.add_tokens(["x"])
    made.add_special_tokens(list(names))
    return made


@pytest.mark.parametrize("name", [EOS, "<|end_of_sentence|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_eos_by_name(name):
    assert eos_id(foreign("<s>", name)) == 4
    assert size(foreign("<s>", name)) == 5


@pytest.mark.parametrize("value", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_eos_by_configuration(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
    made = foreign("</s>", "<stop>")
    assert eos_id(made, tmp_path) == eos_id(made, tmp_path / "tokenizer.json") == 4
    assert eos_id(made) == 3
    with pytest.raises(BadInput, match=r"^data\.tokenizer=.*names '<stop>' as eos_token, which"):
        eos_id(foreign("</s>"), tmp_path)


def test_eos_configuration_that_names_none_or_is_broken(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": null}')
    assert eos_id(foreign("</s>"), tmp_path) == 3
    config.write_text("{")
    with pytest.raises(BadInput, match=r"^data\.tokenizer=.*tokenizer_config\.json beside it cannot be read"):
        eos_id(foreign("</s>"), tmp_path)


def test_no_eos():
    with pytest.raises(BadInput, match=r"^data\.tokenizer=/t: no token ends a document.*</s>"):
        eos_id(foreign("<s>"), "/t")
