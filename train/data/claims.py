"""Who works on which shard of a shared folder, without a lock or a clock that machines would have to agree on.

A shard is claimed by creating a file that must not exist yet (O_EXCL, which network disks keep as well), with the
number of the participant in it. Each participant counts up in a file of its own as long as it lives. One whose count
stands still for `PATIENCE` seconds of another's own monotonic clock, or whose process is gone from the machine that
both are on, is dead, and what it had claimed and not finished is free again. No time of a file and no clock of another
machine is ever looked at. Two may then take one shard, such as where a process was suspended: both write the same
bytes, and each file is renamed to its place when it is whole, so that this costs time and nothing else.
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

BEAT = 5.0
"""Seconds from one count to the next."""
PATIENCE = 60.0
"""Seconds without a count after which a participant is dead."""


class Claims:
    """A participant's claims in a folder, made when it is entered and given back when it is left.

    Args:
        folder: shared by all participants; `claims` and `alive` are created in it.
        clock: seconds that only rise.
        beat: seconds between counts; None counts only when `count` is called.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic, beat: float | None = BEAT):
        self._claims, self._alive = folder / "claims", folder / "alive"
        self._clock, self._beat = clock, beat
        self._own = secrets.token_hex(8)
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._counted = 0
        self._thread = threading.Thread(target=self._count_on, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        self._claims.mkdir(exist_ok=True)
        self._alive.mkdir(exist_ok=True)
        (self._alive / self._own).write_bytes(b"")
        self.count()
        if self._beat is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._beat is not None:
            self._thread.join()
        for name in self._held:
            (self._claims / name).unlink(missing_ok=True)
        (self._alive / self._own).unlink(missing_ok=True)

    def take(self, name: str) -> bool:
        """Claim a shard that nobody has claimed; tell whether that is so.

        Raises:
            OSError: the folder cannot be written.
        """
        try:
            handle = os.open(self._claims / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with self._lock:
            self._held.add(name)  # before it may fail: on a full disk the claim is there, and empty
        try:
            os.write(handle, self._own.encode())
        finally:
            os.close(handle)
        return True

    def done(self, name: str) -> None:
        """Keep a claim for good: its shard is finished."""
        with self._lock:
            self._held.discard(name)

    def take_over(self, name: str) -> bool:
        """Claim a shard whose holder is dead; tell whether that is so.

        A holder whose life has not been watched for long enough counts as alive; ask again later.
        """
        try:
            holder = (self._claims / name).read_text()
        except FileNotFoundError:
            return self.take(name)
        if holder == self._own or not self._is_dead(holder, name):
            return False
        away = self._claims / f".{name}-{self._own}"
        with suppress(FileNotFoundError):  # of several that see it dead, one finds it here
            os.rename(self._claims / name, away)
            away.unlink()
        return self.take(name)

    def count(self) -> None:
        """Show that this participant lives; done in the background already."""
        self._counted += 1
        line = json.dumps({"process": _process(os.getpid()), "where": _where(), "count": self._counted})
        with suppress(OSError):  # a full disk kills nobody; a folder that was finished is no longer there
            handle = os.open(self._alive / self._own, os.O_WRONLY)
            try:
                os.pwrite(handle, line.encode(), 0)
            finally:
                os.close(handle)

    def _count_on(self) -> None:
        while not self._over.wait(self._beat):
            self.count()

    def _is_dead(self, holder: str, name: str) -> bool:
        shown = b""
        if holder:  # else it was killed, or is about to write its number
            try:
                shown = (self._alive / holder).read_bytes()
            except FileNotFoundError:  # made before its first claim, and taken away when it left
                return True
            except OSError:
                pass
        if _is_gone(shown):
            return True
        seen, since = self._seen.get(holder or name, (None, 0.0))
        if seen != shown:
            self._seen[holder or name] = (shown, self._clock())
            return False
        return self._clock() - since >= PATIENCE


def _is_gone(shown: bytes) -> bool:
    """Whether the process of a participant was on this machine and is no more."""
    try:
        said = json.loads(shown)
        here, process = said["where"] == _where() != "", said["process"]
        return here and _process(int(process.partition(":")[0])) != process
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _where() -> str:
    """Which numbering of processes this is: of which machine since it was started, and of which container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process(number: int) -> str:
    """A process by its number and, as numbers are used again, by when it began; the number alone if it is gone."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(number)
    return str(number) if fields[0] in "ZX" else f"{number}:{fields[19]}"
