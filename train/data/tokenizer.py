"""Byte-level BPE as in DeepSeek LLM (arXiv 2401.02954, section 2.1), and the loading of foreign tokenizers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from conf.paths import expanded
from model.problems import BadInput

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
SPECIAL_TOKENS = (BOS, EOS, *(f"<｜reserved▁{i}｜>" for i in range(13)))
"""The 15 special tokens, in the order of their ids, which follow the ordinary ones."""

MIN_VOCAB = 256 + len(SPECIAL_TOKENS)
"""One token for each byte and the special tokens: the smallest vocabulary that can write any text."""

DEEPSEEK_VOCAB = 100_000 + len(SPECIAL_TOKENS)
"""Tokens of DeepSeek LLM's own tokenizer, special ones included."""

RECIPE = 1
"""Raise it when `train_tokenizer` would make another tokenizer of the same text; prepared corpora depend on it."""

_EOS_NAMES = (EOS, "<|end_of_sentence|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_BEGINS = (BOS, "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|begin_of_text|>", "[CLS]", "<cls>")
_OTHERS = ("<pad>", "[PAD]", "<|pad|>", "<unk>", "[UNK]", "<|unk|>", "<mask>", "[MASK]", "[SEP]", "<sep>")

_CONTEXT = 16
_CONTEXTS = ("\n", "☃", ".", "0", "a", "(")
"""Characters for a piece of text to stand after where those before it merge with it; a tokenizer that merges all of
these with what follows them has not been met."""

# Alternatives in the order tried; together they match every character. A word or a run of punctuation takes the one
# space before it along. The longest run of other white space leaves that space to what follows, so that the indent
# of a line of code is one token and its first word the same token as in the middle of a line.
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}ー"
_LETTER = rf"[\p{{L}}\p{{M}}&&[^{_CJK}]]"
_PUNCTUATION = r"[^\s\p{L}\p{M}\p{N}]"
SPLIT = "|".join(
    (
        r"[\r\n]",
        r"\p{N}",
        rf" ?{_LETTER}+",
        rf" ?{_PUNCTUATION}+",
        rf"[{_CJK}]+",
        rf"[^\S\r\n]+(?= (?:{_LETTER}|{_PUNCTUATION}))",
        r"[^\S\r\n]+",
    )
)
"""What our tokenizer cuts text by before it looks for tokens."""


def too_small(key: str, size: int) -> str:
    """Say that a vocabulary `size`, set by `key`, is below `MIN_VOCAB`."""
    return (
        f"{key}={size}: byte-level BPE needs 256 bytes and {len(SPECIAL_TOKENS)} special tokens; "
        f"{MIN_VOCAB} or more would work"
    )


