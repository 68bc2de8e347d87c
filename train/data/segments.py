"""Documents to token ids, by what recurs in them: text is cut where its tokens are cut, and each piece encoded once.

A tokenizer cuts text into words before it looks for tokens, and most words of a corpus have been met before. Its own
library does the cutting anew for each, at two to three megabytes a second and core. Here a regular expression of Python
cuts text only where the tokenizer is known to cut, wherever it stands and whatever follows, so that the tokens of the
segments are those of the text; a segment that was met before costs a look into a dictionary. Which tokenizers are known
stands in `_FAMILIES`; all others encode whole documents.

Why a segment's tokens are its text's: the pre-tokenizers of all families match from left to right. None of their
alternatives goes on over the places that end a segment, and none that begins there looks back; the one that looks
ahead, at the end of white space, finds the end of the text where it would find what is no white space.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.tokenizer import SPLIT, Encoder

_BATCH_CHARS = 1 << 22
"""Characters that are encoded together."""
_PIECE_CHARS = 1 << 18
"""Encoding needs a hundred bytes for each byte of text, so that longer text is encoded in pieces."""
_MAX_KEPT = 64
"""Characters of a segment that is remembered; longer ones hardly recur."""
_MAX_SEGMENTS = 400_000
"""Segments that are remembered: about 80 MB."""

# ASCII of three kinds. What follows must be ASCII as well: é would go on the word, and so may what combines with it.
_AFTER_WORD = r"(?=[ \t\n!-/0-9:-@\[-`{-~]|\Z)"
_AFTER_MARKS = r"(?=[ \t\n0-9A-Za-z]|\Z)"
_MARKS = r"[!-/:-@\[-`{-~]"
# Up to a single space that stands between what is no white space, over whatever lies in between.
_ANY = r"\s*\S+(?:(?! \S)\s+\S+)*(?:\s+\Z)?|\s+"
# The same, but ending as well after the last newline of white space.
_LINES = r"\s*\S+(?:(?! \S)(?!\s*\n(?!\s*\r))\s+\S+)*(?:\s*\n(?!\s*\r)|\s+\Z)?|\s+"

# Every newline and digit is a token of its own, letters and marks are never in one.
_OURS = rf"[ \t]*(?:[A-Za-z]+{_AFTER_WORD}|{_MARKS}+{_AFTER_MARKS}|[0-9](?=[\x20-\x7e\n\t]|\Z)|\n)|{_LINES}"
# One mark in front of letters may be theirs, as may an apostrophe; a run of white space may take newlines along.
_WORDS = rf"\s*{_MARKS}*[A-Za-z]+{_AFTER_WORD}|[ ]?[0-9]+(?=[ \n!-/:-~]|\Z)|{_ANY}"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_FAMILIES = {SPLIT: _OURS, _GPT2: _WORDS, _CL100K: _WORDS, _QWEN2: _WORDS}
"""The segments of tokenizers by the pattern that they cut with: ours, GPT-2's, that of GPT-4 and Llama 3, Qwen's."""


class DocumentEncoder:
    """Encodes documents, each as a whole, into ids of one type.

    Args:
        encoder: of a tokenizer.
        dtype: an unsigned integer type that holds every id.
    """

    def __init__(self, encoder: Encoder, dtype: str):
        self._encoder, self._dtype = encoder, np.dtype(dtype)
        pattern = segment_pattern(encoder)
        self._segments = re.compile(pattern) if pattern else None
        self._known: dict[str, bytes] = {}

    def documents(self, texts: Iterable[str]) -> Iterator[tuple[str, list[NDArray]]]:
        """Encode texts in their order, many at a time.

        Yields:
            A text and its ids, in one array or in several one after another.
        """
        batch: list[str] = []
        chars = 0
        for text in texts:
            batch.append(text)
            chars += len(text)
            if chars >= _BATCH_CHARS:
                yield from zip(batch, self._encode(batch), strict=True)
                batch, chars = [], 0
        yield from zip(batch, self._encode(batch), strict=True)

    def _encode(self, texts: Sequence[str]) -> Iterator[list[NDArray]]:
        if self._segments is None:
            yield from self._encode_pieces(texts)
            return
        whole = [text for text in texts if len(text) <= _BATCH_CHARS]
        each = iter(self._joined([self._segments.findall(text) for text in whole]))
        for text in texts:
            yield [next(each)] if len(text) <= _BATCH_CHARS else list(self._encode_long(text))

    def _encode_long(self, text: str) -> Iterator[NDArray]:
        assert self._segments is not None
        segments = (found.group() for found in self._segments.finditer(text))
        while some := list(islice(segments, _PIECE_CHARS)):
            yield from self._joined([some])

    def _joined(self, texts: Sequence[list[str]]) -> list[NDArray]:
        """The ids of texts, given as their segments; of those that are not known, each is encoded once."""
        known = self._known
        new = list(dict.fromkeys(segment for text in texts for segment in text if segment not in known))
        for segment, ids in zip(new, self._encode_pieces(new), strict=True):
            known[segment] = b"".join(part.tobytes() for part in ids)
        joined = [np.frombuffer(b"".join(map(known.__getitem__, text)), self._dtype) for text in texts]
        if len(known) > _MAX_SEGMENTS:
            known.clear()
        for segment in new:
            if len(segment) > _MAX_KEPT:
                known.pop(segment, None)
        return joined

    def _encode_pieces(self, texts: Sequence[str]) -> Iterator[list[NDArray]]:
        """Encode texts by the tokenizer's library, long ones in pieces."""
        batch: list[tuple[str, str]] = []
        owners: list[int] = []
        made: list[list[NDArray]] = [[] for _ in texts]
        chars = 0

        def flush() -> None:
            for owner, ids in zip(owners, self._encoder.encode_batch(batch), strict=True):
                made[owner].append(self._narrowed(ids))
            batch.clear()
            owners.clear()

        for owner, text in enumerate(texts):
            before = ""
            for piece in cut(text, _PIECE_CHARS):
                chars += len(piece)
                if chars >= _BATCH_CHARS:
                    flush()
                    chars = len(piece)
                batch.append((before, piece))
                owners.append(owner)
                before = piece
        flush()
        yield from made

    def _narrowed(self, ids: NDArray[np.int64]) -> NDArray:
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= np.iinfo(self._dtype).max:
            raise OverflowError(f"token ids from {ids.min()} to {ids.max()} do not fit {self._dtype}")
        return ids.astype(self._dtype)


