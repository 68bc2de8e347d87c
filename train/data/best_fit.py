"""Best-fit packing: no document is cut that fits a sequence ("Fewer Truncations Improve Language Modeling", arXiv
2404.10830).

A document longer than a sequence of L predictions is cut into pieces of L, which fill a sequence each, and a rest.
Rests and shorter documents are packed best-fit decreasing: the longest first, each into the fullest sequence that has
room for it, else into a new one. Pieces of one length are interchangeable, and so are sequences with the same pieces:
as many as there is room for go into a whole group of sequences at once. So the plan follows from how many pieces of
each length there are, in a time and memory that depend on L and not on the number of documents.

Of each piece the place in the stream is kept on disk, by length and then by place: 8 bytes a document. As everywhere
(`train/data/documents.py`), the input before a document's first token is the end token of the one before it, so that a
document takes as many predictions as it has tokens, its end token included.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.problems import BadInput
from train.data import cache
from train.data.packing import PADDING, ChangedTokens, FileTokens, PackedSequences, TokenFile, TokenStream

_VERSION = 1
"""Raise it when the plan of the same lengths, or the file of the places, becomes another."""
_PLACES = "places.bin"
_WORKS = "data.packing=concat, or a tokenizer whose end token follows every document, would work"
_CHUNK = 1 << 22
"""Documents that are looked at together: some hundred MB."""

Ends = Callable[[], Iterable[NDArray[np.int64]]]
"""Gives where the documents of a stream end, ascending and in parts: tokens up to there, the end token included."""


@dataclass(frozen=True)
class Group:
    """Neighbouring sequences that hold equally many pieces of the same lengths.

    Attributes:
        start, stop: the sequences.
        room: predictions that are left in each, and padded.
        pieces: (length, pieces of that length in each, number of the first of those in `start` among all of that
            length), the longest first. The next sequence has the next ones.
    """

    start: int
    stop: int
    room: int
    pieces: tuple[tuple[int, int, int], ...] = ()

    def split(self, size: int) -> tuple["Group", "Group"]:
        """Return the first so many sequences, and the others."""
        middle = self.start + size
        others = tuple((length, each, first + size * each) for length, each, first in self.pieces)
        return replace(self, stop=middle), replace(self, start=middle, pieces=others)

    def taking(self, length: int, each: int, first: int) -> "Group":
        """Return the same with so many more pieces of a length in each sequence."""
        return replace(self, room=self.room - length * each, pieces=(*self.pieces, (length, each, first)))


class _Rooms:
    """Groups by the room that is left in them."""

    def __init__(self) -> None:
        self._groups: dict[int, list[Group]] = {}
        self._rooms: list[int] = []  # of which there are groups, ascending

    def add(self, group: Group) -> None:
        if group.room not in self._groups:
            self._groups[group.room] = []
            insort(self._rooms, group.room)
        self._groups[group.room].append(group)

    def fullest(self, length: int) -> Group | None:
        """Take out a group of the fullest sequences that have room for a piece; None where there is none."""
        if (at := bisect_left(self._rooms, length)) == len(self._rooms):
            return None
        groups = self._groups[self._rooms[at]]
        group = groups.pop()
        if not groups:
            del self._groups[self._rooms.pop(at)]
        return group

    def all(self) -> Iterator[Group]:
        return (group for groups in self._groups.values() for group in groups)


def plan(counts: NDArray[np.int64], seq_len: int) -> list[Group]:
    """Pack pieces best-fit decreasing.

    Args:
        counts: int64 (seq_len + 1,), the number of pieces of each length; there are none of length 0.
        seq_len: predictions of a sequence.

    Returns:
        The groups in the order of their sequences, which begin at 0 and have no gap.
    """
    rooms, num_sequences = _Rooms(), 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left, first = int(counts[length]), 0
        while left:
            group = rooms.fullest(length)
            if group is None:
                new = -(-left // (seq_len // length))
                group = Group(num_sequences, num_sequences + new, seq_len)
                num_sequences += new
            # A sequence stays the fullest that has room until it has none.
            each = min(group.room // length, left)
            taking, others = group.split(min(group.stop - group.start, left // each))
            rooms.add(taking.taking(length, each, first))
            if others.start < others.stop:
                rooms.add(others)
            taken = (taking.stop - taking.start) * each
            left, first = left - taken, first + taken
    return sorted(rooms.all(), key=lambda group: group.start)


@lru_cache(maxsize=64)
def _planned(counts: bytes, seq_len: int) -> list[Group]:
    """`plan`, which takes a second for long sequences, and which a run asks for several times."""
    return plan(np.frombuffer(counts, np.int64), seq_len)


class BestFitSequences:
    """A stream of tokens as sequences of whole documents, as far as they fit; a `train.data.packing.Sequences`.

    Args:
        concatenated: the same stream as it lies.
        eos_id: the token after each document.
        places: the file of the pieces' places.
        counts: int64 (seq_len + 1,), the number of pieces of each length.
    """

    def __init__(self, concatenated: PackedSequences, eos_id: int, places: Path, counts: NDArray[np.int64]):
        self.seq_len, self._tokens, self._eos_id = concatenated.seq_len, concatenated, eos_id
        self._groups = _planned(counts.tobytes(), self.seq_len)
        self._starts = [group.start for group in self._groups]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """Number of the first piece of each length in the file of the places."""
        self._places = FileTokens([TokenFile(places, "int64", int(counts.sum()))])

    def __len__(self) -> int:
        return self._groups[-1].stop if self._groups else 0

    @property
    def padding(self) -> int:
        """Predictions of all sequences that are padded."""
        return sum(group.room * (group.stop - group.start) for group in self._groups)

    def pieces(self, index: int) -> list[tuple[int, int]]:
        """Return the pieces of a sequence: the place of each one's first label in the stream, and its length.

        Raises:
            IndexError: not from 0 to len - 1.
            ChangedTokens: the file of the places has been changed since it was made.
        """
        group, found = self._group(index), []
        for length, each, first in group.pieces:
            places = self._places.read(int(self._first[length]) + first + (index - group.start) * each, each)
            found += [(place, length) for place in places.tolist()]
        return found

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sequence `index`: int64 (seq_len + 1,), the tokens that are inputs, and `PADDING` for padding.

        Labels are the tokens after the inputs, but where a piece begins in the middle of a document (`starts`): the
        label before it is the end token.

        Raises:
            IndexError: not from 0 to len - 1.
            ChangedTokens: a file has been changed since it was prepared.
        """
        row = np.full(self.seq_len + 1, PADDING, dtype=np.int64)
        at, eos_id = 0, self._eos_id
        for place, length in self.pieces(index):
            if place:
                row[at : at + length + 1] = self._tokens.read(place - 1, length + 1, index)
            else:  # nothing stands before the first document
                row[at], row[at + 1 : at + length + 1] = eos_id, self._tokens.read(0, length, index)
            at += length
            if length < self.seq_len and row[at] != eos_id:
                where = self._tokens.stream.place(place + length - 1)
                raise ChangedTokens(f"{where}: a document ends here, and not in the end token {eos_id}; {_WORKS}")
        return row

    def starts(self, index: int) -> NDArray[np.bool_]:
        """Tell which tokens of sequence `index` begin a piece: bool (seq_len + 1,)."""
        marks = np.zeros(self.seq_len + 1, dtype=np.bool_)
        lengths = [length for length, each, _ in self._group(index).pieces for _ in range(each)]
        marks[np.cumsum([0, *lengths[:-1]])] = True
        return marks

    def _group(self, index: int) -> Group:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return self._groups[bisect_right(self._starts, index) - 1]


