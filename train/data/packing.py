"""Token ids on disk: one flat file per split, read as overlapping sequences of any length."""

import os
import weakref
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray


class TokenWriter:
    """Appends token ids to a flat binary file in machine byte order.

    Args:
        path: the file, created or emptied.
        dtype: an unsigned integer type that holds every id.
        eos_id: the token that follows each document.

    As a context manager it closes at the end of the block.
    """

    def __init__(self, path: str | Path, dtype: str, eos_id: int):
        self.num_tokens = 0
        """Tokens written so far, end tokens included."""
        self._dtype = np.dtype(dtype)
        self._end = np.array([eos_id], dtype=self._dtype)
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115

    def write(self, ids: NDArray | list[int], end: bool = True) -> None:
        """Append a document or a piece of one.

        Args:
            ids: token ids, shape (n,), any integer type.
            end: whether the document ends here.

        Raises:
            OverflowError: an id does not fit the type.
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= int(array.min()) <= int(array.max()) <= np.iinfo(self._dtype).max:
            raise OverflowError(f"token ids from {array.min()} to {array.max()} do not fit {self._dtype}")
        self._file.write(array.astype(self._dtype).tobytes())
        self.num_tokens += len(array)
        if end:
            self._file.write(self._end.tobytes())
            self.num_tokens += 1

    def close(self) -> None:
        """Bring everything to disk; returns only when it would survive a power failure."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ChangedTokens(RuntimeError):
    """Prepared tokens were changed while a run read them."""


class PackedSequences:
    """A token file as sequences of `seq_len` predictions, of which only those that are asked for are read.

    Sequence i covers the tokens from i * seq_len to (i + 1) * seq_len, both included: neighbours share one token, so
    every token but the first is predicted exactly once, and the file suits every `seq_len`. Tokens after the last
    whole sequence are left out.

    Args:
        path: a file of `TokenWriter`.
        dtype: its type.
        seq_len: predictions per sequence, at least 1.
        vocab_size: token ids are below it; None takes any.

    Raises:
        ValueError: `seq_len` is below 1.
    """

    def __init__(self, path: str | Path, dtype: str, seq_len: int, vocab_size: int | None = None):
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}: a sequence predicts at least one token")
        self.seq_len = seq_len
        self._path, self._dtype, self._vocab_size = path, np.dtype(dtype), vocab_size
        # Not memory-mapped: a process that touches a page beyond the end of a file cut short dies without a word.
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self.num_tokens = os.fstat(self._file).st_size // self._dtype.itemsize
        """Tokens in the file."""

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sequence `index`: seq_len + 1 token ids, int64; inputs are [:-1], labels [1:].

        Raises:
            IndexError: not from 0 to len - 1.
            ChangedTokens: the file has been cut short since it was opened, cannot be read any more, or holds ids
                beyond the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = int(index) * self.seq_len
        tokens = np.frombuffer(self._read(start, self.seq_len + 1), self._dtype).astype(np.int64)
        if self._vocab_size is not None and (largest := int(tokens.max())) >= self._vocab_size:
            raise self.changed(f"holds token {largest} in sequence {index}, beyond the tokenizer's {self._vocab_size}")
        return tokens

    def _read(self, start: int, count: int) -> bytes:
        item = self._dtype.itemsize
        offset, end = start * item, (start + count) * item
        read = b""
        try:
            while offset + len(read) < end:  # a single read may be cut short by a signal, or by a network disk
                if not (block := os.pread(self._file, end - offset - len(read), offset + len(read))):
                    left = os.fstat(self._file).st_size // item
                    raise self.changed(f"ends after {left:,} of {self.num_tokens:,} tokens")
                read = read + block if read else block
        except OSError as error:
            raise self.changed(f"cannot be read any more ({error})") from error
        return read

    def changed(self, what: str) -> ChangedTokens:
        """Make the error for a file that is not what it was, in which way."""
        works = "the same command prepares the tokens again and goes on from the last save"
        return ChangedTokens(f"{self._path}: {what}: the file was changed under the run; {works}")