def segment_pattern(encoder: Encoder) -> str | None:
    """Return the regular expression of segments whose tokens are those of their text; None where none is known."""
    described: dict[str, Any] = json.loads(encoder.tokenizer.to_str())
    model, normalizer, before = (described[key] for key in ("model", "normalizer", "pre_tokenizer"))
    if not before or model["type"] != "BPE" or model.get("dropout") or not encoder.every_character_is_known:
        return None
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token")):
        return None
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    if not all(token["special"] for token in described["added_tokens"]):  # found in the text before it is cut
        return None
    return _FAMILIES.get(_split_pattern(before) or "")


def _split_pattern(before: dict[str, Any]) -> str | None:
    """The pattern that a pre-tokenizer cuts by before it goes over to bytes; None if it does anything besides."""
    if before["type"] == "ByteLevel":
        return _GPT2 if before.get("use_regex", True) and not before["add_prefix_space"] else None
    if before["type"] != "Sequence" or len(before["pretokenizers"]) != 2:
        return None
    split, to_bytes = before["pretokenizers"]
    if split["type"] != "Split" or to_bytes["type"] != "ByteLevel":
        return None
    plain = split["behavior"] == "Isolated" and not split["invert"]
    plain = plain and not to_bytes["add_prefix_space"] and not to_bytes.get("use_regex", True)
    pattern: str | None = split["pattern"].get("Regex")
    return pattern if plain else None


def cut(text: str, limit: int) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters, that tokenise as the whole does wherever possible.

    Pieces end after a newline that no space follows, else before a single space between words: both are boundaries to
    the usual tokenizers. Only where the second half of a piece has neither is it cut anywhere. `Encoder` sees to it
    that a tokenizer takes no piece for the beginning of a document.
    """
    start = 0
    while len(text) - start > limit:
        end = _boundary(text, start + limit // 2, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _boundary(text: str, low: int, high: int) -> int:
    at = high
    while (at := text.rfind("\n", low, at)) >= 0:
        if not text[at + 1].isspace():
            return at + 1
    at = high
    while (at := text.rfind(" ", low, at)) > low:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return high
