"""Counts of what was read and of what had to be skipped."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_MAX_PLACES = 3

_WORDS = {
    "empty": "empty",
    "bad_utf8": "not UTF-8",
    "bad_json": "not JSON",
    "no_text": "without text",
    "unreadable": "damaged files",
    "no_rows": "files without a row",
}


@dataclass
class Tally:
    """What one pass over a corpus met. All counts are of documents; `unreadable` and `no_rows` count files."""

    documents: int = 0
    """Usable documents handed on."""
    empty: int = 0
    """Documents of nothing but white space."""
    bad_utf8: int = 0
    """Documents that are not valid UTF-8 (or JSON strings with half a surrogate pair, which have no UTF-8 form)."""
    bad_json: int = 0
    """JSONL lines that do not parse."""
    no_text: int = 0
    """JSONL lines and rows whose text field is missing or is no string."""
    unreadable: int = 0
    """Files that could not be read, or not to their end; what could be read of them is among `documents`."""
    no_rows: int = 0
    """JSONL files and tables that hold nothing."""
    bytes_lost: int = 0
    """Bytes of input files after the place where they could not be read on."""
    bytes_read: int = 0
    """Bytes of input files read so far, compressed ones as they lie on disk; 0 for the hub. For progress only."""
    lines: int = 0
    """Lines, or separators' lines, of a part of a file, by which the places of the next part are known."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """For each kind that was skipped, the first few places, as `file:line` or `file`."""

    def skip(self, kind: str, place: str) -> None:
        """Count one skipped document or damaged file.

        Args:
            kind: the name of a count: empty, bad_utf8, bad_json, no_text, unreadable or no_rows.
            place: where it is.
        """
        setattr(self, kind, getattr(self, kind) + 1)
        places = self.places.setdefault(kind, [])
        if len(places) < _MAX_PLACES:
            places.append(place)

    @property
    def records(self) -> int:
        """Records met, usable or not."""
        return self.documents + self.empty + self.bad_utf8 + self.bad_json + self.no_text

    def add(self, other: "Tally", lines_before: int = 0) -> None:
        """Add what another pass has met, after this one.

        Args:
            other: of a whole file or of a part of one.
            lines_before: lines of its file that stand before that part.
        """
        for name in (each.name for each in fields(self) if each.name not in ("places", "lines")):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, found in other.places.items():
            places = self.places.setdefault(kind, [])
            places += [_later(place, lines_before) for place in found[: _MAX_PLACES - len(places)]]

    def problems(self, max_bad: float) -> list[str]:
        """Whether more cannot be used than a share of the records, or of the files' bytes: a sentence, or none.

        Empty documents do not count: there is nothing in them to lose. Where nothing at all can be used, there is more
        to say than this.
        """
        unusable = self.bad_utf8 + self.bad_json + self.no_text
        share = max(unusable / max(self.records, 1), self.bytes_lost / max(self.bytes_read, 1))
        if share <= max_bad or not self.documents:
            return []
        said = f"data.max_bad={max_bad}: {share:.2%} of the corpus cannot be used ({self.summary()})"
        higher = math.ceil(share * 100) / 100
        return [f"{said}; a corpus without these, or data.max_bad={higher} to train on the rest, would work"]

    def as_dict(self) -> dict[str, Any]:
        """Return the counts and places, JSON-able."""
        return asdict(self)

    def summary(self) -> str:
        """Sum up in a line for a person, such as `1,790 documents; skipped: 3 not UTF-8 (a.py, b.py, c.py)`."""
        skipped = []
        for kind, words in _WORDS.items():
            if count := getattr(self, kind):
                places = self.places.get(kind, [])
                more = ", ..." if count > len(places) else ""
                skipped.append(f"{count:,} {words} ({', '.join(places)}{more})")
        return f"{self.documents:,} documents; skipped: {'; '.join(skipped) or 'none'}"


def _later(place: str, lines: int) -> str:
    """A place `file:line` so many lines later."""
    name, _, line = place.rpartition(":")
    return f"{name}:{int(line) + lines}" if lines and name and line.isdigit() else place
