"""Units of a corpus to shards of tokens: sampling for the tokenizer, the split by hash, tokenising."""

import hashlib
import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.train_settings import DataConfig, Source
from train.data.segments import DocumentEncoder, cut
from train.data.shards import Extreme, Record, ShardWriter
from train.data.tally import Tally
from train.data.tokenizer import Encoder, load_tokenizer
from train.data.units import Unit, documents_of

_SAMPLE_CHARS = 1 << 14


def document_hash(text: str, purpose: str) -> int:
    """Hash a document's text, from 0 to 2**64 - 1; equal texts have equal hashes, unrelated between purposes."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=purpose.encode()).digest(), "big")


@dataclass(frozen=True)
class Job:
    """All that a process needs to know to tokenise any unit of a corpus."""

    data: DataConfig
    units: list[Unit]
    folder: Path
    """Of the corpus; its tokenizer and its folder of shards are in it."""
    tokenizer: str
    """The setting that gave the tokenizer, for messages."""
    dtype: str
    eos_id: int

    def encoder(self) -> DocumentEncoder:
        """Load the tokenizer."""
        return DocumentEncoder(Encoder(load_tokenizer(self.folder / "tokenizer.json"), self.tokenizer), self.dtype)


def tokenise_unit(
    job: Job, index: int, encoder: DocumentEncoder, said: Callable[[int, int, int], None] | None = None
) -> Record:
    """Write the shard of a unit.

    A document is held out when the hash of its text is below val_fraction of the range.

    Args:
        job: the corpus.
        index: of the unit.
        encoder: of the job's tokenizer.
        said: is told now and then how many bytes were read, and how many documents and tokens written.

    Raises:
        BadInput: the corpus cannot be opened.
        OSError: the shard cannot be written.
    """
    threshold = math.ceil(job.data.val_fraction * 2**64)
    tally, tokens = Tally(), 0
    lowest, highest = Extreme(2**64), Extreme(-1)
    with ShardWriter(job.folder, index, job.dtype, job.eos_id) as shard:
        for text, ids in encoder.documents(documents_of(job.data, job.units[index], tally)):
            key = document_hash(text, "split")
            split = "val" if key < threshold else "train"
            number = shard.write(split, ids)
            lowest.meet(key, key < lowest.key, split, number)
            highest.meet(key, key > highest.key, split, number)
            if said:
                tokens += sum(map(len, ids)) + 1
                said(tally.bytes_read, tally.documents, tokens)
        return shard.finish(lowest, highest, tally)


def sample_pieces(text: str) -> Iterator[str]:
    """Cut a document into the pieces of which a sample takes some."""
    return cut(text, _SAMPLE_CHARS)


@dataclass
class Sample:
    """The pieces of documents with the smallest hashes, as many as have room, whatever their order.

    A piece is kept if all with hashes up to its own have room together; equal ones are kept or left together.
    """

    budget: int
    """Bytes of room."""

    def __post_init__(self) -> None:
        self._heap: list[tuple[int, int, int, str]] = []
        self._held, self.limit, self._counter = 0, 2**64, itertools.count()

    def add(self, key: int, piece: str) -> None:
        """Take a piece in, if it has room."""
        if key >= self.limit:
            return
        size = len(piece.encode("utf-8"))
        heapq.heappush(self._heap, (-key, next(self._counter), size, piece))
        self._held += size
        while self._held > self.budget:
            self.restrict(-self._heap[0][0])

    def restrict(self, limit: int) -> None:
        """Keep pieces whose hashes are below a limit alone, from now on."""
        self.limit = min(self.limit, limit)
        while self._heap and -self._heap[0][0] >= self.limit:
            self._held -= heapq.heappop(self._heap)[2]

    def pieces(self) -> list[tuple[int, str]]:
        """Return what is kept, by ascending hash: hash and piece."""
        return sorted((-key, piece) for key, _, _, piece in self._heap)


@dataclass(frozen=True)
class SampledUnit:
    """What a unit gives to a sample: pieces with their hashes, the limit that they are below, and what was read."""

    index: int
    pieces: list[tuple[int, str]]
    limit: int
    tally: Tally


def sample_unit(corpus: tuple[DataConfig, list[Unit]], index: int, budget: int, limit: int) -> SampledUnit:
    """Sample the text of one unit, as `Sample` does; of a dataset of the hub, which may be of any length, its begin.

    Args:
        corpus: its settings and its units.
        index: of the unit to read.
        budget: bytes of room.
        limit: hashes are below it.
    """
    data, units = corpus
    tally, sample = Tally(), Sample(budget)
    texts = documents_of(data, units[index], tally)
    if data.source is Source.hub:
        return SampledUnit(index, list(_beginning(texts, budget)), limit, tally)
    sample.restrict(limit)
    for text in texts:
        for piece in sample_pieces(text):
            sample.add(document_hash(piece, "sample"), piece)
    return SampledUnit(index, sample.pieces(), sample.limit, tally)


def _beginning(texts: Iterator[str], budget: int) -> Iterator[tuple[int, str]]:
    left = budget
    for number, text in enumerate(texts):
        left -= len(text.encode("utf-8"))
        if number and left < 0:
            return
        yield number, text
        if left <= 0:
            return