@dataclass(frozen=True)
class Cut:
    """What packing does to documents.

    Attributes:
        documents: in all.
        cut: documents that are longer than a sequence, and so cut in any packing.
        concatenated: documents that are cut where sequences are made of documents as they lie.
    """

    documents: int
    cut: int
    concatenated: int


def open_best_fit(
    concatenated: PackedSequences, ends: Ends, eos_id: int, fingerprint: str, cache_dir: Path
) -> tuple[BestFitSequences, Cut]:
    """Pack a stream, or find it packed in the cache.

    Every rank may call it at once: one works and the others wait. That takes 8 bytes of memory a document and some
    hundred MB besides: 16 s and 1 GB for a hundred million documents.

    Args:
        concatenated: the stream as it lies.
        ends: where its documents end.
        eos_id: the token after each document.
        fingerprint: of the stream's content.
        cache_dir: where the places are kept.

    Raises:
        BadInput: documents do not end in the end token.
    """
    seq_len = concatenated.seq_len
    of = {"packing": "best_fit", "version": _VERSION, "stream": fingerprint, "seq_len": seq_len}
    folder = cache_dir / cache.fingerprint(of)
    meta = cache.cached(folder, partial(_build, concatenated.stream, ends, eos_id, seq_len))
    counts = np.array(meta["counts"], dtype=np.int64)
    return BestFitSequences(concatenated, eos_id, folder / _PLACES, counts), Cut(**meta["cut"])


