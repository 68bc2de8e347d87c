"""Where the ranks of a run meet before they have a process group, and where all of them hear of one that fails.

It is PyTorch's store at MASTER_ADDR and MASTER_PORT, which the process group is then made with. What a rank fails with,
be it a setting that is wrong on its host alone or an error, is put there; each rank looks once in a while, says what it
finds and ends. Without that, the ranks of other hosts would wait for one that does not come.
"""

import hashlib
import json
import os
import pickle
import secrets
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from model.problems import BadInput
from parallel.environment import TIMEOUT_MINUTES, timeout
from parallel.heartbeat import heart

T = TypeVar("T")

LINGER = 10.0
"""Seconds that a rank which fails waits at most for those that have arrived to hear of it."""
GRACE = 3.0
"""Seconds that it waits for those that are still on their way."""
_SHORT = 0.3
"""Seconds from one look of a rank to the next, where there are not thousands that look."""
_SCHEME = "deepnarrow"
_FAILED, _HEARD, _ARRIVED, _READY, _BUSY, _SHARED = "failed", "heard", "arrived", "ready", "busy", "shared"
_TIME = "time"


class RankLost(RuntimeError):
    """A rank did not come, or is gone; its text is one sentence for people."""


class Rendezvous:
    """This process among the ranks of its run, for as long as the run lasts.

    Args:
        rank: this process.
        size: processes of the run; one alone needs no store.
        patience: how long ranks wait for one that does not come.
    """

    def __init__(self, rank: int, size: int, patience: timedelta):
        self.rank, self.size, self._patience = rank, size, patience
        self._host = socket.gethostname()
        self._interval = max(_SHORT, size / 1000)  # all of them together ask a thousand times a second at most
        self._left, self._all_met = threading.Event(), threading.Event()
        # A compiler that a library tries has stderr for a while, and what is said then would be lost.
        self._log = os.dup(sys.stderr.fileno())
        self.store = _connect(rank, size, patience)
        self.store.add(_ARRIVED, 1)
        # A connection of its own: while the process group is made, what waits on the other holds that one.
        self._ear: Any = self.store.clone() if size > 1 else self.store
        if size > 1:
            self._listener = threading.Thread(target=self._listen, daemon=True, name="hears-of-failures")
            self._listener.start()

    def share(self, make: Callable[[], T]) -> T:
        """Return what rank 0 makes, on every rank; the others wait for as long as that takes it.

        Raises:
            RankLost: rank 0 is gone.
        """
        if self.rank == 0:
            made = make()
            if self.size > 1:
                self.store.set(_SHARED, zlib.compress(pickle.dumps(made), 1))
            return made
        with self._while_rank_0_lives():
            while not self.store.check([_SHARED]):
                time.sleep(self._interval)
            return pickle.loads(zlib.decompress(self.store.get(_SHARED)))

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Have the others wait for what follows, however long it takes."""
        with self._while_rank_0_lives():
            self.store.add(_BUSY, 1)
        yield
        with self._while_rank_0_lives():
            self.store.add(_BUSY, -1)

    def wait_for_all(self) -> None:
        """Wait until every rank is here. All ranks call it together, before anything in which they would block.

        Raises:
            RankLost: some did not come in time, with their numbers.
        """
        with self._while_rank_0_lives():
            self.store.set(f"{_READY}/{self.rank}", "")
            self.store.add(_READY, 1)
            late = time.monotonic() + self._patience.total_seconds()
            while self.store.add(_READY, 0) < self.size:
                if self.store.add(_BUSY, 0):
                    late = time.monotonic() + self._patience.total_seconds()
                if self.rank == 0 and time.monotonic() > late:  # one rank counts, and the others hear of it
                    raise RankLost(self._missing())
                time.sleep(min(self._interval, 0.1) if self.size <= 64 else self._interval)
        self._all_met.set()

    def clock_ahead(self) -> float:
        """Return how many seconds this host's clock is ahead of rank 0's, negative behind it.

        Rank 0 writes its time down now and then, until all have met. The time that it took to be seen here counts for
        neither side: clocks that may agree are 0 apart. So they are where rank 0 writes nothing for a while.
        """
        with self._while_rank_0_lives():
            late = time.monotonic() + LINGER
            first, before = self._time_of_rank_0(), time.time()
            while (theirs := self._time_of_rank_0()) in (None, first):
                if time.monotonic() > late:
                    return 0.0
                time.sleep(self._interval / 4)
            assert theirs is not None
            return max(before - theirs, 0.0) + min(time.time() - theirs, 0.0)

    def _time_of_rank_0(self) -> float | None:
        return float(self.store.get(_TIME)) if self.store.check([_TIME]) else None

    def fail(self, code: int, lines: list[str], *, said: bool = False) -> None:
        """Have all ranks end, and wait until they have heard why.

        Args:
            code: their exit code.
            lines: the reason.
            said: whether this rank has said it, or will.
        """
        own = {"code": code, "lines": lines, "rank": self.rank, "host": self._host}
        if said:
            with suppress(RuntimeError):
                self._claim(own)
        else:
            self._say(own)
        if self.size == 1:
            return
        self._left.set()
        with suppress(RuntimeError):  # the store is rank 0's, and may be gone
            first = json.loads(self._ear.compare_set(_FAILED, "", json.dumps(own)))
            self._say(first)
            self._linger()

    def leave(self) -> None:
        """Hear no more: this rank's part has ended as it should."""
        self._left.set()
        if self.size > 1:
            self._listener.join(LINGER)

    def _listen(self) -> None:
        # Rank 0 is one, and the others wait for its time.
        while not self._left.wait(_SHORT if self.rank == 0 and not self._all_met.is_set() else self._interval):
            try:
                if self.rank == 0 and not self._all_met.is_set():
                    self._ear.set(_TIME, repr(time.time()))
                if not self._ear.check([_FAILED]):
                    continue
                failure = json.loads(self._ear.get(_FAILED))
            except RuntimeError:  # rank 0 has ended; who still needs it finds out
                return
            if self._left.is_set():
                return
            heart.fail(f"rank {failure['rank']} had failed", by_itself=False)
            self._say(failure)
            with suppress(RuntimeError):
                self._linger() if self.rank == 0 else self._ear.add(_HEARD, 1)
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(failure["code"])

    def init_method(self) -> str:
        """Return what to tell `init_process_group` so that it meets here. A process alone then needs no port."""
        scheme = f"{_SCHEME}-{secrets.token_hex(8)}"  # one that PyTorch knows already is never another

        def handler(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
            yield self.store, self.rank, self.size

        dist.register_rendezvous_handler(scheme, handler)
        return f"{scheme}://"

    def _linger(self) -> None:
        """Wait until all have heard; rank 0 a little longer, since the store goes with it."""
        self._ear.add(_HEARD, 1)
        begin = time.monotonic()
        while (heard := self._ear.add(_HEARD, 0)) < self.size and (waited := time.monotonic() - begin) < LINGER:
            if waited > GRACE and heard >= self._ear.add(_ARRIVED, 0):
                break
            time.sleep(0.05)
        time.sleep(0.3 if self.rank == 0 else 0)

    def _say(self, failure: dict[str, Any]) -> None:
        """Say why the run ends, once in each log, which several ranks may share."""
        with suppress(RuntimeError):
            if not self._claim(failure):
                return
        lines = list(failure["lines"])
        if failure["rank"] != self.rank:
            lines.append(f"(said by rank {failure['rank']} on {failure['host']}; rank {self.rank} ends with it)")
        with suppress(OSError, ValueError):  # the terminal may be gone
            sys.stderr.flush()
            os.write(self._log, ("\n".join(lines) + "\n").encode())

    def _claim(self, failure: dict[str, Any]) -> bool:
        """Whether nobody has said this in this process's log yet."""
        log = os.fstat(self._log)
        text = hashlib.sha256(json.dumps(failure["lines"]).encode()).hexdigest()[:16]
        return self._ear.add(f"said/{self._host}/{log.st_dev}/{log.st_ino}/{text}", 1) == 1

    def _missing(self) -> str:
        missing = [rank for rank in range(self.size) if not self.store.check([f"{_READY}/{rank}"])]
        named = ", ".join(map(str, missing[:16])) + (" and others" if len(missing) > 16 else "")
        minutes = self._patience.total_seconds() / 60
        return (
            f"WORLD_SIZE={self.size}: {len(missing)} of {self.size} ranks did not come within {minutes:g} minutes "
            f"({TIMEOUT_MINUTES}): {named}; a launcher that starts all of them would work"
        )

    @contextmanager
    def _while_rank_0_lives(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            time.sleep(3 * self._interval)  # where it has said why, this process ends meanwhile
            raise RankLost(f"rank 0 is gone ({str(error).splitlines()[0]})") from None


def join() -> Rendezvous:
    """Meet the other ranks, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; the process group is then made here.

    Raises:
        BadInput: something else listens at MASTER_PORT.
        RankLost: nothing does.
    """
    return Rendezvous(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout())


def _connect(rank: int, size: int, patience: timedelta) -> Any:
    """Connect to the store; rank 0 holds it, unless torchrun's agent does. A process alone needs none."""
    if size == 1:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            size,
            is_master=rank == 0 and not of_agent,
            timeout=patience,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        if rank == 0 and "EADDRINUSE" in str(error):
            raise BadInput([f"MASTER_PORT={port}: in use on {socket.gethostname()}; another would work"]) from None
        raise RankLost(
            f"MASTER_ADDR={address} MASTER_PORT={port}: rank 0 was not met there within "
            f"{patience.total_seconds() / 60:g} minutes ({TIMEOUT_MINUTES}); {str(error).splitlines()[0]}"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"{_SCHEME}/{attempt}", store) if of_agent else store
