"""Documents to token files: sampling for the tokenizer, the split by hash, tokenising in batches."""

import hashlib
import heapq
import itertools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from conf.train_settings import DataConfig, Source
from model.problems import BadInput
from train.data.corpus import documents, list_files
from train.data.packing import TokenWriter
from train.data.tally import Tally

if TYPE_CHECKING:
    from train.data.tokenizer import Encoder

SPLITS = ("train", "val")

_SAMPLE_CHARS = 1 << 14
_PIECE_CHARS = 1 << 18
_BATCH_CHARS = 1 << 22
_COPY = 1 << 24


def token_file(folder: Path, split: str) -> Path:
    """Name the file that holds the tokens of `train` or `val`."""
    return folder / f"{split}.bin"


def document_hash(text: str, purpose: str) -> int:
    """Hash a document's text, from 0 to 2**64 - 1; equal texts have equal hashes, unrelated between purposes."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=purpose.encode()).digest(), "big")


def cut(text: str, limit: int) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters, that tokenise as the whole does wherever possible.

    Encoding needs a hundred bytes for each byte of text, so a long document cannot be encoded whole. Pieces end after
    a newline that no space follows, else before a single space between words: both are boundaries to our tokenizer
    and to the usual ones. Only where the second half of a piece has neither is it cut anywhere. `Encoder` sees to it
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


def sample_texts(data: DataConfig, budget: int, progress: bool) -> Iterator[str]:
    """Sample at most `budget` bytes of text to train a tokenizer on.

    Of local files, the pieces of documents with the smallest hashes: spread evenly over the corpus, and the same
    whatever the order of documents. Of a hub dataset, which may be of any length, its beginning.

    Raises:
        BadInput: more of it is unusable than `data.max_bad` allows.
    """
    tally = Tally()
    texts = _with_bar(data, tally, "sampling", progress)
    if data.source is Source.hub:
        total = 0
        for text in texts:
            yield text
            total += len(text.encode("utf-8"))
            if total >= budget:
                return
        return
    # A heap by descending hash; the counter keeps equal hashes from comparing texts.
    heap: list[tuple[int, int, int, str]] = []
    held, counter = 0, itertools.count()
    for text in texts:
        for piece in cut(text, _SAMPLE_CHARS):
            key = document_hash(piece, "sample")
            if held >= budget and -key <= heap[0][0]:
                continue
            size = len(piece.encode("utf-8"))
            heapq.heappush(heap, (-key, next(counter), size, piece))
            held += size
            while held > budget and len(heap) > 1:
                held -= heapq.heappop(heap)[2]
    if problems := tally.problems(data.max_bad):  # known here, before hours of tokenising
        raise BadInput(problems)
    for _, _, _, piece in sorted(heap, reverse=True):
        yield piece


@dataclass
class _Extreme:
    """The documents with the smallest or largest hash so far: all with that hash, where duplicates are."""

    key: int
    spans: list[tuple[int, int]] = field(default_factory=list)
    """From and to which token of their split's file."""


def tokenise(
    data: DataConfig, encoder: "Encoder", eos_id: int, dtype: str, folder: Path, progress: bool
) -> tuple[dict[str, int], Tally]:
    """Write `train.bin` and `val.bin`, each document followed by `eos_id`.

    A document is held out when the hash of its text is below val_fraction of the range. Where no document's is, and
    there are two different ones, the one with the smallest hash is; where all are, the one with the largest stays.

    Returns:
        Tokens per split, and what was read.
    """
    tally = Tally()
    threshold = math.ceil(data.val_fraction * 2**64)
    low, high = _Extreme(2**64), _Extreme(-1)
    counts = dict.fromkeys(SPLITS, 0)
    with (
        TokenWriter(token_file(folder, "train"), dtype, eos_id) as train,
        TokenWriter(token_file(folder, "val"), dtype, eos_id) as val,
    ):
        writers = {"train": train, "val": val}
        start = 0
        for split, key, first, last, ids in _encoded(data, encoder, threshold, tally, progress, writers):
            writer = writers[split]
            start = writer.num_tokens if first else start
            writer.write(ids, end=last)
            if last:
                counts[split] += 1
                span = (start, writer.num_tokens)
                if key < low.key:
                    low = _Extreme(key)
                if key > high.key:
                    high = _Extreme(key)
                for extreme in (low, high):
                    if key == extreme.key:
                        extreme.spans.append(span)
        tokens = {split: writers[split].num_tokens for split in SPLITS}
    if threshold and low.key != high.key and 0 in counts.values():
        source, target, spans = ("train", "val", low.spans) if not counts["val"] else ("val", "train", high.spans)
        _move(token_file(folder, source), token_file(folder, target), spans, 2 if dtype == "uint16" else 4)
        moved = sum(end - start for start, end in spans)
        tokens[source] -= moved
        tokens[target] += moved
    return tokens, tally


