"""NCCL's rules, played over the notes of all ranks: no GPU, no processes, microseconds for a note.

What differs from Gloo, and is played:

- *Streams.* A call returns at once. A communicator's kernels run one after another on a stream of its own, each after
  what the compute stream was told before; a collective that is not asynchronous runs on the compute stream. `wait`
  makes the compute stream wait and not the host. The kernels of a message or a collective end together, so that one
  that has started spins until the others have.
- *First use.* NCCL connects the ranks of a communicator when it is first used, a pair of ranks at the first message of
  a direction, and the hosts of all that take part wait for each other (ncclTransportP2pSetup, over the bootstrap
  network).
- *Hardware queues.* Streams share CUDA_DEVICE_MAX_CONNECTIONS queues, and what is at the head of a queue and may not
  start yet holds up all behind it.
- *Device-wide waits.* Before any note a host may have to wait until its whole device is idle: cudaFree, an allocator
  that retries, a kernel's code that is loaded, Inductor that times configurations.
- *Reads.* A host that asks for a value waits for the compute stream.

How long anything takes plays no part. Each rule only ever holds something up until other things are done, which then
stay done: the order in which a player looks at the ranks cannot change the end, and a program that ends under some
rules ends under all that hold up less. A device-wide wait before every note of every rank (CUDA_LAUNCH_BLOCKING) holds
up more than such waits at some notes, and more than any number of hardware queues.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.emulated.notes import COMPUTE_STREAM, NONE, Program, Programs, numbered


@dataclass(frozen=True)
class Rules:
    """Which rules are played.

    Attributes:
        first_use: whether hosts wait for each other when something is first used.
        queues: hardware queues of a device, which its streams share round robin; None for one for each stream.
        eager: whether groups are bound to a device (see `numbered`).
    """

    first_use: bool = True
    queues: int | None = None
    eager: bool = False


class Play:
    """The hosts and devices of all ranks.

    Args:
        programs: the notes in numbers.
        rules: those that are played.
        device_waits: by rank, the numbers of notes before which its host waits until its device is idle.
        everywhere: whether it does so before all notes of all ranks.
        held: by rank, the number of a note before which its host stops until `let_on`.
    """

    def __init__(
        self,
        programs: Programs,
        rules: Rules,
        device_waits: Mapping[int, Collection[int]] | None = None,
        everywhere: bool = False,
        held: Mapping[int, int] | None = None,
    ) -> None:
        self.programs, self.rules = programs, rules
        self.everywhere, self.device_waits = everywhere, dict(device_waits or {})
        ranks = range(len(programs.ops))
        self.at = [0 for _ in ranks]
        """By rank, the note that its host is at."""
        self.limit = [(held or {}).get(rank, len(programs.ops[rank])) for rank in ranks]
        self.pending = [0 for _ in ranks]
        """By rank, kernels and waits on its device that are not done."""
        self.nodes: list[dict[int, int]] = [{} for _ in ranks]
        """By rank, what a note has put on the device."""
        self.tails: list[dict[int, int]] = [{} for _ in ranks]
        """By rank, the last on each of its streams."""
        self.arrived: list[set[int]] = [set() for _ in programs.members]
        """By connection, ranks whose hosts have come to its first use."""
        # Of each node: its rank and operation, what it waits for, who waits for it, and how far it has come.
        self.rank_of: list[int] = []
        self.after: list[tuple[int, ...]] = []
        self.started: list[bool] = []
        self.done: list[bool] = []
        self.queue_of: list[deque[int] | None] = []
        self._match_of: list[int] = []
        self._left: list[int] = []
        self._users: list[list[int]] = []
        self._running: list[list[int]] = [[] for _ in programs.kernels]
        self._last_of: list[dict[int, int]] = [{} for _ in ranks]
        self._queues = [[deque[int]() for _ in range(rules.queues or 0)] for _ in ranks]
        self._blocked = [False for _ in ranks]
        self._ready = list(ranks)
        self._run()

    @property
    def ended(self) -> bool:
        """Whether all hosts have come to the end of their programs, and all devices are idle."""
        return not any(self.pending) and all(at == len(ops) for at, ops in zip(self.at, self.programs.ops, strict=True))

    def let_on(self, rank: int, limit: int) -> None:
        """Let a host that was held come to the note of this number."""
        self.limit[rank] = limit
        self._ready.append(rank)
        self._run()

    def _run(self) -> None:
        while self._ready:
            rank = self._ready.pop()
            self._blocked[rank] = False
            self._host(rank)
            self._blocked[rank] = True

    def _host(self, rank: int) -> None:
        """Let a host say its notes until it has to wait."""
        ops, waits = self.programs.ops[rank], self.device_waits.get(rank, ())
        while (index := self.at[rank]) < self.limit[rank]:
            op = ops[index]
            if self.pending[rank]:
                if self.everywhere or index in waits:
                    return
                tail = self.tails[rank].get(COMPUTE_STREAM, NONE)
                if op.reads and tail != NONE and not self.done[tail]:
                    return
            if op.connection != NONE and self.rules.first_use and not self._connected(rank, op.connection):
                return
            self.at[rank] = index + 1
            if not op.reads:
                self._launch(rank, index)

    def _connected(self, rank: int, connection: int) -> bool:
        here, members = self.arrived[connection], self.programs.members[connection]
        if len(here) < len(members):
            here.add(rank)
            if len(here) < len(members):
                return False
            for other in here:
                self._wake(other)
        return True

    def _launch(self, rank: int, index: int) -> None:
        """Put what a note says on the device."""
        op, tails, last_of = self.programs.ops[rank][index], self.tails[rank], self._last_of[rank]
        after = [tails.get(op.stream, NONE)]
        if op.stream != COMPUTE_STREAM:
            after.append(tails.get(COMPUTE_STREAM, NONE))
        if op.communicator != NONE:
            after.append(last_of.get(op.communicator, NONE))
        if op.work != NONE:
            after.append(self.nodes[rank][op.work])
        node = len(self.done)
        tails[op.stream] = self.nodes[rank][index] = node
        if op.communicator != NONE:
            last_of[op.communicator] = node
        left = [one for one in after if one != NONE and not self.done[one]]
        for one in left:
            self._users[one].append(node)
        queues = self._queues[rank]
        queue = queues[op.stream % len(queues)] if queues else None
        if queue is not None:
            queue.append(node)
        self.rank_of.append(rank)
        self.after.append(tuple(left))
        self.started.append(False)
        self.done.append(False)
        self.queue_of.append(queue)
        self._match_of.append(op.match)
        self._left.append(len(left))
        self._users.append([])
        self.pending[rank] += 1
        if self._may_start(node):
            self._start(node)

    def _may_start(self, node: int) -> bool:
        queue = self.queue_of[node]
        return not self._left[node] and (queue is None or queue[0] == node)

    def _start(self, first: int) -> None:
        """Start a node, and whatever may then start."""
        starting = [first]
        while starting:
            node = starting.pop()
            self.started[node] = True
            queue = self.queue_of[node]
            if queue is not None:
                queue.popleft()
                if queue and not self._left[queue[0]]:
                    starting.append(queue[0])
            match = self._match_of[node]
            ending = [node]
            if match != NONE:
                ending = self._running[match]
                ending.append(node)
                if len(ending) < self.programs.kernels[match]:
                    continue
            for one in ending:
                self.done[one] = True
                self.pending[self.rank_of[one]] -= 1
                self._wake(self.rank_of[one])
                for user in self._users[one]:
                    self._left[user] -= 1
                    if self._may_start(user):
                        starting.append(user)

    def _wake(self, rank: int) -> None:
        if self._blocked[rank]:
            self._blocked[rank] = False
            self._ready.append(rank)


def play(notes: Sequence[Program], rules: Rules = Rules(), **how: object) -> Play:
    """Play the notes of all ranks as far as they go."""
    return Play(numbered(notes, rules.eager), rules, **how)  # type: ignore[arg-type]


def waits_that_hang(programs: Programs, rules: Rules) -> Iterator[tuple[int, int]]:
    """Every place at which one device-wide wait of one rank would never end, in a program that ends without.

    Such a wait ends when all that the rank's device was told before does, with nothing more said by its host: one play
    for each rank, whose host is held before one note after another, answers for all its places.

    Yields:
        (rank, number of the note before which its host would wait).
    """
    for rank, ops in enumerate(programs.ops):
        one = Play(programs, rules, held={rank: 0})
        for index in range(len(ops)):
            one.let_on(rank, index)
            assert one.at[rank] == index, "the program does not end without a device-wide wait"
            if one.pending[rank]:
                yield rank, index


def waits_at_a_pass_that_hang(programs: Programs, rules: Rules) -> Iterator[int]:
    """Every k for which a device-wide wait of all ranks, each before its k-th pass, would never end."""
    passes = [[index for index, note in enumerate(program) if note[0] == "compute"] for program in programs.notes]
    for k in range(max(map(len, passes))):
        waits = {rank: {own[k]} for rank, own in enumerate(passes) if k < len(own)}
        if not Play(programs, rules, waits).ended:
            yield k
