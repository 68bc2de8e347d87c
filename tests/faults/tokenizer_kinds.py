"""Small tokenizers of every kind that foreign models come with, trained on the same text."""

import json
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIALS = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "One line of text ends here.\nanother begins, with 12 numbers and </s> or <s> in it;\n\n" * 5,
    "def add(a, b):\n    return a + b\n\n\nx = [1, 2, 3]  # two  spaces\n" * 5,
    "你好世界 naïve café ☃ — “quoted”\n" * 5,
]


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _bpe(**more) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, show_progress=False, **more)


def _byte_level(prefix: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=prefix)
    return _trained(made, _bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def _llama_2() -> Tokenizer:
    """No pre-tokenizer; the space is put before every text by a normalizer; bytes for what is unknown."""
    vocabulary = {token: number for number, token in enumerate(SPECIALS)}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    _trained(learned, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    for token, _ in sorted(learned.get_vocab().items(), key=lambda item: item[1]):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(m) for m in json.loads(learned.to_str())["model"]["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(SPECIALS)
    return made


def _metaspace(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(made, _bpe())


def _unigram(scheme: str, split: bool = True) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False,
        initial_alphabet=[chr(c) for c in range(32, 127)],
    )  # fmt: skip
    return _trained(made, trainer)


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)
    return _trained(made, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False))


def word_level(words: dict[str, int]) -> Tokenizer:
    """Words between spaces, and nothing else."""
    made = Tokenizer(models.WordLevel({**{token: i for i, token in enumerate(SPECIALS)}, **words}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def _not_marked() -> Tokenizer:
    """The special tokens are added, and not said to be special."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    _trained(made, trainer)
    made.add_tokens([AddedToken(name, special=False) for name in SPECIALS])
    return made


def _whole_words() -> Tokenizer:
    """BPE that takes a word of its vocabulary as it is, as Llama 3's does, and has the special ones in it."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(r" |[^ ]+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return _trained(made, _bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": lambda: _byte_level(False),
    "byte-level BPE, prefix space": lambda: _byte_level(True),
    "BPE, prepend and byte fallback": _llama_2,
    "BPE, metaspace first": lambda: _metaspace("first"),
    "BPE, metaspace always": lambda: _metaspace("always"),
    "BPE, metaspace never": lambda: _metaspace("never"),
    "BPE, whole words": _whole_words,
    "BPE, not marked special": _not_marked,
    "Unigram, metaspace always": lambda: _unigram("always"),
    "Unigram, metaspace first": lambda: _unigram("first"),
    "Unigram, words not split": lambda: _unigram("always", split=False),
    "WordPiece": _word_piece,
    "WordLevel": lambda: word_level({"word": 3, "a": 4, "b": 5, "x": 6}),
}