def train_tokenizer(texts: Iterator[str], vocab_size: int, *, progress: bool = False) -> "Tokenizer":
    """Train a byte-level BPE whose merges never cross newlines, digits, punctuation or CJK.

    Every digit and every newline is a token of its own; runs of spaces may be one. `decode(encode(x)) == x` for any
    text, as text that spells a special token is encoded as ordinary text.

    Args:
        texts: what to learn merges from.
        vocab_size: number of tokens, the 15 special ones included. A corpus too small to give so many merges makes
            a smaller vocabulary.
        progress: show the library's progress bars on stderr.

    Raises:
        BadInput: `vocab_size` is below `MIN_VOCAB`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB:
        raise BadInput([too_small("data.tokenizer_vocab_size", vocab_size)])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Added afterwards, because the trainer would put special tokens first.
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return _for_corpora(tokenizer)


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Load a `tokenizer.json`, set up to encode documents: no truncation, no padding, special names as plain text.

    Where the model itself knows a special token's name as a word, as Unigram models do, that takes an `Encoder` too.

    Args:
        path: the file, or a folder that holds one.

    Raises:
        BadInput: there is none, or it is not a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        return _for_corpora(Tokenizer.from_file(str(tokenizer_file(path))), _configured_names(tokenizer_file(path)))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(
            [f"data.tokenizer={path}: cannot be read ({error}); a tokenizer.json as saved by Hugging Face tokenizers, "
             "or null to train one on the corpus, would work"]
        ) from error  # fmt: skip


def tokenizer_file(path: str | Path) -> Path:
    """Name the tokenizer.json that `path`, a file or a folder, stands for; it need not exist."""
    path = expanded(path)
    return path / "tokenizer.json" if path.is_dir() else path


def size(tokenizer: "Tokenizer") -> int:
    """Count the rows that an embedding needs: the largest id and one, more than the tokens where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def eos_id(tokenizer: "Tokenizer", path: str | Path | None = None) -> int:
    """Find the id of the token that ends a document.

    Args:
        tokenizer: ours or a foreign one.
        path: where it was loaded from; a `tokenizer_config.json` beside it decides if it names an `eos_token`.

    Raises:
        BadInput: that token is unknown to the tokenizer, or none of the usual names is known.
    """
    said = f"data.tokenizer={path}"
    named = _configured(tokenizer_file(path), "eos_token") if path is not None else None
    if named is not None:
        found = tokenizer.token_to_id(named)
        if found is None:
            raise BadInput([f"{said}: tokenizer_config.json names {named!r} as eos_token, which the tokenizer does "
                            "not have; an eos_token among its tokens would work"])  # fmt: skip
        return found
    for name in _EOS_NAMES:
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    raise BadInput([f"{said}: no token ends a document, none of {', '.join(_EOS_NAMES)}; a tokenizer_config.json "
                    "beside it that names the eos_token would work"])  # fmt: skip


def bos_id(tokenizer: "Tokenizer", path: str | Path) -> int | None:
    """Find the id of the token that begins a text by the `tokenizer_config.json` beside a tokenizer.

    Args:
        tokenizer: ours or a foreign one.
        path: where it was loaded from.

    Returns:
        The id; None where no `bos_token` is named, or the tokenizer does not have it.
    """
    named = _configured(tokenizer_file(path), "bos_token")
    return tokenizer.token_to_id(named) if isinstance(named, str) else None


def config_file(tokenizer: Path) -> Path:
    """Name the tokenizer_config.json that belongs to a tokenizer.json; it need not exist."""
    return tokenizer.with_name("tokenizer_config.json")


