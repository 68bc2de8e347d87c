"""Pipeline schedules as data: the passes that each rank runs, in order.

A model is cut into p x v stages, v for each of p ranks, and a step sends m micro-batches through them. F is the forward
pass of a stage for a micro-batch, B its backward pass. Where a schedule splits the latter, B is the gradient of the
input alone, for which the stage before waits, and W that of the weights, for which no stage waits: it fills gaps.

    schedule      stages on ranks                        source
    1f1b          0 1 .. p-1                             PipeDream-flush, arXiv 2006.09503
    interleaved   around: 0 1 .. p-1 0 1 .. p-1          Megatron-LM, arXiv 2104.04473, section 2.2
    zero_bubble   around, W split off (ZB-H1 if v = 1)   arXiv 2401.10241, section 2
    zbv           V-shaped: 0 1 .. p-1 p-1 .. 0,         arXiv 2401.10241, section 6
                  W split off
    dualpipev     V-shaped, W split off where it         DualPipe, arXiv 2412.19437, section 3.2.1, of which each rank
                  fills a gap                            runs one direction

A schedule is a row of `TABLE` and a function that makes the orders of all ranks. The passes and messages of a step, its
simulation (`parallel/simulation.py`), its picture and the checks of a configuration follow from the two.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial

from model.problems import either, nearest_multiples


class Pass(Enum):
    """The kinds of passes of a micro-batch through a stage."""

    F = "forward"
    B = "backward"
    W = "weight gradients"


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one stage."""

    what: Pass
    stage: int
    micro_batch: int

    @property
    def said(self) -> str:
        """The pass in words, as ``B stage 3 micro-batch 17``."""
        return f"{self.what.name} stage {self.stage} micro-batch {self.micro_batch}"


Orders = list[list[Action]]
"""The actions of each rank, in order."""


@dataclass(frozen=True)
class Placement:
    """The placement of stages on the ranks of a pipeline.

    Attributes:
        num_ranks: the number of pipeline ranks, p.
        virtual: the number of virtual stages (model chunks) of a rank, v.
        there_and_back: whether every second chunk is placed from the last rank to the first (V-shaped for v = 2), so
            that the first rank also holds the last stage.
    """

    num_ranks: int
    virtual: int = 1
    there_and_back: bool = False

    @property
    def num_stages(self) -> int:
        """The number of stages over all ranks."""
        return self.num_ranks * self.virtual

    @property
    def loss_rank(self) -> int:
        """The rank that holds the last stage and computes the loss."""
        return self.rank_of(self.num_stages - 1)

    @property
    def links(self) -> list[tuple[int, int]]:
        """The (sender, receiver) pairs of ranks that exchange activations or gradients, in one order on all ranks."""
        pairs = {(self.rank_of(stage), self.rank_of(stage + 1)) for stage in range(self.num_stages - 1)}
        return sorted({link for a, b in pairs if a != b for link in ((a, b), (b, a))})

    def rank_of(self, stage: int) -> int:
        """Return the rank that holds a stage."""
        chunk, index = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - index if self.there_and_back and chunk % 2 else index

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages that a rank holds, in the model's order."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]


def forward_orders(placement: Placement, micro_batches: int) -> Orders:
    """Return the forward passes of an evaluation, for each rank."""
    forward, _ = _chunk_orders(placement, micro_batches)
    return [
        [Action(Pass.F, placement.stages_of(rank)[chunk], mb) for chunk, mb in forward]
        for rank in range(placement.num_ranks)
    ]


