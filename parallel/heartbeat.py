"""Heartbeats: each rank writes where it is, ``B stage 3 micro-batch 17``, into memory that others on its host read.

A hang has no traceback, and neither NCCL nor Gloo say which rank it is that the others wait for. We know what each rank
does next, and on whom that waits; a rank that writes down where it is lets whoever watches find the one that all the
others wait for (`parallel.waits`). To write costs less than a microsecond, and no system call.

Each rank has a file of its own in a folder in memory, which the process that watches makes and names in the environment
(`FOLDER`). Without one, nothing is written anywhere.
"""

import faulthandler
import json
import mmap
import os
import signal
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from parallel.schedules import Action, Pass

FOLDER = "DEEPNARROW_HEARTBEATS"
"""Environment variable: the folder of the files of this host's ranks."""
STACKS = signal.SIGRTMIN + 6 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
"""The signal upon which a rank writes the Python stacks of its threads, whatever it is waiting for."""


class Phase(IntEnum):
    """What a rank is doing. Those with a collective of all ranks say so in `OF_ALL`."""

    START = 0
    LOAD = 1
    DATA = 2
    PASS = 3
    RECEIVE = 4
    SEND = 5
    REDUCE = 6
    AGREE = 7
    UPDATE = 8
    KEEP = 9
    REPORT = 10
    RECORD = 11
    EVALUATE = 12
    SAVE = 13
    SAMPLE = 14
    END = 15
    TASKS = 16


OF_ALL = (Phase.START, Phase.LOAD, Phase.AGREE, Phase.REPORT, Phase.EVALUATE, Phase.SAVE, Phase.SAMPLE, Phase.END)
"""Phases that end when all ranks have come to them."""
PATIENT = (Phase.START, Phase.LOAD, Phase.KEEP, Phase.TASKS, Phase.SAVE, Phase.SAMPLE, Phase.END)
"""Phases that may take long: they read or write a whole checkpoint, a corpus, tasks or a trace, or leave W&B."""
_ISSUED = (Phase.PASS, Phase.REDUCE, Phase.AGREE, Phase.UPDATE, Phase.EVALUATE)
"""Phases in which a host may have told its device to do what that has not come to."""
SAID = {
    Phase.START: "starting",
    Phase.LOAD: "loading a checkpoint or the first weights",
    Phase.DATA: "reading a micro-batch",
    Phase.REDUCE: "summing gradients over the replicas",
    Phase.AGREE: "summing the loss and the norm over all ranks",
    Phase.UPDATE: "updating the weights",
    Phase.KEEP: "writing a profile or a timeline",
    Phase.REPORT: "merging the reports of all ranks",
    Phase.RECORD: "writing records and logs",
    Phase.EVALUATE: "summing a validation over all ranks",
    Phase.SAVE: "saving",
    Phase.SAMPLE: "sampling text",
    Phase.END: "ending",
    Phase.TASKS: "reading and judging the tasks of an evaluation",
}
_KINDS = list(Pass)
_F, _B, _W = _KINDS
_RECORD, _COUNT = struct.Struct("@QdqqqqqqqqqQ"), struct.Struct("@q")
_pack, _now, _PASS = _RECORD.pack_into, time.monotonic, int(Phase.PASS)
_TIME, _COLLECTIVES, _DEVICE, _HEADER, _SIZE = 8, 128, 160, 256, 4096


@dataclass(frozen=True)
class Beat:
    """What a rank has last written.

    Attributes:
        beats: how often it has written so far.
        time: when it did, by `time.monotonic` of its host.
        step: of the run; 0 before the first.
        phase: what it is doing.
        what, stage, micro_batch: the pass that it is in, or whose result it waits for.
        index: of the pass that it is in, in its own order of this step or evaluation.
        peer: the global rank that it waits for; -1 for none.
        awaited: the index of what it waits for in the order of that rank.
        evaluating: the number of evaluations that this rank has begun in this step, 0 while it trains.
        collectives: the tensor-parallel collectives that it has come to so far.
        in_collective: whether it waits in the last of these.
        on_device: whether its GPU is there, while the host that has told it what to do has come further.
        rank, pid, host: which process it is.
    """

    beats: int
    time: float
    step: int
    phase: Phase
    what: Pass
    stage: int
    micro_batch: int
    index: int
    peer: int
    awaited: int
    evaluating: int
    collectives: int
    in_collective: bool
    on_device: bool
    rank: int
    pid: int
    host: str

    @property
    def action(self) -> str:
        """The pass, as ``B stage 3 micro-batch 17``."""
        return Action(self.what, self.stage, self.micro_batch).said

    def __str__(self) -> str:
        """What it does, in words."""
        if self.phase is Phase.PASS:
            doing = self.action + (" (in a collective of its tensor-parallel ranks)" if self.in_collective else "")
        elif self.phase is Phase.RECEIVE:
            doing = f"waiting for rank {self.peer}'s result of {self.action}"
        elif self.phase is Phase.SEND:
            doing = f"waiting until rank {self.peer} has received what it needs for {self.action}"
        else:
            doing = SAID[self.phase]
        where = " on its device" if self.on_device else ""
        return f"{doing}{where}, {f'step {self.step:,}' if self.step else 'before the first step'}"


