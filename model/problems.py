"""What a user did that cannot work, said so that they can mend it: the error, and the words for what would work."""

from collections.abc import Iterable, Sequence


class BadInput(Exception):
    """Settings or data that cannot work; raised with every problem found, not only the first.

    Args:
        problems: one sentence each, of the form ``key=value: what is wrong; what would work``.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["BadInput"], tuple[list[str]]]:
        return BadInput, (self.problems,)  # what an exception is made of again by default is its text


def not_utf8(key: str, text: str) -> list[str]:
    """Say that a text has no UTF-8 form, as what a terminal of another encoding sends has none.

    Args:
        key: the setting or argument that it is the value of.
        text: as Python has it, with a surrogate for each byte that could not be read.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        shown = text.encode("utf-8", "backslashreplace").decode()
        return [f"{key}={shown}: is not UTF-8; the same text would work from a terminal whose locale is UTF-8"]
    return []


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of `number` just below and just above `wanted`, whichever exist."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted]
    above = [d for d in divisors if d > wanted]
    return below[-1:] + above[:1]


def nearest_multiples(number: int, unit: int) -> list[int]:
    """The positive multiples of `unit` just below and just above `number`, which is none itself."""
    return [multiple for multiple in (number // unit * unit, -(-number // unit) * unit) if multiple]


def nearest(candidates: Iterable[int], wanted: int) -> list[int]:
    """The two candidates nearest to `wanted`, ascending."""
    return sorted(sorted(candidates, key=lambda candidate: abs(candidate - wanted))[:2])


def either(key: str, values: Sequence[object]) -> str:
    """``key=4 or key=8``, for a sentence that says what would work."""
    return " or ".join(f"{key}={value}" for value in values)
