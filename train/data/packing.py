"""Token ids as sequences of any length, from streams that lie in one file or in thousands."""

import os
import threading
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

PADDING = -1
"""Stands in a sequence where there is no token."""
_MAX_OPEN = 64
"""Files of a stream that are open at once."""


class ChangedTokens(RuntimeError):
    """Tokens were changed while a run read them, or are not what they were said to be."""


class TokenStream(Protocol):
    """A sequence of token ids that is read by position, from any thread."""

    num_tokens: int
    """Tokens in the stream."""

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the tokens from `start` up to `start + count`, which exist, as int64 (count,).

        Raises:
            ChangedTokens: they are not there any more, or cannot be read.
        """

    def starts(self, start: int, count: int) -> NDArray[np.int64] | None:
        """Return where documents begin among these tokens, ascending from 0 to count - 1; None where that is unknown.

        Only streams whose documents do not end in an end token know it, from an index beside them.
        """

    def place(self, position: int) -> str:
        """Say which file a token lies in, and at which token of it, for messages."""


class Sequences(Protocol):
    """A stream of tokens cut into sequences of one length, each of which is read by its number."""

    seq_len: int
    """Predictions of a sequence."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Return the tokens of a sequence, int64 (seq_len + 1,): `PADDING` where there is none.

        Raises:
            IndexError: not from 0 to len - 1.
            ChangedTokens: a file has been changed since it was prepared.
        """

    def starts(self, index: int) -> NDArray[np.bool_] | None:
        """Tell which tokens begin a document, or the rest of one, without an end token before it; None for none."""


class ByteSource(Protocol):
    """Bytes that are read by position."""

    def pread(self, count: int, offset: int) -> bytes:
        """Return up to `count` bytes from `offset` on; none only beyond the end."""

    def size(self) -> int:
        """Count the bytes."""

    def close(self) -> None:
        """Let go of it."""


class LocalBytes:
    """A local file, not memory-mapped: a process that touches a page beyond the end of a file cut short dies at once.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path):
        self._file: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def pread(self, count: int, offset: int) -> bytes:
        """Return up to `count` bytes from `offset` on."""
        assert self._file is not None
        return os.pread(self._file, count, offset)

    def size(self) -> int:
        """Count the bytes that are in the file now."""
        assert self._file is not None
        return os.fstat(self._file).st_size

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class TokenFile:
    """A part of a stream: consecutive tokens of one file.

    Args:
        path: the file, local.
        dtype: the type of its ids.
        num_tokens: how many they are; None takes all that is in the file.
        offset: bytes before the first.
    """

    def __init__(self, path: str | Path, dtype: str | np.dtype, num_tokens: int | None = None, offset: int = 0):
        self.path, self.dtype, self.offset = path, np.dtype(dtype), offset
        if num_tokens is None:
            num_tokens = (os.stat(path).st_size - offset) // self.dtype.itemsize
        self.num_tokens = num_tokens

    def open(self) -> ByteSource:
        """Open the bytes of the file."""
        return LocalBytes(self.path)