def _chunk_orders(placement: Placement, micro_batches: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return (chunk, micro-batch) in the order in which every rank runs them forward, and backward: p micro-batches go
    through all chunks of a rank before the next p begin."""
    p, chunks = placement.num_ranks, range(placement.virtual)
    groups = [range(at, min(at + p, micro_batches)) for at in range(0, micro_batches, p)]
    forward = [(chunk, mb) for group in groups for chunk in chunks for mb in group]
    return forward, [(chunk, mb) for group in groups for chunk in reversed(chunks) for mb in group]


def _around(placement: Placement, m: int, split: bool) -> Orders:
    """Make the orders of 1F1B and ZB-H1, interleaved or not: warm-up forward passes, then F and B by turns."""
    p, v = placement.num_ranks, placement.virtual
    forward, backward = _chunk_orders(placement, m)
    # A pass through one of v stages is a v-th as long. Interleaved 1F1B warms up with twice as many of them, as
    # Megatron-LM does; where B is split and so as short as F, one for each later rank is enough.
    lead = 2 if v > 1 and not split else 1
    orders = []
    for rank in range(p):
        stages, order = placement.stages_of(rank), _Order()
        warmup = min((v - 1) * min(p, m) + lead * (p - 1 - rank), v * m)
        for chunk, _ in forward[:warmup]:
            order.add(stages[chunk], "F")
        for index, (chunk, _) in enumerate(backward):
            if warmup + index < v * m:
                order.add(stages[forward[warmup + index][0]], "F")
            order.backward(stages[chunk], split)
            # Rank r defers r weight passes to the gaps at the end; with its warm-up, it saves p micro-batches in all.
            if index >= rank:
                order.weights()
        orders.append(order.ended())
    return orders


def _zbv(placement: Placement, m: int) -> Orders:
    """Make the orders of ZB-V: F of the first chunk, then of both by turns; F, B and W of each by turns; W at the end.

    The pipeline takes 2p - 1 micro-batches to fill; with fewer, the passes of the missing ones are left out.
    """
    p, passes = placement.num_ranks, max(2 * placement.num_ranks - 1, m)
    orders = []
    for rank in range(p):
        there, back = placement.stages_of(rank)
        order = _Order()
        order.add(there, "F" * (2 * (p - rank) - 1))
        for _ in range(rank):
            order.add(back, "F")
            order.add(there, "F")
        for _ in range(p - rank):
            order.add(back, "FBW")
        while order.count[Pass.F, back] < passes:
            order.add(there, "FBW" if order.count[Pass.F, there] < passes else "BW")
            order.add(back, "FBW")
        for _ in range(rank):
            order.add(there, "B")
            order.add(back, "B")
        for _ in range(p - rank):
            order.add(there, "BW")
        for stage in (back, there):
            order.add(stage, "W" * (passes - order.count[Pass.W, stage]))
        orders.append([action for action in order.ended() if action.micro_batch < m])
    return orders


def _dualpipev(placement: Placement, m: int) -> Orders:
    """Make the orders of DualPipeV, in which a forward pass of one chunk is paired with a backward pass of the other.

    Weight gradients are deferred during the first backward passes and at the end; between them no rank waits.
    """
    p = placement.num_ranks
    orders = []
    for rank in range(p):
        there, back = placement.stages_of(rank)
        order, ahead = _Order(), p - 1 - rank
        order.add(there, "F" * 2 * ahead)
        for _ in range(rank + 1):
            order.add(there, "F")
            order.add(back, "F")
        for _ in range(ahead):
            order.add(back, "BWF")
        for _ in range(m - 2 * p + rank + 1):
            order.add(there, "F")
            order.add(back, "BF")
            order.add(there, "B")
        for _ in range(ahead):
            order.add(back, "BF")
            order.add(there, "B")
        # Half of the remaining weight gradients are deferred to the end, when nothing arrives any more.
        half = (rank + 1) // 2
        for index in range(rank + 1):
            order.backward(back, split=index > half or (index == half and rank % 2 == 1))
            order.backward(there, split=index >= half)
        for _ in range(ahead):
            order.weights()
            order.backward(there, split=True)
        orders.append(order.ended())
    return orders


class _Order:
    """The actions of one rank, with the next micro-batch of each pass and stage counted."""

    def __init__(self) -> None:
        self.count: Counter[tuple[Pass, int]] = Counter()
        self._actions: list[Action] = []
        self._deferred: deque[Action] = deque()

    def add(self, stage: int, passes: str) -> None:
        """Add the next micro-batch of each of these passes (``"FBW"``) through a stage."""
        for what in map(Pass.__getitem__, passes):
            self._actions.append(Action(what, stage, self.count[what, stage]))
            self.count[what, stage] += 1

    def backward(self, stage: int, split: bool) -> None:
        """Add a backward pass, whose W is deferred if it is split."""
        self.add(stage, "B")
        if split:
            self._deferred.append(Action(Pass.W, stage, self._actions[-1].micro_batch))

    def weights(self) -> None:
        """Add the W that has been deferred longest, if there is one."""
        if self._deferred:
            self._actions.append(self._deferred.popleft())

    def ended(self) -> list[Action]:
        """Return all actions, the W that are still deferred at the end."""
        return [*self._actions, *self._deferred]


# ---- dependencies ----


def split_off(order: Iterable[Action]) -> set[tuple[int, int]]:
    """Return (stage, micro-batch) of the backward passes whose weight gradients are passes of their own."""
    return {(action.stage, action.micro_batch) for action in order if action.what is Pass.W}


def consumer_of(action: Action) -> Action:
    """Return the action of another stage that needs the result of a forward or backward pass, if that stage exists."""
    return Action(action.what, action.stage + (1 if action.what is Pass.F else -1), action.micro_batch)


def receiver_of(action: Action, placement: Placement) -> int | None:
    """Return the rank that needs the result of an action; None where no other stage does."""
    stage = consumer_of(action).stage
    return None if action.what is Pass.W or not 0 <= stage < placement.num_stages else placement.rank_of(stage)


def source_of(action: Action, placement: Placement) -> Action | None:
    """Return the action whose result an action needs; None for the first stage's forward pass, which needs data."""
    stage, mb = action.stage, action.micro_batch
    if action.what is Pass.F:
        return Action(Pass.F, stage - 1, mb) if stage else None
    if action.what is Pass.W:
        return Action(Pass.B, stage, mb)
    return Action(Pass.B, stage + 1, mb) if stage < placement.num_stages - 1 else Action(Pass.F, stage, mb)


# ---- the table ----


@dataclass(frozen=True)
class ScheduleRow:
    """The definition of a schedule, apart from its name.

    Attributes:
        orders: a function from the placement and the number of micro-batches to the actions of each rank, in order.
        splits_backward: whether the gradients of weights are passes of their own.
        there_and_back: whether the placement is V-shaped, so that the first rank also holds the last stage.
        virtual_stages: the least (the default) and the largest number of stages of a rank, None for no limit.
        stages_said: the end of the error message for another number of stages.
        multiple_of_ranks: whether the number of micro-batches of a step has to be a multiple of the ranks.
        least_per_rank: the least number of micro-batches of a step for each rank of the pipeline.
    """

    orders: Callable[[Placement, int], Orders]
    splits_backward: bool = False
    there_and_back: bool = False
    virtual_stages: tuple[int, int | None] = (1, None)
    stages_said: str = ""
    multiple_of_ranks: bool = False
    least_per_rank: int = 0


_THERE_AND_BACK = "goes there and back; parallel.virtual_stages=2 works"
TABLE: dict[str, ScheduleRow] = {
    "1f1b": ScheduleRow(
        partial(_around, split=False),
        virtual_stages=(1, 1),
        stages_said="has one stage on each rank; parallel.schedule=interleaved has more",
    ),
    "interleaved": ScheduleRow(
        partial(_around, split=False),
        virtual_stages=(2, None),
        stages_said="has several stages on each rank; 2 works, and parallel.schedule=1f1b has one",
        multiple_of_ranks=True,
    ),
    "zero_bubble": ScheduleRow(partial(_around, split=True), splits_backward=True),
    "zbv": ScheduleRow(
        _zbv, splits_backward=True, there_and_back=True, virtual_stages=(2, 2), stages_said=_THERE_AND_BACK
    ),
    "dualpipev": ScheduleRow(
        _dualpipev,
        splits_backward=True,
        there_and_back=True,
        virtual_stages=(2, 2),
        stages_said=_THERE_AND_BACK,
        least_per_rank=2,
    ),
}

Schedule = Enum("Schedule", {name: name for name in TABLE})  # type: ignore[misc]
ONE_F_ONE_B = Schedule["1f1b"]
Schedule.__doc__ = "The pipeline schedules, by their names in a configuration."


def placement_of(schedule: Schedule, num_ranks: int, virtual: int | None) -> Placement:
    """Return a schedule's placement; without a number of virtual stages, it has the least that the schedule allows."""
    row = TABLE[schedule.name]
    if num_ranks == 1:  # no pipeline
        return Placement(1, virtual or 1)
    return Placement(num_ranks, virtual or row.virtual_stages[0], row.there_and_back)


def splits_backward(schedule: Schedule) -> bool:
    """Return whether a schedule runs the gradients of weights as passes of their own."""
    return TABLE[schedule.name].splits_backward


def problems(schedule: Schedule, num_ranks: int, virtual: int | None) -> list[str]:
    """Return why a schedule cannot have these ranks and virtual stages, a sentence each with what would work."""
    name, row = f"parallel.schedule={schedule.name}", TABLE[schedule.name]
    if num_ranks == 1 and schedule is not ONE_F_ONE_B:
        return [f"{name}: parallel.pp=1 is no pipeline; parallel.schedule=1f1b works"]
    if virtual is None:
        return []
    key = f"parallel.virtual_stages={virtual}"
    if virtual < 1:
        return [f"{key}: must be at least 1, or null for what the schedule needs"]
    least, most = row.virtual_stages
    if virtual < least or (most is not None and virtual > most):
        return [f"{key}: {name} {row.stages_said}"]
    return []


def batch_problems(schedule: Schedule, num_ranks: int, global_batch: int, sequences: int) -> list[str]:
    """Return why a schedule cannot run a step of this batch, a sentence with what would work.

    Args:
        schedule, num_ranks: the schedule and its number of ranks, for which `problems` is empty.
        global_batch: the number of sequences of a step.
        sequences: the number of sequences of a micro-batch over all replicas, which divides the global batch.
    """
    micro_batches, row, name = global_batch // sequences, TABLE[schedule.name], f"parallel.schedule={schedule.name}"
    said = f"train.global_batch={global_batch}: makes {micro_batches} micro-batches of {sequences}, and {name}"
    if row.multiple_of_ranks and micro_batches % num_ranks:
        works = either("train.global_batch", nearest_multiples(global_batch, num_ranks * sequences))
        return [f"{said} goes round by parallel.pp={num_ranks}; {works} would work, or "
                "parallel.schedule=zero_bubble with any"]  # fmt: skip
    least = row.least_per_rank * num_ranks
    if micro_batches < least:
        works = f"train.global_batch={least * sequences} or more would work, or parallel.schedule=zbv with any"
        return [f"{said} needs {row.least_per_rank} x parallel.pp = {least}; {works}"]
    return []


def orders(schedule: Schedule, placement: Placement, micro_batches: int) -> Orders:
    """Return the actions of each rank in a step; `problems` is empty for these arguments."""
    return TABLE[schedule.name].orders(placement, micro_batches)