def _encoded(
    data: DataConfig,
    encoder: "Encoder",
    threshold: int,
    tally: Tally,
    progress: bool,
    writers: dict[str, TokenWriter],
) -> Iterator[tuple[str, int, bool, bool, NDArray[np.int64]]]:
    """Encode the corpus's pieces in order: split, document hash, whether first and last of its document, token ids."""
    batch: list[tuple[str, int, bool, bool]] = []
    pieces: list[tuple[str, str]] = []
    chars = 0

    def flush() -> Iterator[tuple[str, int, bool, bool, NDArray[np.int64]]]:
        for entry, ids in zip(batch, encoder.encode_batch(pieces), strict=True):
            yield *entry, ids
        batch.clear()
        pieces.clear()

    with _threads():
        for text in _with_bar(data, tally, "tokenising", progress, writers):
            key = document_hash(text, "split")
            split = "val" if key < threshold else "train"
            before = ""
            for piece in cut(text, _PIECE_CHARS):
                chars += len(piece)
                if chars >= _BATCH_CHARS:
                    yield from flush()
                    chars = len(piece)
                batch.append((split, key, not before, False))
                pieces.append((before, piece))
                before = piece
            batch[-1] = (*batch[-1][:3], True)
        yield from flush()


@contextmanager
def _threads() -> Iterator[None]:
    """Let tokenizers use all cores, unless the user decided otherwise.

    Afterwards it is told not to: a thread pool does not survive the forks of data workers and checkpoint writers.
    """
    chosen = "TOKENIZERS_PARALLELISM" in os.environ
    if not chosen:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if not chosen:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _with_bar(
    data: DataConfig, tally: Tally, what: str, progress: bool, writers: dict[str, Any] | None = None
) -> Iterator[str]:
    """The corpus's documents, under a progress bar on stderr: bytes of files where there are files."""
    from tqdm import tqdm

    total = sum(path.stat().st_size for _, path in list_files(data)) or None
    unit = "B" if total else " documents"
    with tqdm(desc=what, total=total, file=sys.stderr, disable=not progress, unit=unit, unit_scale=True) as bar:
        for text in documents(data, tally):
            yield text
            if progress:
                tokens = f", {sum(w.num_tokens for w in writers.values()):,} tokens" if writers else ""
                bar.set_postfix_str(f"{tally.documents:,} documents{tokens}", refresh=False)
                bar.update(tally.bytes_read - bar.n if total else 1)
        if total:
            bar.update(tally.bytes_read - bar.n)


def _move(source: Path, target: Path, spans: list[tuple[int, int]], item: int) -> None:
    """Move spans of tokens, of `item` bytes each, from one file to the end of another."""
    kept = source.with_name("kept")
    with open(source, "rb") as read, open(kept, "wb") as keep, open(target, "ab") as moved:
        for start, end in spans:
            _copy(read, keep, start * item - read.tell())
            _copy(read, moved, (end - start) * item)
        _copy(read, keep, source.stat().st_size - read.tell())
    os.replace(kept, source)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size > 0:
        block = source.read(min(size, _COPY))
        target.write(block)
        size -= len(block)