class FileTokens:
    """Token files one after another as one stream, of which a bounded number is open.

    Args:
        files: in their order; those without tokens may be absent.
        remedy: what would work where a file has changed.
    """

    def __init__(self, files: Sequence[TokenFile], remedy: str | None = None):
        self._files = [file for file in files if file.num_tokens]
        self._ends = list(accumulate(file.num_tokens for file in self._files))
        self.num_tokens = self._ends[-1] if self._ends else 0
        self._remedy = remedy or "the same command prepares the tokens again and goes on from the last save"
        self._opened: OrderedDict[int, ByteSource] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._opened)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return tokens, from as many files as they lie in."""
        parts = []
        at = bisect_right(self._ends, start)
        while count > 0:
            file = self._files[at]
            first = start - (self._ends[at] - file.num_tokens)
            part = min(count, file.num_tokens - first)
            raw = self._bytes(at, file.offset + first * file.dtype.itemsize, part * file.dtype.itemsize)
            parts.append(np.frombuffer(raw, file.dtype))
            start, count, at = start + part, count - part, at + 1
        return (np.concatenate(parts) if len(parts) > 1 else parts[0]).astype(np.int64) if parts else np.empty(0, int)

    def starts(self, start: int, count: int) -> NDArray[np.int64] | None:
        """Return None: an end token follows every document, or nothing is known."""
        return None

    def place(self, position: int) -> str:
        """Say where a token lies."""
        at = min(bisect_right(self._ends, position), len(self._files) - 1)
        return f"{self._files[at].path}, token {position - (self._ends[at] - self._files[at].num_tokens):,}"

    def _bytes(self, at: int, offset: int, count: int) -> bytes:
        file, read = self._files[at], b""
        try:
            with self._lock:
                source = self._source(at)
                while len(read) < count:  # a signal or a network disk may cut a single read short
                    if not (block := source.pread(count - len(read), offset + len(read))):
                        left = max(0, source.size() - file.offset) // file.dtype.itemsize
                        raise self._changed(at, f"ends after {left:,} of {file.num_tokens:,} tokens")
                    read = read + block if read else block
        except OSError as error:
            raise self._changed(at, f"cannot be read any more ({error})") from error
        return read

    def _source(self, at: int) -> ByteSource:
        if at in self._opened:
            self._opened.move_to_end(at)
            return self._opened[at]
        while len(self._opened) >= _MAX_OPEN:
            self._opened.popitem(last=False)[1].close()
        self._opened[at] = self._files[at].open()
        return self._opened[at]

    def _changed(self, at: int, what: str) -> ChangedTokens:
        return ChangedTokens(f"{self._files[at].path}: {what}: the file was changed under the run; {self._remedy}")


def _close_all(opened: OrderedDict[int, ByteSource]) -> None:
    for source in opened.values():
        source.close()


class PackedSequences:
    """A stream of tokens as sequences of `seq_len` predictions, of which only those that are asked for are read.

    Sequence i covers the tokens from i * seq_len to (i + 1) * seq_len, both included: neighbours share one token, so
    every token but the first is predicted exactly once, and the stream suits every `seq_len`. Tokens after the last
    whole sequence are left out.

    Args:
        stream: the tokens.
        seq_len: predictions per sequence, at least 1.
        vocab_size: token ids are below it; None takes any.

    Raises:
        ValueError: `seq_len` is below 1.
    """

    def __init__(self, stream: TokenStream, seq_len: int, vocab_size: int | None = None):
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}: a sequence predicts at least one token")
        self.seq_len, self.stream, self._vocab_size = seq_len, stream, vocab_size

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream."""
        return self.stream.num_tokens

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sequence `index`: seq_len + 1 token ids, int64; inputs are [:-1], labels [1:].

        Raises:
            IndexError: not from 0 to len - 1.
            ChangedTokens: a file has been cut short since it was prepared, cannot be read any more, or holds ids
                beyond the vocabulary.
        """
        return self.read(self._start(index), self.seq_len + 1, index)

    def read(self, start: int, count: int, index: int) -> NDArray[np.int64]:
        """Return tokens of the stream for sequence `index`, int64 (count,).

        Raises:
            ChangedTokens: as for `__getitem__`.
        """
        tokens = self.stream.read(start, count)
        if self._vocab_size is not None and (tokens.max() >= self._vocab_size or tokens.min() < 0):
            first = int(((tokens >= self._vocab_size) | (tokens < 0)).argmax())
            raise ChangedTokens(
                f"{self.stream.place(start + first)}: holds id {tokens[first]} in sequence {index}, beyond the "
                f"vocabulary of {self._vocab_size}; tokens made by the tokenizer that data.tokenizer names would "
                "work"
            )
        return tokens

    def starts(self, index: int) -> NDArray[np.bool_] | None:
        """Tell which tokens of sequence `index` begin a document without an end token before it: bool (seq_len + 1,).

        Returns:
            None where documents end in an end token, or their borders are not known.
        """
        found = self.stream.starts(self._start(index), self.seq_len + 1)
        if found is None:
            return None
        marks = np.zeros(self.seq_len + 1, dtype=np.bool_)
        marks[found] = True
        return marks

    def _start(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return int(index) * self.seq_len