def _configured(tokenizer: Path, key: str) -> str | None:
    """Return the name of a special token in the tokenizer_config.json beside a tokenizer; None where none is named."""
    try:
        named = json.loads(config_file(tokenizer).read_text("utf-8")).get(key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput([f"data.tokenizer={tokenizer}: the tokenizer_config.json beside it cannot be read ({error}); "
                        "a JSON object, or no such file, would work"]) from error  # fmt: skip
    # transformers writes either the token or an object that describes it.
    return named.get("content") if isinstance(named, dict) else named


def _configured_names(tokenizer: Path) -> list[str | None]:
    """The names of special tokens in the tokenizer_config.json beside a tokenizer; none where it cannot be read.

    The first is that of the end token, or None.
    """
    try:
        config = json.loads(config_file(tokenizer).read_text("utf-8"))
        named = [config.get("eos_token"), *(value for key, value in config.items() if key.endswith("_token"))]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            named += config.get(key) or []
        added = (config.get("added_tokens_decoder") or {}).values()
        named += [token for token in added if token.get("special")]
    except (OSError, ValueError, AttributeError, TypeError):  # `eos_id` says what is wrong with it
        return []
    names = [token.get("content") if isinstance(token, dict) else token for token in named]
    return [name if isinstance(name, str) else None for name in names]


def _for_corpora(tokenizer: "Tokenizer", named: Sequence[str | None] = ()) -> "Tokenizer":
    from tokenizers import models

    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Not saved in the file. Else a document that quotes the name of the end token would be cut in two.
    tokenizer.encode_special_tokens = True
    # It leaves out what is marked as special only, and foreign files do not always mark what serves as such. A name
    # that BPE has learned as a word, and that nobody added, is a word, unless it ends documents.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    others = [n for n in (*named[1:], *_BEGINS, *_OTHERS) if n in added or not isinstance(tokenizer.model, models.BPE)]
    ends = [*named[:1], next((n for n in _EOS_NAMES if tokenizer.token_to_id(n) is not None), None)]
    tokenizer.add_special_tokens([n for n in (*ends, *others) if n and tokenizer.token_to_id(n) is not None])
    return tokenizer


class Encoder:
    """A tokenizer's ids for text, in which no text can spell a special token, and pieces of a document join.

    Some models know the name of a special token as a word of their vocabulary: `</s>` inside a document would end it.
    Such a word is written in the tokens of its parts instead. And some tokenizers put a space before whatever they
    encode, which a piece from the middle of a document does not have; it is encoded after a few characters of
    context, whose tokens are taken away again.

    Args:
        tokenizer: from `train_tokenizer` or `load_tokenizer`.
        said: the setting that gave it, for messages.

    Raises:
        BadInput: text can spell a special token and nothing else can be written in its place.
    """

    def __init__(self, tokenizer: "Tokenizer", said: str = "data.tokenizer"):
        self._tokenizer, self._said = tokenizer, said
        added = tokenizer.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        # The token of unknown characters is theirs by right, and wrong only where text spells its name.
        self._fuses = set(tokenizer.encode("☃\U000f1234", add_special_tokens=False).ids) & special.keys()
        self._unknown = {number: special[number] for number in self._fuses}
        self._special = {number: name for number, name in special.items() if number not in self._fuses}
        self._is_special = np.zeros(size(tokenizer), dtype=bool)
        self._is_special[list(self._special)] = True
        self._escapes: dict[int, list[int]] = {}
        self._context_ids: dict[str, list[int]] = {}
        # A run of unknown characters, or a word with one in it, is one token.
        self._contexts = [text for text in _CONTEXTS if self._fuses.isdisjoint(self._ids_of(text))]
        problems = []
        for number, name in special.items():
            if self._can_be_spelled(number, name):
                try:
                    self._escape(number)
                except BadInput as error:
                    problems += error.problems if number in self._special else []
        self._unknown = {number: name for number, name in self._unknown.items() if number in self._escapes}
        if problems:
            raise BadInput(problems)

    @property
    def tokenizer(self) -> "Tokenizer":
        """What it encodes with."""
        return self._tokenizer

    @property
    def every_character_is_known(self) -> bool:
        """Whether no character becomes a token that stands for unknown ones."""
        return not self._fuses

    def problems(self, eos_id: int) -> list[str]:
        """Whether a token that is to end documents is the one of unknown characters as well: a sentence, or none."""
        if eos_id not in self._fuses:
            return []
        return [f"{self._said}: characters that it does not know become {self._tokenizer.id_to_token(eos_id)!r}, which "
                "would end a document; a tokenizer with a token of its own for them would work"]  # fmt: skip

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Encode a text, such as a prompt.

        Args:
            text: any; special tokens that it spells are ordinary text.
            add_special_tokens: let the tokenizer add those that it puts around a text.
        """
        return self._escaped(text, self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_batch(self, pieces: Sequence[tuple[str, str]]) -> list[NDArray[np.int64]]:
        """Encode pieces of documents, on all cores; the ids of a document's pieces join to those of the document.

        Args:
            pieces: of each what stands before it in its document, "" where it begins one, and its text.
        """
        contexts = [before[-_CONTEXT:] for before, _ in pieces]
        encodings = self._tokenizer.encode_batch_fast(
            [context + text for context, (_, text) in zip(contexts, pieces, strict=True)], add_special_tokens=False
        )
        made = []
        for context, (before, text), encoding in zip(contexts, pieces, encodings, strict=True):
            ids = np.asarray(encoding.ids, dtype=np.int64)
            skipped = self._ids_of(context)
            joins = not context or (skipped and ids[: len(skipped)].tolist() == skipped)
            plain = not self._is_special[ids].any() and not any(name in text for name in self._unknown.values())
            made.append(ids[len(skipped) :] if joins and plain else np.asarray(self._continued(before, text), np.int64))
        return made

    def _continued(self, before: str, text: str) -> list[int]:
        context, encoding, skipped = self._after(before, text)
        return self._escaped(context + text, encoding, skipped)

    def _after(self, before: str, text: str) -> tuple[str, "Encoding", int]:
        """Encode a text that stands after another: the context that it was given, and how many ids are that one's."""
        for context in (before[-_CONTEXT:], before[-1:], *self._contexts) if before else ():
            encoding, skipped = self._tokenizer.encode(context + text, add_special_tokens=False), self._ids_of(context)
            if skipped and encoding.ids[: len(skipped)] == skipped:
                return context, encoding, len(skipped)
        return "", self._tokenizer.encode(text, add_special_tokens=False), 0

    def _ids_of(self, context: str) -> list[int]:
        if len(self._context_ids) > 1 << 16:
            self._context_ids.clear()
        if context not in self._context_ids:
            self._context_ids[context] = self._tokenizer.encode(context, add_special_tokens=False).ids
        return self._context_ids[context]

    def _escaped(self, text: str, encoding: "Encoding", start: int = 0) -> list[int]:
        """The ids from `start` on, without special tokens but those that the tokenizer has put around the text."""
        if self._special.keys().isdisjoint(encoding.ids) and self._unknown.keys().isdisjoint(encoding.ids):
            return encoding.ids[start:]
        ids: list[int] = []
        each = zip(encoding.ids, encoding.special_tokens_mask, encoding.offsets, strict=True)
        for number, is_around, (begin, end) in list(each)[start:]:
            spelled = text[begin:end].strip()
            times = 0
            if not is_around and number in self._special:
                times = 1
            elif name := self._unknown.get(number, ""):  # runs of unknown characters are one token
                times = spelled.count(name) if spelled == name * spelled.count(name) else 0
            ids += self._escape(number) * times if times else [number]
        return ids

    def _can_be_spelled(self, number: int, name: str) -> bool:
        probes = (name, f"a{name}b", f"a {name} b", name * 2, f"\n{name}\n")
        return any(number in e.ids for e in self._tokenizer.encode_batch(list(probes), add_special_tokens=False))

    def _escape(self, number: int) -> list[int]:
        """Ordinary tokens that read as a special one: those of the two parts of its name, cut where that reads best."""
        if number in self._escapes:
            return self._escapes[number]
        name = self._special.get(number) or self._unknown[number]
        decode = self._tokenizer.decode
        probes = [self._tokenizer.encode(t, add_special_tokens=False).ids for t in (f"a{name}b", f"a {name} b")]
        ranked: list[tuple[Any, list[int]]] = []
        for at in range(1, len(name)):
            encode = [self._tokenizer.encode(name[:at], add_special_tokens=False).ids, self._raw_after("a", name[:at])]
            for head in encode:
                ids = head + self._raw_after(name[:at], name[at:])
                if not ids or not self._special.keys().isdisjoint(ids) or number in ids:
                    continue
                wrong = sum(
                    decode(ids_of, skip_special_tokens=False)
                    != decode([x for i in ids_of for x in (ids if i == number else [i])], skip_special_tokens=False)
                    for ids_of in probes
                )
                ranked.append(((wrong, sum(i in self._fuses for i in ids), len(ids)), ids))
        if not ranked:
            raise BadInput([f"{self._said}: text that spells {name!r} becomes that special token, and no other tokens "
                            f"can be written for it; a tokenizer that has {name!r} as an added token alone, and not "
                            "in its model's vocabulary, would work"])  # fmt: skip
        self._escapes[number] = min(ranked)[1]
        return self._escapes[number]

    def _raw_after(self, before: str, text: str) -> list[int]:
        """As `_continued`, with whatever special tokens the text spells."""
        _, encoding, skipped = self._after(before, text)
        ids: list[int] = encoding.ids
        return ids[skipped:]
