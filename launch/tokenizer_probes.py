"""What a tokenizer does with any text: round trips, special tokens that text spells, digits, white space, CJK."""

import random
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import regex

from train.data.tokenizer import Encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SURROGATES = range(0xD800, 0xE000)
_PIECE = 256
"""Characters of a text in which all of Unicode is gone through."""
_RANDOM_LENGTH = 64
_MAX_NAMED = 5
_PROSE = {  # Universal Declaration of Human Rights, article 1
    "Chinese": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、"
    "理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 "
    "부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
}
_NUMBERS = ("0123456789", "in 2024, 3.14159 of 1,000,000", "x=10;y=0xFF99", "٣٤٥", "１２３", "८९")
_KINDS = {
    "several digits": regex.compile(r"\p{N}.*\p{N}", regex.DOTALL),
    "digits and letters": regex.compile(r"\p{N}.*\p{L}|\p{L}.*\p{N}", regex.DOTALL),
    "a newline and something else": regex.compile(r"[\r\n].|.[\r\n]", regex.DOTALL),
    "CJK and other letters": regex.compile(
        r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}].*[\p{Latin}\p{Cyrillic}\p{Greek}\p{Arabic}]"
        r"|[\p{Latin}\p{Cyrillic}\p{Greek}\p{Arabic}].*[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]",
        regex.DOTALL,
    ),
    "letters and punctuation": regex.compile(r"\p{L}.*\p{P}|\p{P}.*\p{L}", regex.DOTALL),
}


def probes(tokenizer: "Tokenizer", encoder: Encoder, special: dict[int, str]) -> dict[str, Any]:
    """Try a tokenizer on texts that are made for it.

    Args:
        tokenizer: decodes.
        encoder: encodes documents as preparation does.
        special: the special tokens by id.

    Returns:
        JSON-able findings: `round_trip` and `spelled`, which have to be without failures, and `digits`, `white_space`,
        `cjk`.
    """
    return {
        "round_trip": round_trip(tokenizer, encoder, [*every_character(), *random_texts()]),
        "spelled": spelled(tokenizer, encoder, special),
        "digits": {text: len(encoder.encode(text)) for text in _NUMBERS},
        "white_space": white_space(encoder),
        "cjk": {name: len(text.encode("utf-8")) / len(encoder.encode(text)) for name, text in _PROSE.items()},
    }


def every_character() -> Iterator[str]:
    """Go through all 1,112,064 characters that UTF-8 can hold, NUL and unassigned ones among them."""
    for start in range(0, sys.maxunicode + 1, _PIECE):
        if start not in _SURROGATES:
            yield "".join(map(chr, range(start, start + _PIECE)))


def round_trip(tokenizer: "Tokenizer", encoder: Encoder, texts: Sequence[str]) -> dict[str, Any]:
    """Encode and decode texts.

    Returns:
        How many texts and characters were tried, how many texts came back otherwise, and the first few of these.
    """
    failed = []
    for start in range(0, len(texts), _PIECE):
        batch = texts[start : start + _PIECE]
        ids = encoder.encode_batch([("", text) for text in batch])
        backs = tokenizer.decode_batch([each.tolist() for each in ids], skip_special_tokens=False)
        for text, back in zip(batch, backs, strict=True):
            if text != back:
                failed.append((text, back))
    return {
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "failed": len(failed),
        "examples": [_difference(*pair) for pair in failed[:_MAX_NAMED]],
    }


def random_texts(number: int = 2000, seed: int = 1) -> Iterator[str]:
    """Draw texts of characters of all planes, with combining and control characters and runs of white space."""
    draw = random.Random(seed)
    for _ in range(number):
        yield _random_text(draw)


def _random_text(draw: random.Random) -> str:
    ranges = [(0, 0x20), (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x2000, 0x2070), (0x4E00, 0xA000)]
    ranges += [(0xAC00, 0xD7A4), (0xE000, 0x10000), (0x1F300, 0x1FB00), (0x20000, 0x30000), (0x100000, 0x110000)]
    spaces = " \n\t\r\x0b\x85\xa0\u2028\u3000\ufeff\u200d"
    drawn = []
    for _ in range(_RANDOM_LENGTH):
        spaced = draw.random() < 0.2
        drawn.append(draw.choice(spaces) * draw.randint(1, 9) if spaced else chr(draw.randrange(*draw.choice(ranges))))
    return "".join(drawn)


def _difference(text: str, back: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    return f"{text[max(0, at - 4) : at + 4]!a} came back as {back[max(0, at - 4) : at + 4]!a}"


def spelled(tokenizer: "Tokenizer", encoder: Encoder, special: dict[int, str]) -> dict[str, Any]:
    """Spell every special token in text, alone and within it, and see whether it stays text.

    Returns:
        How many names were tried, and the names of those that became the token, or that did not come back.
    """
    failed = []
    for name in special.values():
        for text in (name, f"a{name}b", f"the {name} of it\n", name * 2):
            ids = encoder.encode(text)
            if not special.keys().isdisjoint(ids) or tokenizer.decode(ids, skip_special_tokens=False) != text:
                failed.append(name)
                break
    return {"names": len(special), "failed": failed}


def white_space(encoder: Encoder) -> dict[str, Any]:
    """Count tokens of white space before a word, as indented code has it.

    Returns:
        Tokens that an indentation of 4, 8, 16 and 32 spaces adds to a word after one space, that 1 and 4 tabs add to a
        word, and those of 2 newlines.
    """
    after_space, alone = len(encoder.encode(" return")), len(encoder.encode("return"))
    found = {f"{n} spaces": len(encoder.encode(" " * n + "return")) - after_space for n in (4, 8, 16, 32)}
    found |= {f"{n} tab{'s' * (n > 1)}": len(encoder.encode("\t" * n + "return")) - alone for n in (1, 4)}
    return {**found, "2 newlines": len(encoder.encode("\n\n"))}


def kinds_of_tokens(texts: Sequence[str]) -> dict[str, int]:
    """Count the tokens of a vocabulary that mix what a tokenizer may keep apart; one may be of several kinds."""
    return {kind: sum(pattern.search(text) is not None for text in texts) for kind, pattern in _KINDS.items()}
