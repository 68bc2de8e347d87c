"""Files that a run writes line by line, on a disk that may be full for a while, in a folder that may be deleted."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

KEPT = 2**26
"""Bytes of lines that wait for the disk; those beyond are counted and dropped."""
EVERY_SECONDS = 60.0
"""Seconds between two warnings about one file."""


class PatientFile:
    """An append-only file of lines that raises no OSError: what the disk does not take is kept, and written later.

    A file that was deleted, or moved with its folder, is made again with all that it held: the open file still has it.

    Attributes:
        path: of the file.
        error: why lines are waiting; None where none is.
        missing: lines that were dropped.
        remade: how often the file was made again.

    Args:
        path: whose folder exists; lines that stand there stay.
        clock: seconds that only rise, by which warnings are spaced.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self.path, self._clock = path, clock
        self.error: OSError | None = None
        self.missing = self.remade = 0
        self._waiting = bytearray()
        self._handle: int | None = None
        self._said, self._warned = -float("inf"), False
        self._lock = threading.Lock()  # a thread that saves writes to the log as well
        self.flush()

    @property
    def lacking(self) -> int:
        """Lines that are not in the file: those that wait, and those that were dropped."""
        return self._waiting.count(b"\n") + self.missing

    def write(self, line: str) -> None:
        """Append a line."""
        encoded = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            if len(self._waiting) + len(encoded) > KEPT:
                self.missing += 1
            else:
                self._waiting += encoded
        self.flush()

    def sync(self) -> None:
        """Make the file durable (fsync), as far as its disk can."""
        self.flush()
        if self._handle is not None:
            try:
                os.fsync(self._handle)
            except OSError as error:
                self.error = error

    def news(self) -> str | None:
        """Return a warning where lines are waiting, the first time and then once a minute, and word of their end."""
        now, lacking = self._clock(), self.lacking
        if self.error is None:
            warned, self._warned = self._warned, False
            missing = f"; {lacking:,} lines are missing" if lacking else ""
            return f"{self.path.name} is written again{missing}" if warned else None
        if now - self._said < EVERY_SECONDS:
            return None
        self._said, self._warned = now, True
        kept = f"; {lacking:,} lines wait for the disk" if lacking else ""
        return f"{self.path} cannot be written ({self.error}){kept}; training goes on"

    def close(self) -> int:
        """Write what waits, close the file, and return how many lines it lacks."""
        self.flush()
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)
            self._handle = None
        return self.lacking

    def flush(self) -> None:
        """Write what waits, as far as the disk takes it; make the file again where it is not there."""
        with self._lock:
            try:
                if self._handle is None:
                    self._handle = self._open()
                elif self._is_gone():
                    self._make_again()
                while self._waiting:
                    count = os.write(self._handle, self._waiting)  # of a line, a full disk may take a part
                    del self._waiting[:count]
            except OSError as error:
                self.error = error
            else:
                self.error = None

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def _is_gone(self) -> bool:
        assert self._handle is not None
        try:
            os.stat(self.path)
            return os.fstat(self._handle).st_nlink == 0
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return True
            raise

    def _make_again(self) -> None:
        assert self._handle is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".tmp")
        with open(unfinished, "wb") as copy:
            at = 0
            while part := os.pread(self._handle, 2**20, at):
                copy.write(part)
                at += len(part)
        unfinished.rename(self.path)
        os.close(self._handle)
        self._handle = self._open()
        self.remade += 1


class PatientHandler(logging.Handler):
    """A handler of log records that writes to a `PatientFile`.

    Args:
        file: to be written.
    """

    def __init__(self, file: PatientFile):
        super().__init__()
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            self.file.write(self.format(record))
        except Exception:
            self.handleError(record)


def patient_logs() -> list[PatientFile]:
    """Replace the handlers of the root logger that write to files by patient ones, and return their files.

    A handler that fails, such as one whose stderr lies on a full disk, is silent from here on: Python would follow each
    line that it could not write by a traceback of thirty.
    """
    logging.raiseExceptions = False
    root, files = logging.getLogger(), []
    for handler in list(root.handlers):
        if type(handler) is not logging.FileHandler:
            continue
        patient = PatientHandler(PatientFile(Path(handler.baseFilename)))
        patient.setLevel(handler.level)
        patient.setFormatter(handler.formatter)
        root.addHandler(patient)
        root.removeHandler(handler)
        with suppress(OSError):
            handler.close()
        files.append(patient.file)
    return files


def write_to_logs(logger: logging.Logger, text: str) -> None:
    """Write a line to the files of the log alone, and not to the terminal."""
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, text, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PatientHandler):
            handler.handle(record)
