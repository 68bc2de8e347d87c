"""How many bytes of text each token of a tokenizer stands for, by which losses of models with different ones compare.

Bits per byte are the nats of the labels, divided by ln 2 and by the bytes of UTF-8 that these labels stand for (Gao et
al., "The Pile", arXiv 2101.00027, section 3.1). A special token, the end of a document among them, stands for no bytes;
its nats count, as they do in the loss, since where a text ends is a part of what is predicted, once for each document
with every tokenizer. lm-eval's bits_per_byte of a document leaves its end out.
"""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model.loss import IGNORED
from train.data.tokenizer import size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of UTF-8 that tokens stand for.

    Attributes:
        counts: int64 (V,), by token.
        first_counts: int64 (V,), of a token that begins a document: some tokenizers put a space before whatever they
            encode, which is not in the text.
        end: the token that ends a document.
        inexact: why the counts are not exactly those of the text, in a clause; None where they are.
    """

    counts: NDArray[np.int64]
    first_counts: NDArray[np.int64]
    end: int
    inexact: str | None

    def of_labels(self, tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> int:
        """Count the bytes of the labels that are not ignored; `tokens` are the inputs, of the same shape."""
        counted = labels != IGNORED
        known = np.where(counted, labels, 0)
        return int(np.where(tokens == self.end, self.first_counts[known], self.counts[known])[counted].sum())


def token_bytes(tokenizer: "Tokenizer", end: int) -> TokenBytes:
    """Count the bytes that each token of a tokenizer stands for.

    They are exact for byte-level tokenizers and for those that write unknown characters byte by byte, where no
    normalizer changes the text. Elsewhere they are those of the text that the tokens spell: characters that a tokenizer
    does not know have none, and white space that it drops is a single space.

    Args:
        tokenizer: loaded by `train.data.tokenizer.load_tokenizer`, which marks its special tokens.
        end: the token that ends a document.
    """
    counts = np.zeros(size(tokenizer), dtype=np.int64)
    first_counts = counts.copy()
    raw = bytes_of_tokens(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    raw |= {number: b"" if token.special else token.content.encode("utf-8") for number, token in added.items()}
    begins = tokenizer.encode("a", add_special_tokens=False).ids
    puts_space = _is_word_level(_described(tokenizer)) or (bool(begins) and raw[begins[0]].startswith(b" "))
    for number, spelled in raw.items():
        counts[number] = len(spelled)
        first_counts[number] = len(spelled) - (puts_space and spelled.startswith(b" "))
    return TokenBytes(counts, first_counts, end, _inexact(_described(tokenizer)))


def bytes_of_tokens(tokenizer: "Tokenizer") -> dict[int, bytes]:
    """Return the bytes that each token of the model's own vocabulary stands for, by id; those added to it are left out.

    Of tokenizers that are not byte-level they are those of the token's text, in which a ▁ is a space and <0xE2> a byte.
    What WordPiece and WordLevel do not mark as a part of a word stands behind a space.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    described = _described(tokenizer)
    if _is_byte_level(described):
        byte_of = _alphabet()
        return {
            number: bytes(byte_of[char] for char in token) if all(char in byte_of for char in token) else token.encode()
            for token, number in vocabulary.items()
        }
    if _is_word_level(described):
        part = described["model"].get("continuing_subword_prefix")
        return {
            number: token.removeprefix(part).encode() if part and token.startswith(part) else f" {token}".encode()
            for token, number in vocabulary.items()
        }
    return {
        number: bytes([int(byte[1], 16)]) if (byte := _BYTE.fullmatch(token)) else token.replace("▁", " ").encode()
        for token, number in vocabulary.items()
    }


def _described(tokenizer: "Tokenizer") -> dict[str, Any]:
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


def _is_byte_level(described: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(described.get("decoder"))


def _is_word_level(described: dict[str, Any]) -> bool:
    return described["model"]["type"] in ("WordPiece", "WordLevel")


def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a byte that prints is its own character, the others are those from 256 on."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def _inexact(described: dict[str, Any]) -> str | None:
    """Say why the tokens do not spell exactly the text that they were made of; None where they do."""
    why = []
    changing = [one["type"] for one in _steps(described.get("normalizer")) if not _keeps_text(one)]
    if changing:
        why.append(f"its normalizer ({', '.join(changing)}) changes the text before")
    if not _is_byte_level(described) and not described["model"].get("byte_fallback"):
        why.append("characters that it does not know stand for no bytes")
    if _is_word_level(described):
        why.append("white space between words is taken for one space")
    return " and ".join(why) or None


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [step for one in normalizer["normalizers"] for step in _steps(one)]
    return [normalizer]


def _keeps_text(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer does no more than to write spaces as ▁, or to put one in front."""
    if normalizer["type"] == "Replace":
        return normalizer.get("pattern") == {"String": " "} and normalizer.get("content") == "▁"
    return normalizer["type"] == "Prepend" and normalizer.get("prepend") in ("▁", " ")
