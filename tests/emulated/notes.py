"""What ranks tell `torch.distributed` and their devices, as tuples, and the numbers that a player turns them into.

A rank's program is a list of notes in the order in which its host says them:

    ("compute", what)                                   kernels on the compute stream
    ("send", group, to, numel)                          `isend` to a rank of a group, asynchronous
    ("recv", group, source, numel)                      `irecv` from a rank of a group, asynchronous
    ("collective", group, ranks, asynchronous, what)    a collective of a group's ranks; `what` is the same on all
    ("wait", number)                                    `wait` of the work that this rank's note of that number returned
    ("read", what)                                      the host waits for a value that the compute stream makes

Ranks are the places of programs in their list. Groups are anything hashable.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Note = tuple
Program = Sequence[Note]
NONE, COMPUTE_STREAM = -1, 0


class Op(NamedTuple):
    """A note in numbers; `NONE` where a field does not apply.

    Attributes:
        reads: whether the host waits for the compute stream, and nothing is launched.
        stream: of this rank; 0 is the compute stream, the others are numbered by first use.
        communicator: of this rank, whose kernels run one after another whatever their streams.
        match: the kernels, one of each rank that takes part, that end together.
        connection: what the hosts of these ranks set up together at its first use.
        work: the number of this rank's note that is waited for.
    """

    reads: bool
    stream: int
    communicator: int
    match: int
    connection: int
    work: int


@dataclass(frozen=True)
class Programs:
    """The notes of all ranks in numbers.

    Attributes:
        notes: as they were.
        ops: by rank, one for each note.
        kernels: by match, how many kernels end together.
        members: by connection, the ranks that set it up.
    """

    notes: Sequence[Program]
    ops: list[list[Op]]
    kernels: list[int]
    members: list[tuple[int, ...]]


def numbered(notes: Sequence[Program], eager: bool = False) -> Programs:
    """Say the notes of all ranks in numbers.

    Messages between two ranks of a group run on a communicator and a stream of this pair's own, which both directions
    share (getKeySendRecv in torch's ProcessGroupNCCL.cpp). A connection is set up for each direction.

    Args:
        notes: by rank.
        eager: whether the process groups are bound to a device (`init_process_group(device_id=...)`): then messages
            run on the communicator of their whole group, in one line with its collectives.

    Raises:
        ValueError: two ranks that take part in one collective or message disagree on what it is.
    """
    matches, connections = _Numbers(), _Numbers()
    what_of: dict[Hashable, object] = {}
    kernels: list[int] = []
    members: list[tuple[int, ...]] = []
    ops: list[list[Op]] = []
    for rank, program in enumerate(notes):
        streams, communicators, seen = _Numbers("compute"), _Numbers(), Counter[Hashable]()
        own: list[Op] = []
        for note in program:
            kind = note[0]
            if kind in ("compute", "read"):
                own.append(Op(kind == "read", COMPUTE_STREAM, NONE, NONE, NONE, NONE))
                continue
            if kind == "wait":
                own.append(Op(False, COMPUTE_STREAM, NONE, NONE, NONE, note[1]))
                continue
            if kind == "collective":
                _, group, ranks, asynchronous, what = note
                communicator: Hashable = ("collectives", group)
                way, taking_part = communicator, tuple(ranks)
            else:
                _, group, peer, what = note
                sender, receiver = (rank, peer) if kind == "send" else (peer, rank)
                taking_part, asynchronous = (sender, receiver), True
                communicator = ("collectives", group) if eager else (group, frozenset(taking_part))
                way = (communicator, sender, receiver)
            match = matches.of((way, seen[way]))
            if match == len(kernels):
                kernels.append(len(taking_part))
            if what_of.setdefault(match, (taking_part, what)) != (taking_part, what):
                raise ValueError(f"rank {rank} says {note}, and another one says {what_of[match]}")
            seen[way] += 1
            connection = connections.of(way)
            if connection == len(members):
                members.append(taking_part)
            number = communicators.of(communicator)
            stream = streams.of(communicator) if asynchronous else COMPUTE_STREAM
            own.append(Op(False, stream, number, match, connection, NONE))
        ops.append(own)
    return Programs(notes, ops, kernels, members)


class _Numbers:
    """Numbers things in the order in which they are first seen."""

    def __init__(self, *first: Hashable) -> None:
        self._number: dict[Hashable, int] = {thing: number for number, thing in enumerate(first)}

    def of(self, thing: Hashable) -> int:
        return self._number.setdefault(thing, len(self._number))
