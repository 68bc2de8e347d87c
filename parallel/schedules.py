"""Pipeline schedules as data: which rank runs what in which order.

A model is cut into p x v stages, v for each of p ranks, and a step sends m micro-batches through them. F is the forward
pass of a stage for a micro-batch, B its backward pass. Where a schedule splits the latter, B is the gradient of the
input alone, for which the stage before waits, and W that of the weights, for which nobody waits: it fills gaps.

    schedule      stages on ranks                        source
    1f1b          0 1 .. p-1                             PipeDream-flush, arXiv 2006.09503
    interleaved   around: 0 1 .. p-1 0 1 .. p-1          Megatron-LM, arXiv 2104.04473, section 2.2
    zero_bubble   around, W split off (ZB-H1 if v = 1)   arXiv 2401.10241, section 2
    zbv           there and back, 0 1 .. p-1 p-1 .. 0,   arXiv 2401.10241, section 6
                  W split off
    dualpipev     there and back, W split off where it   DualPipe, arXiv 2412.19437, section 3.2.1, of which each rank
                  fills a gap                            runs one direction
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from model.problems import either, nearest_multiples

Schedule = Enum("Schedule", {name: name for name in ("1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev")})  # type: ignore[misc]
ONE_F_ONE_B = Schedule["1f1b"]
Schedule.__doc__ = "The order of a step's forward and backward passes; Hydra knows them by these names."

_VEE = (Schedule.zbv, Schedule.dualpipev)  # type: ignore[attr-defined]
_SPLIT = (Schedule.zero_bubble, *_VEE)  # type: ignore[attr-defined]


class Pass(Enum):
    """What is done with a stage and a micro-batch."""

    F = "forward"
    B = "backward"
    W = "weight gradients"


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one stage."""

    what: Pass
    stage: int
    micro_batch: int


Orders = list[list[Action]]
"""What each rank does, in order."""


@dataclass(frozen=True)
class Placement:
    """Which of a pipeline's ranks holds which stages.

    Attributes:
        num_ranks: p.
        virtual: v, stages of a rank.
        there_and_back: whether every second round goes backwards, so that the first rank also holds the last stage.
    """

    num_ranks: int
    virtual: int = 1
    there_and_back: bool = False

    @property
    def num_stages(self) -> int:
        """Of all ranks."""
        return self.num_ranks * self.virtual

    def rank_of(self, stage: int) -> int:
        """Who holds a stage."""
        turn, place = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - place if self.there_and_back and turn % 2 else place

    def stages_of(self, rank: int) -> list[int]:
        """What a rank holds, in the model's order."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]


def placement(schedule: Schedule, num_ranks: int, virtual: int | None) -> Placement:
    """Where a schedule has its stages; without a number, one for each rank, or two where it needs them."""
    needs_two = schedule in (Schedule.interleaved, *_VEE)  # type: ignore[attr-defined]
    return Placement(
        num_ranks, virtual or (2 if needs_two and num_ranks > 1 else 1), schedule in _VEE and num_ranks > 1
    )


def splits_backward(schedule: Schedule) -> bool:
    """Whether its passes leave the gradients of weights for later."""
    return schedule in _SPLIT


def problems(schedule: Schedule, num_ranks: int, virtual: int | None) -> list[str]:
    """Why a schedule cannot be on so many ranks with so many stages each, a sentence each with what would work."""
    name = f"parallel.schedule={schedule.name}"
    if num_ranks == 1 and schedule is not ONE_F_ONE_B:
        return [f"{name}: parallel.pp=1 is no pipeline; parallel.schedule=1f1b works"]
    if virtual is None:
        return []
    key = f"parallel.virtual_stages={virtual}"
    if virtual < 1:
        return [f"{key}: must be at least 1, or null for what the schedule needs"]
    if schedule in _VEE and virtual != 2:
        return [f"{key}: {name} goes there and back; parallel.virtual_stages=2 works"]
    if schedule is ONE_F_ONE_B and virtual != 1:
        return [f"{key}: {name} has one stage on each rank; parallel.schedule=interleaved has more"]
    if schedule.name == "interleaved" and virtual < 2:
        return [f"{key}: {name} has several stages on each rank; 2 works, and parallel.schedule=1f1b has one"]
    return []


def batch_problems(schedule: Schedule, num_ranks: int, global_batch: int, sequences: int) -> list[str]:
    """Why a schedule cannot run a step of a batch, a sentence with what would work.

    Args:
        schedule, num_ranks: without `problems`.
        global_batch: sequences of a step.
        sequences: of these that go through as a micro-batch, over all replicas; divides them.
    """
    micro_batches = global_batch // sequences
    made = f"train.global_batch={global_batch}: makes {micro_batches} micro-batches of {sequences}, and "
    if schedule.name == "interleaved" and micro_batches % num_ranks:
        works = either("train.global_batch", nearest_multiples(global_batch, num_ranks * sequences))
        return [f"{made}parallel.schedule=interleaved goes round by parallel.pp={num_ranks}; {works} would work, or "
                "parallel.schedule=zero_bubble with any"]  # fmt: skip
    if schedule.name == "dualpipev" and micro_batches < 2 * num_ranks:
        works = f"train.global_batch={2 * num_ranks * sequences} or more would work, or parallel.schedule=zbv with any"
        return [f"{made}parallel.schedule=dualpipev needs 2 x parallel.pp = {2 * num_ranks}; {works}"]
    return []


def orders(schedule: Schedule, place: Placement, micro_batches: int) -> Orders:
    """What each rank of a pipeline does in a step; `problems` has been asked."""
    if place.there_and_back:
        return _zbv(place, micro_batches) if schedule.value == "zbv" else _dualpipev(place, micro_batches)
    return _around(place, micro_batches, splits_backward(schedule))


def forward_orders(place: Placement, micro_batches: int) -> Orders:
    """Forward passes alone: evaluation."""
    forward, _ = _rounds(place, micro_batches)
    return [
        [Action(Pass.F, place.stages_of(rank)[turn], mb) for turn, mb in forward] for rank in range(place.num_ranks)
    ]


def _rounds(place: Placement, micro_batches: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(turn, micro-batch) in the order in which every rank runs them forward, and backward: p micro-batches go through
    all turns before the next p begin."""
    p, turns = place.num_ranks, range(place.virtual)
    groups = [range(at, min(at + p, micro_batches)) for at in range(0, micro_batches, p)]
    forward = [(turn, mb) for group in groups for turn in turns for mb in group]
    return forward, [(turn, mb) for group in groups for turn in reversed(turns) for mb in group]