class _InCollective:
    """A context of the tensor-parallel collectives of a heart: the time in which a rank waits for the others in one."""

    def __init__(self, of: "Heart"):
        self._heart, self._state = of, 0

    def __enter__(self) -> None:
        self._state += 2
        _COUNT.pack_into(self._heart.memory, _COLLECTIVES, self._state + 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _COUNT.pack_into(self._heart.memory, _COLLECTIVES, self._state)


class Heart:
    """The heartbeat of this process, which writes to memory of its own until `share` gives it a file."""

    def __init__(self) -> None:
        self.memory: mmap.mmap | bytearray = bytearray(_SIZE)
        self.in_collective = _InCollective(self)
        """The context in which this rank waits in a collective of the ranks that share its matrices."""
        self._failures: Path | None = None
        self._beats, self._step, self._evaluating = 0, 0, 0
        self._action, self._index = Action(Pass.F, 0, 0), 0
        self._device: tuple[int, ...] = ()
        self._device_beats = 0

    def share(self, folder: str | None, rank: int) -> None:
        """Write to a file that others read from here on, and have `STACKS` write this process's stacks beside it.

        Args:
            folder: of the heartbeats of this host; None writes nothing.
            rank: the global rank of this process.
        """
        if folder is None or not os.path.isdir(folder):
            return
        path = file_of(Path(folder), rank)
        whose = json.dumps({"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}).encode()
        unfinished = path.with_suffix(".tmp")
        unfinished.write_bytes(bytes(_HEADER) + whose.ljust(_SIZE - _HEADER, b"\0"))
        with open(unfinished, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), _SIZE)
        self.at(Phase.START)
        self._failures = failure_of(Path(folder), rank)
        faulthandler.register(STACKS, open(stacks_of(Path(folder), rank), "w"), all_threads=True)  # noqa: SIM115
        unfinished.rename(path)  # whoever finds it finds it whole, and may ask for stacks

    def fail(self, reason: str, by_itself: bool = True) -> None:
        """Say, where a folder is shared, what this rank fails with; only the first that it says counts.

        Args:
            reason: a clause.
            by_itself: whether it has failed by an error of its own, not since it lacks another rank.
        """
        if self._failures is not None:
            with suppress(OSError), open(self._failures, "x") as file:
                json.dump({"time": time.monotonic(), "reason": reason, "by_itself": by_itself}, file)

    def begin_step(self, step: int) -> None:
        """Say that a step begins, with the reading of its first micro-batch."""
        self._step, self._evaluating, self._index = step, 0, 0
        self.at(Phase.DATA)

    def begin_evaluation(self) -> None:
        """Say that an evaluation begins, with the reading of its first micro-batch."""
        self._evaluating, self._index = self._evaluating + 1, 0
        self.at(Phase.DATA)

    @property
    def place(self) -> tuple[int, int]:
        """The step, and the number of the evaluation in it."""
        return self._step, self._evaluating

    def at(self, phase: Phase) -> None:
        """Say that this rank has come to a phase that is no pass."""
        self._write(phase, 0, 0, 0, self._index, -1, -1)

    def next_pass(self, action: Action, index: int) -> None:
        """Name the pass that comes next, before what it needs is there.

        Args:
            action: the pass.
            index: its index in the order of this rank.
        """
        self._action, self._index = action, index

    def in_pass(self) -> None:
        """Say that the pass last named computes."""
        action = self._action
        self._write(_PASS, _number(action.what), action.stage, action.micro_batch, self._index, -1, -1)

    def waits_for(self, phase: Phase, action: Action, peer: int, awaited: int) -> None:
        """Say that this rank, in the pass last named, waits for another one.

        Args:
            phase: RECEIVE for the result of an action, SEND until its input has been received.
            action: of the other rank.
            peer: its global rank.
            awaited: the index of the action in its order.
        """
        self._write(phase, _number(action.what), action.stage, action.micro_batch, self._index, peer, awaited)

    def device_in(
        self, place: tuple[int, int], phase: Phase, action: Action, index: int, peer: int = -1, awaited: int = -1
    ) -> None:
        """Say where the device is, which may be far behind the host; said again, it is no sign of life.

        Args:
            place: what `place` was when the host launched these passes.
            phase: PASS, RECEIVE, or AGREE once all passes are over.
            action: the pass that it computes, or whose result it waits for.
            index: of the pass that it is in, in the order of this rank.
            peer, awaited: as in `waits_for`.
        """
        pass_ = _number(action.what), action.stage, action.micro_batch
        told = (*place, phase, *pass_, index, peer, awaited)
        if told != self._device:
            self._device, self._device_beats = told, self._device_beats + 1
            _pack(self.memory, _DEVICE, self._device_beats, _now(), *told, self._device_beats)

    def _write(self, phase: int, what: int, stage: int, micro_batch: int, index: int, peer: int, awaited: int) -> None:
        beats = self._beats = self._beats + 1
        # What is read while it is written has two counts of beats: the first is written first, the second last.
        step, evaluating, memory = self._step, self._evaluating, self.memory
        _pack(memory, 0, beats, _now(), step, evaluating, phase, what, stage, micro_batch, index, peer, awaited, beats)


def _number(what: Pass) -> int:
    """Return the index of a kind of pass in `_KINDS`, faster than a dictionary of enums does."""
    return 0 if what is _F else 1 if what is _B else 2


heart = Heart()
"""Of this process. It is one for all of it, as a log is, so that no layer has to be handed it."""


def content_of(path: Path) -> bytes | None:
    """Read what a rank has last written, whole.

    Args:
        path: of `file_of`.

    Returns:
        None where the file is not there, or is being written again and again.
    """
    for _ in range(100):
        try:
            content = path.read_bytes()
        except OSError:
            return None
        host, device = _RECORD.unpack_from(content), _RECORD.unpack_from(content, _DEVICE)
        if host[0] == host[-1] and device[0] == device[-1]:
            return content
    return None


def moved(content: bytes, seconds: float) -> bytes:
    """Return what a rank has written with its times so much later, by the clock of another host."""
    later = bytearray(content)
    for at in (_TIME, _DEVICE + _TIME):
        struct.pack_into("@d", later, at, struct.unpack_from("@d", later, at)[0] + seconds)
    return bytes(later)


def read(path: Path) -> Beat | None:
    """Read where a rank is; None as in `content_of`."""
    content = content_of(path)
    return None if content is None else beat_of(content)


def beat_of(content: bytes) -> Beat:
    """Find where a rank is in what it has written: its host, or its device where that is behind."""
    host, device = _RECORD.unpack_from(content), _RECORD.unpack_from(content, _DEVICE)
    on_device = device[0] > 0 and device[2:4] == host[2:4] and host[4] in _ISSUED
    _, when, step, evaluating, phase, what, stage, micro_batch, index, peer, awaited, _ = device if on_device else host
    whose = json.loads(content[_HEADER:].rstrip(b"\0"))
    (collectives,) = _COUNT.unpack_from(content, _COLLECTIVES)
    return Beat(
        beats=host[0] + device[0],
        time=when,
        step=step,
        phase=Phase(phase),
        what=_KINDS[what],
        stage=stage,
        micro_batch=micro_batch,
        index=index,
        peer=peer,
        awaited=awaited,
        evaluating=evaluating,
        collectives=collectives // 2,
        in_collective=bool(collectives % 2) and not on_device,
        on_device=on_device,
        **whose,
    )


def file_of(folder: Path, rank: int) -> Path:
    """Name the file of a rank's heartbeat."""
    return folder / f"rank-{rank}.beat"


def failed(folder: Path, rank: int) -> dict[str, Any] | None:
    """Read what a rank has failed with, as `Heart.fail` has written it; None where it has not, or is writing it."""
    with suppress(OSError, ValueError):
        return dict(json.loads(failure_of(folder, rank).read_text()))
    return None


def stacks_of(folder: Path, rank: int) -> Path:
    """Name the file that a rank writes its stacks to."""
    return folder / f"rank-{rank}.stacks"


def failure_of(folder: Path, rank: int) -> Path:
    """Name the file in which a rank says what it has failed with."""
    return folder / f"rank-{rank}.failure"


def state_of(folder: Path, rank: int) -> Path:
    """Name the file in which the host of a rank says how it is to those on another host: its state and exit code."""
    return folder / f"rank-{rank}.state"
