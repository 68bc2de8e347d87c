"""Lists of whole numbers and ranges of them, as `train.skip_steps` and `train.skip_samples_at` have them."""

import re
from collections.abc import Iterable, Sequence


def ranges_of(entries: Sequence[str]) -> list[range]:
    """Read numbers and ranges, such as ``812`` and ``830-840``, which has both its ends.

    Returns:
        The ranges in order, none of which overlaps or touches another.

    Raises:
        ValueError: an entry is neither; the message is the clause that says which and what would work.
    """
    found = []
    for entry in entries:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(entry))
        if match is None:
            raise ValueError(f"{entry} is neither a number nor a range; [812,830-840] would work")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{entry} ends before it begins; {last}-{first} would work")
        if last >= 2**62:
            raise ValueError(f"{entry} is more than any run has; numbers below 2**62 would work")
        found.append(range(first, last + 1))
    return joined(found)


def joined(ranges: Iterable[range]) -> list[range]:
    """Return the numbers of some ranges as ranges in order, none of which overlaps or touches another."""
    found: list[range] = []
    for one in sorted(ranges, key=lambda one: one.start):
        if found and one.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, one.stop))
        else:
            found.append(one)
    return found


def said(ranges: Sequence[range]) -> str:
    """Write ranges as `ranges_of` reads them, such as ``[812,830-840]``."""
    return f"[{','.join(str(one.start) if len(one) == 1 else f'{one.start}-{one[-1]}' for one in ranges)}]"


def below(ranges: Sequence[range], end: int) -> list[range]:
    """Cut ranges off at an end, which is not among what is left."""
    return [range(one.start, min(one.stop, end)) for one in ranges if one.start < end]


def minus(ranges: Sequence[range], taken: Sequence[range]) -> list[range]:
    """Return what of some ranges is in none of others; both are in order, and apart."""
    left = []
    for one in ranges:
        start = one.start
        for other in taken:
            if other.stop <= start or other.start >= one.stop:
                continue
            if start < other.start:
                left.append(range(start, other.start))
            start = max(start, other.stop)
        if start < one.stop:
            left.append(range(start, one.stop))
    return left
