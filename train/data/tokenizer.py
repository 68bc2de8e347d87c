"""Byte-level BPE as in DeepSeek LLM (arXiv 2401.02954, section 2.1), and the loading of foreign tokenizers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.problems import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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

# Alternatives in the order tried; together they match every character. A word or a run of punctuation takes the one
# space before it along. The longest run of other white space leaves that space to what follows, so that the indent
# of a line of code is one token and its first word the same token as in the middle of a line.
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}ー"
_LETTER = rf"[\p{{L}}\p{{M}}&&[^{_CJK}]]"
_PUNCTUATION = r"[^\s\p{L}\p{M}\p{N}]"
_SPLIT = "|".join(
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
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
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

    Args:
        path: the file, or a folder that holds one.

    Raises:
        BadInput: there is none, or it is not a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        return _for_corpora(Tokenizer.from_file(str(tokenizer_file(path))))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(
            [f"data.tokenizer={path}: cannot be read ({error}); a tokenizer.json as saved by Hugging Face tokenizers, "
             "or null to train one on the corpus, would work"]
        ) from error  # fmt: skip


def tokenizer_file(path: str | Path) -> Path:
    """Name the tokenizer.json that `path`, a file or a folder, stands for; it need not exist."""
    path = Path(path).expanduser()
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
    named = _configured_eos(tokenizer_file(path)) if path is not None else None
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


def config_file(tokenizer: Path) -> Path:
    """Name the tokenizer_config.json that belongs to a tokenizer.json; it need not exist."""
    return tokenizer.with_name("tokenizer_config.json")


def _configured_eos(tokenizer: Path) -> str | None:
    try:
        named = json.loads(config_file(tokenizer).read_text("utf-8")).get("eos_token")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput([f"data.tokenizer={tokenizer}: the tokenizer_config.json beside it cannot be read ({error}); "
                        "a JSON object, or no such file, would work"]) from error  # fmt: skip
    # transformers writes either the token or an object that describes it.
    return named.get("content") if isinstance(named, dict) else named


def _for_corpora(tokenizer: "Tokenizer") -> "Tokenizer":
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Not saved in the file. Else a document that quotes the name of the end token would be cut in two.
    tokenizer.encode_special_tokens = True
    return tokenizer
