"""The seconds of a pipeline's step: passes of each stage, messages between stages, and what replicas exchange.

It is the simulation of `parallel/simulation.py`, quick enough for a search over thousands of layouts: the order of all
passes of all ranks is found once for each schedule, and a long step is extrapolated from short ones. Once a pipeline
is full, each further micro-batch takes equally long (under interleaved schedules, each round of as many as there are
ranks), so that the seconds grow linearly; whether they do is looked at each time, and where they do not yet, longer
steps are simulated.

Around the passes are the replicas' messages. Weights are gathered while the first forward passes run, each layer
waiting for its own; gradients are reduced while the last backward passes run; then all ranks agree on the gradient's
norm, and the optimizer moves the master weights.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from parallel.plan.costs import PassTime
from parallel.schedules import Action, Pass, Placement, Schedule, orders, source_of, split_off

_MOST_PASSES = 10_000
"""Stages times micro-batches of a step from which on it is extrapolated whether it has settled or not."""
_KINDS = 4
_FORWARD, _WHOLE, _INPUT, _WEIGHTS = range(_KINDS)
"""The kinds of passes, in the order of `StageTime`."""


class StageTime(NamedTuple):
    """The time of each pass of a micro-batch through a stage; see `parallel.plan.work.LayerWork`."""

    forward: PassTime
    backward: PassTime
    input_gradient: PassTime
    weights: PassTime


class Exchange(NamedTuple):
    """Parameters of a rank that its replicas reduce, and gather, in one message.

    Attributes:
        reduce: the seconds of summing their gradients over the replicas.
        gather: the seconds of gathering their weights.
        used: the first stage that uses them, and the seconds of its forward pass from there on.
        ready: the stages that add to their gradients, each with the seconds of its last pass after it has added them.
    """

    reduce: float
    gather: float
    used: tuple[int, float]
    ready: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RankTime:
    """What a rank does around its passes.

    Attributes:
        exchanges: in the order in which the weights are used.
        after: seconds after the passes and the reduction: other messages, and the gradient's norm.
        optimizer: seconds of the update, after all ranks have agreed on the norm.
    """

    exchanges: tuple[Exchange, ...] = ()
    after: float = 0.0
    optimizer: float = 0.0


@dataclass(frozen=True)
class Step:
    """What decides the seconds of a step.

    Attributes:
        schedule, placement, micro_batches: the passes and their order.
        stages: the time of each stage's passes.
        links: the seconds of a message from each stage to the next one, and back.
        ranks: what each rank of the pipeline does around its passes.
        agreement: the seconds of the all-reduce of the gradient's norm over all ranks.
        overlap: whether reductions run beside the last backward passes, and gathers beside the first forward passes.
    """

    schedule: Schedule
    placement: Placement
    micro_batches: int
    stages: Sequence[StageTime]
    links: Sequence[float]
    ranks: Sequence[RankTime]
    agreement: float = 0.0
    overlap: bool = True


class StepTime(NamedTuple):
    """The seconds of a step, and where they go on average over the ranks of the pipeline; the parts add up.

    Attributes:
        seconds: of the step.
        products, attention, traffic, host, tp: of passes; see `parallel.plan.costs.PassTime`.
        pp: by which the step is longer than with messages between stages that take no time.
        dp: by which it is longer than with replicas that exchange nothing, the agreement on the norm included.
        optimizer: of the norm and the update.
        waiting: for other ranks.
    """

    seconds: float
    products: float
    attention: float
    traffic: float
    host: float
    tp: float
    pp: float
    dp: float
    optimizer: float
    waiting: float


def step_seconds(step: Step) -> float:
    """Return the seconds of a step, for a third of what `step_time` takes."""
    whole = _extrapolated(step, lambda passes: passes.run(step.stages, step.links, step.ranks, step.overlap))
    return whole + step.agreement


def step_time(step: Step) -> StepTime:
    """Return the seconds of a step, and where they go."""
    ranks = step.placement.num_ranks
    free = [0.0] * len(step.links)
    quiet = [RankTime()] * ranks
    alone = _extrapolated(step, lambda passes: passes.run(step.stages, free, quiet, False))
    linked = _extrapolated(step, lambda passes: passes.run(step.stages, step.links, quiet, False))
    optimizer = sum(rank.optimizer for rank in step.ranks) / ranks
    seconds = step_seconds(step)
    busy = _busy(step)
    return StepTime(
        seconds,
        busy.products / ranks,
        busy.attention / ranks,
        busy.traffic / ranks,
        busy.host / ranks,
        busy.exposed / ranks,
        linked - alone,
        seconds - linked - optimizer,
        optimizer,
        alone - busy.seconds / ranks,
    )


def _busy(step: Step) -> PassTime:
    """Return the passes of all ranks together."""
    found = PassTime()
    numbers = _numbers(step)
    for number, time in zip(numbers, (time for stage in step.stages for time in stage), strict=True):
        if number:
            found.add(time, number)
            found.host += number * time.host
    return found


def _shortest(step: Step) -> tuple[int, int]:
    """Return the micro-batches of the shortest step to extrapolate from, and by how many steps can be longer."""
    placement = step.placement
    ranks = placement.num_ranks
    # With stages around the ranks, as many micro-batches as there are ranks go through one of a rank's before the next.
    period = ranks if placement.virtual > 1 and not placement.there_and_back else 1
    return 2 * ranks + (step.micro_batches - 2 * ranks) % period, period


def _numbers(step: Step) -> list[float]:
    """Return how many passes of each kind a step has, by `_KINDS` * stage + kind: as many more for each micro-batch."""
    at, period = _shortest(step)
    longest = at + period + step.placement.num_ranks
    if longest >= step.micro_batches:
        return [*_passes_of(step, step.micro_batches).number]
    each = _of_micro_batch(step)
    rest = step.micro_batches - longest
    return [number + rest * one for number, one in zip(_passes_of(step, longest).number, each, strict=True)]


def _of_micro_batch(step: Step) -> list[float]:
    """Return how many passes of each kind a further micro-batch adds to a step of a pipeline that is full."""
    (at, period), ranks = _shortest(step), step.placement.num_ranks
    short, longer = _passes_of(step, at + period).number, _passes_of(step, at + period + ranks).number
    return [(more - less) / ranks for less, more in zip(short, longer, strict=True)]


def _extrapolated(step: Step, measure: Callable[["_Passes"], float]) -> float:
    """Return what is measured of a step, from shorter ones where it grows linearly with the micro-batches.

    A rank that is busier than the others may fall behind them only after many micro-batches: a step that grows by less
    than what the busiest rank computes is not long enough. Beyond `_MOST_PASSES` it is said to grow by that from there
    on, which has been at most 0.2 % too much.
    """
    ranks, wanted = step.placement.num_ranks, step.micro_batches
    at, period = _shortest(step)
    busiest = None
    while (longest := at + period + ranks) < wanted:
        busiest = _busiest(step) if busiest is None else busiest
        first, second, third = (measure(_passes_of(step, number)) for number in (at, at + period, longest))
        growth = (third - second) / ranks  # of a micro-batch
        steady = abs(period * growth - (second - first)) <= 1e-9 * abs(third)
        if (steady and growth >= busiest * (1 - 1e-9)) or at * step.placement.num_stages > _MOST_PASSES:
            return third + max(growth, busiest) * (wanted - longest)
        at += 2 * ranks
    return measure(_passes_of(step, wanted))


def _busiest(step: Step) -> float:
    """Return the most seconds that any rank computes for a micro-batch."""
    placement = step.placement
    seconds = [time.seconds for stage in step.stages for time in stage]
    each = [number * one for number, one in zip(_of_micro_batch(step), seconds, strict=True)]
    of_stage = [sum(each[_KINDS * stage : _KINDS * (stage + 1)]) for stage in range(placement.num_stages)]
    of_rank = [0.0] * placement.num_ranks
    for stage, one in enumerate(of_stage):
        of_rank[placement.rank_of(stage)] += one
    return max(of_rank)


class _Passes:
    """The passes of all ranks of a pipeline in an order in which each follows what it waits for."""

    def __init__(self, schedule: Schedule, placement: Placement, micro_batches: int):
        self.placement = placement
        self.number = [0] * (_KINDS * placement.num_stages)
        """The passes of each kind, by `_KINDS` * stage + kind."""
        self.last = [-1] * placement.num_stages
        """The index of each stage's last pass that computes gradients of weights."""
        self.first = [-1] * placement.num_stages
        """The index of each stage's first forward pass."""
        self.rows: list[tuple[int, int, int, int]] = []
        """Of each pass: its rank, its kind, the pass that it waits for or -1, the link of their message or -1."""
        stages = range(placement.num_stages)
        rank_of = [placement.rank_of(stage) for stage in stages]
        todo = [_numbered(order, placement, micro_batches) for order in orders(schedule, placement, micro_batches)]
        index: dict[int, int] = {}
        at = [0] * len(todo)
        while len(index) < sum(map(len, todo)):
            before = len(index)
            for rank, passes in enumerate(todo):
                while at[rank] < len(passes):
                    number, source, kind, stage, source_stage = passes[at[rank]]
                    if source >= 0 and source not in index:
                        break
                    self._add(rank, kind, stage, index.get(source, -1), rank_of[source_stage], source_stage)
                    index[number] = len(self.rows) - 1
                    at[rank] += 1
            assert len(index) > before, "the ranks wait for each other without end"

    def _add(self, rank: int, kind: int, stage: int, source: int, source_rank: int, source_stage: int) -> None:
        link = min(source_stage, stage) if source >= 0 and source_rank != rank else -1
        at = len(self.rows)
        self.rows.append((rank, _KINDS * stage + kind, source, link))
        self.number[_KINDS * stage + kind] += 1
        if kind in (_WHOLE, _WEIGHTS):
            self.last[stage] = at
        if kind == _FORWARD and self.first[stage] < 0:
            self.first[stage] = at

    def run(
        self, stages: Sequence[StageTime], links: Sequence[float], ranks: Sequence[RankTime], overlap: bool
    ) -> float:
        """Return the seconds from one agreement of all ranks to the next."""
        seconds = [time.seconds for stage in stages for time in stage]
        links = [*links, 0.0]  # the last one is of passes that wait for one of their own rank
        free = [rank.optimizer for rank in ranks]
        gates = self._gates(ranks, free, overlap)
        ended = [0.0] * (len(self.rows) + 1)  # the last one is of passes that wait for none
        at = 0
        gated = sorted(gates)
        for stop in [*gated, len(self.rows) - 1]:
            for rank, kind, source, link in self.rows[at : stop + 1]:
                begin = free[rank]
                arrived = ended[source] + links[link]
                free[rank] = ended[at] = (arrived if arrived > begin else begin) + seconds[kind]
                at += 1
            if stop in gates and gates[stop] > ended[stop]:
                free[self.rows[stop][0]] = ended[stop] = gates[stop]
        return max(self._reduced(rank, end, ended, overlap) + rank.after for rank, end in zip(ranks, free, strict=True))

    def _gates(self, ranks: Sequence[RankTime], free: list[float], overlap: bool) -> dict[int, float]:
        """Return the earliest ends of first forward passes, whose layers wait for their weights."""
        gates: dict[int, float] = {}
        for number, rank in enumerate(ranks):
            arrived = free[number]
            for one in rank.exchanges:
                arrived += one.gather
                at, rest = self.first[one.used[0]], one.used[1]
                if overlap:
                    gates[at] = max(gates.get(at, 0.0), arrived + rest)
            if not overlap:
                free[number] = arrived
        return gates

    def _reduced(self, rank: RankTime, end: float, ended: Sequence[float], overlap: bool) -> float:
        """Return when the gradients of a rank are reduced."""
        if not overlap:
            return end + sum(one.reduce for one in rank.exchanges)
        ready = [
            (max(ended[self.last[stage]] - after for stage, after in one.ready), one.reduce) for one in rank.exchanges
        ]
        now = 0.0
        for begin, reduce in sorted(ready):
            now = max(now, begin) + reduce
        return max(now, end)


