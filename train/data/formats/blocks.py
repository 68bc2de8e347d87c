"""Token files of other file systems, read by ranges, of which what was read once is kept on this machine.

All ranks of a machine share what they have read: a file with holes for each remote one, and a byte for each of its
blocks that says whether it is there. Both are of one boot of one machine, as what it had written is certain only until
a power failure; those of boots before are removed. Where the disk is full nothing more is kept, and everything read.
"""

import errno
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from train.data.formats.remote import RemotePath
from train.data.packing import ByteSource, TokenFile

BLOCK = 1 << 16
"""Bytes that are asked for and kept at a time: a sequence of 4,096 tokens lies in one or two."""


class RemoteTokenFile(TokenFile):
    """A part of a stream that lies in a file of another file system.

    Args:
        path: the file.
        dtype: the type of its ids.
        num_tokens: how many they are.
        offset: bytes before the first.
        kept: the folder in which this machine keeps what it has read.
    """

    def __init__(self, path: RemotePath, dtype: str, num_tokens: int, offset: int, kept: Path):
        super().__init__(str(path), dtype, num_tokens, offset)
        self._remote, self._kept = path, kept

    def open(self) -> ByteSource:
        """Open the file, and what is kept of it."""
        return KeptBytes(self._remote, self._kept)


class KeptBytes:
    """Bytes of a remote file, from this machine where they are there.

    Args:
        path: the file.
        kept: the folder of what is kept.
        opens: opens the file to read it.
    """

    def __init__(self, path: RemotePath, kept: Path, opens: Callable[[RemotePath], BinaryIO] | None = None):
        self._path, self._opens = path, opens or (lambda remote: remote.open())
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        self._data = self._marks = -1
        try:
            folder = _of_this_boot(kept)
            name = hashlib.blake2b(f"{path.url} {path.size} {path.stamp}".encode(), digest_size=16).hexdigest()
            self._data = os.open(folder / f"{name}.bytes", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._marks = os.open(folder / f"{name}.blocks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._give_up(error)

    def pread(self, count: int, offset: int) -> bytes:
        """Return up to `count` bytes from `offset` on.

        Raises:
            OSError: the file system cannot be reached, or refuses.
        """
        end = min(offset + count, self._path.size)
        if offset >= end:
            return b""
        first, last = offset // BLOCK, (end - 1) // BLOCK
        with self._lock:
            content = b"".join(self._block(number) for number in range(first, last + 1))
        return content[offset - first * BLOCK : end - first * BLOCK]

    def size(self) -> int:
        """Count the bytes of the file."""
        return self._path.size

    def close(self) -> None:
        """Let go of the file, and of what is kept of it."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._let_go()

    def _block(self, number: int) -> bytes:
        begin, size = number * BLOCK, min(BLOCK, self._path.size - number * BLOCK)
        if self._data >= 0:
            try:
                block = os.pread(self._data, size, begin) if os.pread(self._marks, 1, number) == b"\1" else b""
            except OSError as error:
                self._give_up(error)
            else:
                if len(block) == size:
                    return block
        if self._file is None:
            self._file = self._opens(self._path)
        self._file.seek(begin)
        block = self._file.read(size)
        if len(block) != size:
            raise OSError(errno.EIO, f"ends after {begin + len(block):,} of {self._path.size:,} bytes")
        if self._data >= 0:
            try:
                if os.pwrite(self._data, block, begin) == size:
                    os.pwrite(self._marks, b"\1", number)
            except OSError as error:
                self._give_up(error)
        return block

    def _give_up(self, error: OSError) -> None:
        self._let_go()
        print(f"{self._path}: what is read is not kept on this machine ({error})", file=sys.stderr)

    def _let_go(self) -> None:
        for handle in (self._data, self._marks):
            if handle >= 0:
                os.close(handle)
        self._data = self._marks = -1


def _of_this_boot(kept: Path) -> Path:
    """The folder of what is kept since this machine was started; those of its boots before are removed."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    here = kept / os.uname().nodename
    if not (here / boot).is_dir():
        here.mkdir(parents=True, exist_ok=True)
        for old in here.iterdir():
            if old.name != boot:
                shutil.rmtree(old, ignore_errors=True)
        with suppress(FileExistsError):
            (here / boot).mkdir()
    return here / boot