def _around(place: Placement, m: int, split: bool) -> Orders:
    """1F1B, interleaved, ZB-H1, and both: forward passes to fill the pipeline, then one backward pass for each."""
    p, v = place.num_ranks, place.virtual
    forward, backward = _rounds(place, m)
    # A pass through v stages of a rank is a v-th as long: an interleaved pipeline is twice as deep in them, and one
    # whose backward pass is as short as its forward pass is not.
    lead = 2 if v > 1 and not split else 1
    made = []
    for rank in range(p):
        stages, order = place.stages_of(rank), _Order()
        filling = min((v - 1) * min(p, m) + lead * (p - 1 - rank), v * m)
        for turn, _ in forward[:filling]:
            order.add(stages[turn], "F")
        for index, (turn, _) in enumerate(backward):
            if filling + index < v * m:
                order.add(stages[forward[filling + index][0]], "F")
            order.backward(stages[turn], split)
            # Rank r leaves r of them for the gaps at the end; with the passes that it is ahead by, p in all.
            if index >= rank:
                order.weights()
        made.append(order.ended())
    return made


def _zbv(place: Placement, m: int) -> Orders:
    """Forward passes there, then there and back by turns; then F, B and W of each turn; W fills the end.

    It takes 2p - 1 micro-batches to fill; of fewer, the passes of those that are missing are left out.
    """
    p, passes = place.num_ranks, max(2 * place.num_ranks - 1, m)
    made = []
    for rank in range(p):
        there, back = place.stages_of(rank)
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
        made.append([action for action in order.ended() if action.micro_batch < m])
    return made


def _dualpipev(place: Placement, m: int) -> Orders:
    """DeepSeek's order, in which a forward pass of one turn meets a backward pass of the other.

    Weight gradients are left for later where a step begins to flow back and where it ends; between, nothing waits.
    """
    p = place.num_ranks
    made = []
    for rank in range(p):
        there, back = place.stages_of(rank)
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
        # Half of what is left waits for the time when nothing comes any more.
        half = (rank + 1) // 2
        for index in range(rank + 1):
            order.backward(back, split=index > half or (index == half and rank % 2 == 1))
            order.backward(there, split=index >= half)
        for _ in range(ahead):
            order.weights()
            order.backward(there, split=True)
        made.append(order.ended())
    return made