def summary(sequences: BestFitSequences, cut: Cut) -> str:
    """Say in a sentence what the packing pads and cuts, and what concatenation would cut."""
    documents, slots = max(1, cut.documents), max(1, len(sequences) * sequences.seq_len)
    return (
        f"best-fit packing: {len(sequences):,} sequences of {sequences.seq_len:,} tokens, of which "
        f"{sequences.padding / slots:.2%} are padding; {cut.cut / documents:.2%} of {cut.documents:,} documents are "
        f"cut, those longer than a sequence, where concatenation cuts {cut.concatenated / documents:.2%}"
    )


def _build(stream: TokenStream, ends: Ends, eos_id: int, seq_len: int, folder: Path) -> dict[str, Any]:
    """Write the places of all pieces; return how many there are of each length, and what is cut."""
    counts, cut = np.zeros(seq_len + 1, dtype=np.int64), Cut(0, 0, 0)
    for starts, lengths in _documents(ends):
        end = int(starts[0] + lengths[0]) - 1  # of one in some millions; the others are looked at when they are read
        if stream.read(end, 1)[0] != eos_id:
            raise BadInput([f"data.packing=best_fit: {stream.place(end)} ends a document, and not in the end token "
                            f"{eos_id}; {_WORKS}"])  # fmt: skip
        whole, rest = np.divmod(lengths, seq_len)
        counts += np.bincount(rest[rest > 0], minlength=seq_len + 1)
        counts[seq_len] += whole.sum()
        # Sequence i predicts the tokens i L + 1 to (i + 1) L. The first token of all is not predicted.
        first, last = (np.maximum(starts, 1) - 1) // seq_len, (starts + lengths - 2) // seq_len
        cut = Cut(
            cut.documents + len(lengths),
            cut.cut + int((lengths > seq_len).sum()),
            cut.concatenated + int((last > first).sum()),
        )
    _write_places(ends, seq_len, counts, folder / _PLACES)
    return {"counts": counts.tolist(), "cut": asdict(cut)}


def _write_places(ends: Ends, seq_len: int, counts: NDArray[np.int64], path: Path) -> None:
    """Write the places by length, and of one length in the order of the stream."""
    next_of = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    all_places = np.empty(int(counts.sum()), dtype=np.int64)
    for starts, lengths in _documents(ends):
        whole, rest = np.divmod(lengths, seq_len)
        within = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
        places = np.concatenate([np.repeat(starts, whole) + within * seq_len, (starts + whole * seq_len)[rest > 0]])
        of_length = np.concatenate([np.full(len(within), seq_len), rest[rest > 0]])
        order = np.argsort(of_length, kind="stable")
        sizes = np.bincount(of_length, minlength=seq_len + 1)
        within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        all_places[next_of[of_length[order]] + within] = places[order]
        next_of += sizes
    # Not through a map: on a full disk a process dies of that without a word.
    with open(path, "wb") as file:
        file.write(all_places.data)


def _documents(ends: Ends) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield where documents start and how long they are, some millions at a time."""
    before = 0
    for part in ends():
        for at in range(0, len(part), _CHUNK):
            some = part[at : at + _CHUNK]
            starts = np.concatenate([[before], some[:-1]]).astype(np.int64)
            before = int(some[-1])
            yield starts, some - starts
