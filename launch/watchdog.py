"""The watchdog of a run: it reads the heartbeats of this host's ranks, and tells when and by whom they are held up."""

import fcntl
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from parallel import heartbeat
from parallel.heartbeat import PATIENT, Beat, Phase
from parallel.layout import Layout
from parallel.waits import Verdict, judge
from train.agreement import PATIENCE

LEAST = 30.0
"""Seconds that a run may stand still at least, where they follow from its steps."""
TIMES_A_STEP = 5
BEFORE_STEPS = 600.0
"""Seconds that it may stand still before its steps have been timed: kernels are chosen and compiled meanwhile."""
_TIMED = 3
_OWN_PAUSE = 10.0
"""Seconds without a look after which it is the watchdog itself that did not run: it, and perhaps all, were stopped."""
HOST_LOST = 0.0
"""In place of the time of a failure: the host of the rank is lost, and whatever ranks elsewhere say comes of that."""
STOPPED = "stopped (SIGSTOP)"
_NAME, _LOCK = "deepnarrow-heartbeats-", "lock"
_locks: dict[Path, int] = {}
"""The locks of the folders that this process has made: they are held as long as it lives."""


@dataclass(frozen=True)
class Gone:
    """A rank that has ended.

    Attributes:
        beat: its last heartbeat.
        code: its exit code, -N for signal N; None where the system does not say.
    """

    beat: Beat
    code: int | None


@dataclass(frozen=True)
class Stall:
    """A run that does not move.

    Attributes:
        seconds: since when.
        limit: the seconds that it may.
        beats: the last heartbeat of each rank, None for one that has given none.
        halted: the ranks that do not run, with a word for how.
        verdict: who waits for whom.
    """

    seconds: float
    limit: float
    beats: Mapping[int, Beat | None]
    halted: Mapping[int, str]
    verdict: Verdict


class Watchdog:
    """Watches the ranks of one start of a run.

    Attributes:
        beats: the last heartbeat of each rank, as of the last look; None for one that has given none.
        gone: the ranks that were the first to end, in one look.
        gone_at: when that was; None where none has ended.
        moved: when any rank has last given a sign, by `clock`.

    Args:
        folder: of the heartbeats, see `heartbeats_folder`.
        layout: the rank grid.
        stall_seconds: that a run may stand still; None follows from its steps.
        clock: seconds that only rise, the same on which heartbeats are given.
    """

    def __init__(
        self, folder: Path, layout: Layout, stall_seconds: float | None, clock: Callable[[], float] = time.monotonic
    ):
        self.beats: dict[int, Beat | None] = dict.fromkeys(range(layout.world_size))
        self.gone: list[Gone] = []
        self.gone_at: float | None = None
        self.moved = self._looked = clock()
        self._folder, self._layout, self._asked, self._clock = folder, layout, stall_seconds, clock
        self._signs: list[Any] = []
        self._steps: deque[float] = deque(maxlen=64)
        self._step_began: tuple[int, float] | None = None
        self._halted_since: dict[int, float] = {}

    @property
    def step(self) -> int:
        """The furthest step that a rank has come to."""
        return max((beat.step for beat in self.beats.values() if beat), default=0)

    @property
    def limit(self) -> float:
        """The seconds that the run may stand still, where nothing takes long by its nature."""
        if self._asked is not None:
            return self._asked
        if len(self._steps) < _TIMED:
            return BEFORE_STEPS
        return max(LEAST, TIMES_A_STEP * statistics.median(self._steps))

    def look(self) -> Stall | None:
        """Look at all ranks once; the stall, where the run has stood still for too long."""
        now = self._clock()
        if now - self._looked > _OWN_PAUSE:
            self.moved, self._halted_since = now, {}
        self._looked = now
        self._read(now)
        halted = self._halted(now)
        limit = self.limit
        patient = any(beat.phase in PATIENT for beat in self.beats.values() if beat) or None in self.beats.values()
        # The end of a rank is the launcher's to see, and some end later than others.
        for_long = any(now - since >= limit for word, since in halted.values() if word == STOPPED)
        still = now - self.moved
        if still < (PATIENCE.total_seconds() if patient and not for_long else limit):
            return None
        stopped = {rank: word for rank, (word, _) in halted.items()}
        return Stall(still, limit, dict(self.beats), stopped, judge(self.beats, self._layout, stopped))

    def came_to(self, phase: Phase) -> bool:
        """Tell whether any rank has come to a phase, or further."""
        return any(beat.step or beat.phase >= phase for beat in self.beats.values() if beat)

    def failures(self) -> list[tuple[float, int, str, bool]]:
        """Return what ranks have failed with, the earliest first: when, the rank, the reason, whether by itself."""
        found = []
        for rank in self.beats:
            if said := heartbeat.failed(self._folder, rank):
                found.append((said["time"], rank, said["reason"], said["by_itself"]))
        return sorted(found)

    def _read(self, now: float) -> None:
        for rank in self.beats:
            self.beats[rank] = heartbeat.read(heartbeat.file_of(self._folder, rank)) or self.beats[rank]
        signs = [beat and (beat.beats, beat.collectives, beat.in_collective) for beat in self.beats.values()]
        if signs != self._signs:
            self._signs, self.moved = signs, now
        step = self.step
        if self._step_began is None or step > self._step_began[0]:
            if self._step_began is not None and self._step_began[0] > 0:
                self._steps.append((now - self._step_began[1]) / (step - self._step_began[0]))
            self._step_began = step, now

    def _state(self, beat: Beat) -> tuple[str | None, int | None]:
        """Return the state and, once it has ended, the exit code of a rank; of another host's as that has said."""
        try:
            state, code = json.loads(heartbeat.state_of(self._folder, beat.rank).read_text())
        except OSError:
            status = process_state(beat.pid)
            return status, exit_code_of(beat.pid) if status == psutil.STATUS_ZOMBIE else None
        return state, code

    def _halted(self, now: float) -> dict[int, tuple[str, float]]:
        """Find the ranks that do not run, and since when; the first that have ended are kept in `gone`."""
        found, gone = {}, []
        for rank, beat in self.beats.items():
            if beat is None:
                continue
            status, code = self._state(beat)
            if status == psutil.STATUS_STOPPED:
                found[rank] = (STOPPED, self._halted_since.get(rank, now))
            elif status in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                gone.append(Gone(beat, code))
                found[rank] = ("ended", self._halted_since.get(rank, now))
        self._halted_since = {rank: since for rank, (_, since) in found.items()}
        if gone and self.gone_at is None:
            self.gone, self.gone_at = gone, now
        return found