class _Order:
    """One rank's actions, the micro-batches of each pass and stage counted up."""

    def __init__(self) -> None:
        self.count: Counter[tuple[Pass, int]] = Counter()
        self._actions: list[Action] = []
        self._left: deque[Action] = deque()

    def add(self, stage: int, passes: str) -> None:
        """The next micro-batch of each of these passes (``"FBW"``) through a stage."""
        for what in map(Pass.__getitem__, passes):
            self._actions.append(Action(what, stage, self.count[what, stage]))
            self.count[what, stage] += 1

    def backward(self, stage: int, split: bool) -> None:
        """A backward pass, of which W may be left for later."""
        self.add(stage, "B")
        if split:
            self._left.append(Action(Pass.W, stage, self._actions[-1].micro_batch))

    def weights(self) -> None:
        """What has been left longest, if anything has."""
        if self._left:
            self._actions.append(self._left.popleft())

    def ended(self) -> list[Action]:
        """All actions, with what is still left at the end."""
        return [*self._actions, *self._left]


# ---- what it costs ----


@dataclass(frozen=True)
class Span:
    """An action and the seconds at which it began and ended."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step, simulated or measured.

    Attributes:
        blocks: of each rank, in order.
        kept: the most activations that each rank kept for its backward passes, in micro-batches of a rank's whole part
            of the model.
    """

    blocks: list[list[Span]]
    kept: list[float]

    @property
    def seconds(self) -> float:
        """From the first rank's beginning to the last rank's end."""
        return max(order[-1].end for order in self.blocks) - min(order[0].start for order in self.blocks)

    @property
    def busy(self) -> list[float]:
        """Share of that time in which each rank computes."""
        return [sum(block.end - block.start for block in order) / self.seconds for order in self.blocks]

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait."""
        return 1 - sum(self.busy) / len(self.blocks)


@dataclass(frozen=True)
class Costs:
    """Seconds of each stage for a micro-batch, and of a message between two ranks.

    Attributes:
        forward, backward, weights: by stage; a backward pass that is not split takes both latter.
        link: from the end of a pass to when another rank has its result.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weights: Sequence[float]
    link: float = 0.0


def simulate(made: Orders, place: Placement, costs: Costs) -> Timeline:
    """Play a step: each rank does its actions in order, as soon as what they need has come.

    Raises:
        ValueError: the ranks wait for each other without end.
    """
    split = {key for order in made for key in split_off(order)}
    ended: dict[Action, float] = {}
    blocks: list[list[Span]] = [[] for _ in made]
    kept, most = [0] * len(made), [0] * len(made)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(made):
            while len(blocks[rank]) < len(order):
                action = order[len(blocks[rank])]
                source = source_of(action, place)
                if source is not None and source not in ended:
                    break
                ready = 0.0
                if source is not None:
                    ready = ended[source] + (costs.link if place.rank_of(source.stage) != rank else 0.0)
                seconds = {Pass.F: costs.forward, Pass.B: costs.backward, Pass.W: costs.weights}[action.what][
                    action.stage
                ]
                whole = action.what is Pass.B and (action.stage, action.micro_batch) not in split
                start = max(ready, blocks[rank][-1].end if blocks[rank] else 0.0)
                end = start + seconds + (costs.weights[action.stage] if whole else 0.0)
                blocks[rank].append(Span(action, start, end))
                ended[action] = end
                kept[rank] += 1 if action.what is Pass.F else -1 if whole or action.what is Pass.W else 0
                most[rank] = max(most[rank], kept[rank])
                moved = True
    if any(len(done) < len(order) for done, order in zip(blocks, made, strict=True)):
        raise ValueError("the ranks wait for each other without end")
    return Timeline(blocks, [number / place.virtual for number in most])


def split_off(order: Iterable[Action]) -> set[tuple[int, int]]:
    """(stage, micro-batch) of the backward passes that leave their weight gradients for a pass of their own."""
    return {(action.stage, action.micro_batch) for action in order if action.what is Pass.W}


def user_of(action: Action) -> Action:
    """The action of another stage that needs the result of a forward or backward pass, if there is such a stage."""
    return Action(action.what, action.stage + (1 if action.what is Pass.F else -1), action.micro_batch)


def receiver_of(action: Action, place: Placement) -> int | None:
    """The rank that needs the result of an action; None where no other stage does."""
    stage = user_of(action).stage
    return None if action.what is Pass.W or not 0 <= stage < place.num_stages else place.rank_of(stage)


def source_of(action: Action, place: Placement) -> Action | None:
    """The action whose result another one needs; None for the first stage's forward pass, which needs data."""
    stage, mb = action.stage, action.micro_batch
    if action.what is Pass.F:
        return Action(Pass.F, stage - 1, mb) if stage else None
    if action.what is Pass.W:
        return Action(Pass.B, stage, mb)
    return Action(Pass.B, stage + 1, mb) if stage < place.num_stages - 1 else Action(Pass.F, stage, mb)
