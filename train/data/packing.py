"""Token ids on disk: one flat file per split, read as overlapping sequences of any length."""

import os
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


class PackedSequences:
    """A token file as sequences of `seq_len` predictions, memory-mapped.

    Sequence i covers the tokens from i * seq_len to (i + 1) * seq_len, both included: neighbours share one token, so
    every token but the first is predicted exactly once, and the file suits every `seq_len`. Tokens after the last
    whole sequence are left out.

    Args:
        path: a file of `TokenWriter`.
        dtype: its type.
        seq_len: predictions per sequence, at least 1.

    Raises:
        ValueError: `seq_len` is below 1.
    """

    def __init__(self, path: str | Path, dtype: str, seq_len: int):
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}: a sequence predicts at least one token")
        self.seq_len = seq_len
        # An empty file cannot be mapped.
        empty = os.path.getsize(path) == 0
        self._tokens = np.empty(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
        self.num_tokens = len(self._tokens)
        """Tokens in the file."""

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sequence `index`: seq_len + 1 token ids, int64; inputs are [:-1], labels [1:].

        Raises:
            IndexError: not from 0 to len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = int(index) * self.seq_len
        return self._tokens[start : start + self.seq_len + 1].astype(np.int64)