def described(stall: Stall) -> list[str]:
    """Write down who holds a run up, and what each of the others waits for; at most 16 of those."""
    where = next((beat for beat in stall.beats.values() if beat), None)
    host = f" on {where.host}" if where else ""
    lines = [f"no rank{host} has moved for {stall.seconds:.0f} s; so the run is ended, and what it waited for is this:"]
    culprits = stall.verdict.culprits
    if not stall.verdict.certain:
        what = "all ranks wait for each other" if len(culprits) == len(stall.beats) else "no rank waits for another"
        lines.append(f"{what}: the network between them, or one that does not answer in a collective that all are in")
    for rank in culprits[:16]:
        beat = stall.beats[rank]
        waited = "the others wait for rank" if stall.verdict.certain else "rank"
        pid = f" (process {beat.pid})" if beat else ""
        doing = str(beat) if beat else "never seen"
        word = f"it is {stall.halted[rank]}" if rank in stall.halted else "nothing that it needs is missing"
        lines.append(f"{waited} {rank}{pid}, which is here: {doing}; {word}")
    others = [rank for rank in stall.beats if rank not in culprits]
    for rank in others[:16]:
        on = ", ".join(map(str, stall.verdict.waits[rank][:8]))
        lines.append(f"rank {rank}: {stall.beats[rank] or 'never seen'}" + (f"; it waits for rank {on}" if on else ""))
    if len(others) > 16:
        lines.append(f"and {len(others) - 16} other ranks")
    return lines


def process_state(pid: int) -> str | None:
    """Return the state of a process by psutil's names; None where it is gone."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return None


def exit_code_of(pid: int) -> int | None:
    """Read the exit code of a process that has ended and that its parent has not asked for; None where none is said."""
    with suppress(OSError, ValueError, IndexError):
        status = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[49])
        return -(status & 0x7F) if status & 0x7F else status >> 8
    return None


def heartbeats_folder() -> Path:
    """Make a folder in memory for the heartbeats of one start of a run, and remove those of watchdogs that are gone.

    A lock tells whose it is, not a process id: containers may share the memory, and count processes by themselves.
    """
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    for old in memory.glob(f"{_NAME}*/{_LOCK}"):
        with suppress(OSError), open(old) as held:  # another user's stays
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_NAME, dir=memory))
    lock = os.open(folder / "lock.tmp", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "lock.tmp").rename(folder / _LOCK)
    _locks[folder] = lock
    return folder


def remove_heartbeats(folder: Path) -> None:
    """Remove a folder that `heartbeats_folder` has made."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(_locks.pop(folder))