def kind_of(action: Action, split: Collection[tuple[int, int]]) -> int:
    """Return the index of a pass's time in a `StageTime`.

    Args:
        action: the pass.
        split: (stage, micro-batch) of the backward passes whose weight gradients are passes of their own.
    """
    if action.what is Pass.F:
        return _FORWARD
    if action.what is Pass.W:
        return _WEIGHTS
    return _INPUT if (action.stage, action.micro_batch) in split else _WHOLE


def _numbered(
    order: Sequence[Action], placement: Placement, micro_batches: int
) -> list[tuple[int, int, int, int, int]]:
    """Return a rank's passes with numbers in place of actions, which are quicker to look up.

    Returns:
        For each pass: its number, that of the pass that it waits for or -1, its kind, its stage, and the stage of the
        pass that it waits for.
    """
    split = split_off(order)

    def number(action: Action) -> int:
        what = 0 if action.what is Pass.F else 1 if action.what is Pass.B else 2
        return (what * placement.num_stages + action.stage) * micro_batches + action.micro_batch

    found = []
    for action in order:
        source = source_of(action, placement)
        waits = (-1, action.stage) if source is None else (number(source), source.stage)
        found.append((number(action), waits[0], kind_of(action, split), action.stage, waits[1]))
    return found


def _passes_of(step: Step, micro_batches: int) -> _Passes:
    return _passes(step.schedule, step.placement, micro_batches)


@lru_cache(maxsize=2048)
def _passes(schedule: Schedule, placement: Placement, micro_batches: int) -> _Passes:
    return _Passes(schedule, placement, micro_batches)
