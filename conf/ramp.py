"""Batch size ramp-ups: `train.global_batch` as a function of the tokens trained on so far."""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

EXAMPLE = '"0:768 250e9:1536"'


@dataclass(frozen=True)
class Rung:
    """A part of a batch size ramp-up.

    Attributes:
        tokens: trained on before the first step that has this batch, at least.
        global_batch: sequences per optimizer step, over all ranks.
    """

    tokens: int
    global_batch: int


def rungs(global_batch: int | str) -> list[Rung]:
    """Read `train.global_batch`: a number, or pairs of tokens and a number, such as ``0:768 250e9:1536``.

    Returns:
        The rungs in order, the first of which begins at 0 tokens.

    Raises:
        ValueError: it is neither; the message is the clause that says why and what would work.
    """
    if isinstance(global_batch, int):
        return [Rung(0, global_batch)]
    parts = global_batch.split()
    if len(parts) == 1 and ":" not in parts[0]:
        return [Rung(0, _whole(parts[0]))]
    found = []
    for part in parts:
        tokens, colon, batch = part.partition(":")
        if not colon:
            raise ValueError(f"{part} is no pair of tokens and a batch; {EXAMPLE} would work")
        found.append(Rung(_tokens(tokens), _whole(batch)))
    if not found or found[0].tokens != 0:
        begins = f"begins at {found[0].tokens:,} tokens" if found else "is empty"
        raise ValueError(f"{begins}, and the first steps need a batch as well; {EXAMPLE} would work")
    for before, after in itertools.pairwise(found):
        if before.tokens >= after.tokens:
            raise ValueError(
                f"{after.tokens:,} tokens stand after {before.tokens:,}; pairs in the order of their tokens would work"
            )
    return found


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"a batch of {text or 'nothing'} is no whole number of sequences; {EXAMPLE} would work")
    return int(text)


def _tokens(text: str) -> int:
    """Read a number of tokens, such as 250e9; a step begins with whole tokens, so that it is rounded up."""
    try:
        value = float(text)
        if not 0 <= value < 2**63:
            raise ValueError
        return math.ceil(Fraction(text))
    except ValueError:
        raise ValueError(f"{text or 'nothing'} is no number of tokens, such as 250e9; {EXAMPLE} would work") from None
