"""The seconds of a pipeline's step: passes of each stage, messages between stages, and what replicas exchange.

It is the simulation of `parallel/simulation.py`, quick enough for a search over thousands of layouts: the order of all
passes of all ranks is found once for each schedule, and a long step is extrapolated from short ones. Once a pipeline
is full, each further round of as many micro-batches as it has ranks takes equally long, so that the seconds grow
linearly; whether they do is looked at each time, and where they do not yet, longer steps are simulated.

Around the passes are the replicas' messages. Weights are gathered while the first forward passes run, each layer
waiting for its own; gradients are reduced while the last backward passes run; then all ranks agree on the gradient's
norm, and the optimizer moves the master weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from parallel.plan.costs import PassTime
from parallel.schedules import Action, Orders, Pass, Placement, Schedule, orders, source_of, split_off

_MOST_ROUNDS = 6
"""Rounds of as many micro-batches as there are ranks in the longest step that is simulated to extrapolate from."""
_KINDS = 4  # of passes: F, a whole B, B without the gradients of weights, W


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


def step_time(step: Step) -> StepTime:
    """Return the seconds of a step."""
    ranks = step.placement.num_ranks
    free = [0.0] * len(step.links)
    quiet = [RankTime()] * ranks
    alone = _extrapolated(step, lambda passes: passes.run(step.stages, free, quiet, False))
    linked = _extrapolated(step, lambda passes: passes.run(step.stages, step.links, quiet, False))
    whole = _extrapolated(step, lambda passes: passes.run(step.stages, step.links, step.ranks, step.overlap))
    optimizer = sum(rank.optimizer for rank in step.ranks) / ranks
    seconds = whole + step.agreement
    busy = _busy(step)
    parts = [getattr(busy, name) / ranks for name in ("products", "attention", "traffic", "host", "exposed")]
    waiting = alone - busy.seconds / ranks
    return StepTime(seconds, *parts, linked - alone, seconds - linked - optimizer, optimizer, waiting)


def _busy(step: Step) -> PassTime:
    """Return the passes of all ranks together."""
    found = PassTime()
    numbers = _numbers(step.schedule, step.placement, step.micro_batches)
    for number, time in zip(numbers, (time for stage in step.stages for time in stage), strict=True):
        if number:
            found.add(time, number)
            found.host += number * time.host
    return found


@lru_cache(maxsize=8192)
def _numbers(schedule: Schedule, placement: Placement, micro_batches: int) -> list[int]:
    """Return how many passes of each kind a step has, by `_KINDS` * stage + kind."""
    period = placement.num_ranks
    at = 4 * period + micro_batches % period
    if micro_batches <= at + period:
        return _passes(schedule, placement, micro_batches).number
    first, second = (_passes(schedule, placement, number).number for number in (at, at + period))
    rounds = (micro_batches - at) // period
    return [one + rounds * (other - one) for one, other in zip(first, second, strict=True)]


def _extrapolated(step: Step, measure: Callable[["_Passes"], float]) -> float:
    """Return what is measured of a step, from shorter ones where it grows linearly with the micro-batches.

    A rank that is busier than the others may fall behind them only after many micro-batches: a step that grows by less
    than what the busiest rank computes is not long enough. Beyond `_MOST_ROUNDS` it is said to grow by that from there
    on, which has been at most 0.1 % too much.
    """
    wanted, period, busiest = step.micro_batches, step.placement.num_ranks, _busiest(step)
    at = 2 * period + (wanted - 2 * period) % period

    def of(micro_batches: int) -> float:
        return measure(_passes(step.schedule, step.placement, micro_batches))

    while at + 2 * period < wanted:
        first, second, third = of(at), of(at + period), of(at + 2 * period)
        growth = third - second
        steady = abs(growth - (second - first)) <= 1e-9 * abs(third)
        if steady and (growth >= busiest * (1 - 1e-9) or at > _MOST_ROUNDS * period):
            return third + max(growth, busiest) * ((wanted - at) // period - 2)
        at += at // period * period  # which keeps what is left over of a period
    return of(wanted)


def _busiest(step: Step) -> float:
    """Return the most seconds that any rank computes for as many micro-batches as the pipeline has ranks."""
    period = step.placement.num_ranks
    short, longer = (_numbers(step.schedule, step.placement, rounds * period) for rounds in (4, 5))
    seconds = [time.seconds for stage in step.stages for time in stage]
    each = [(longer[at] - short[at]) * seconds[at] for at in range(len(seconds))]
    of_stage = [sum(each[_KINDS * stage : _KINDS * (stage + 1)]) for stage in range(step.placement.num_stages)]
    return max(sum(of_stage[stage] for stage in step.placement.stages_of(rank)) for rank in range(period))


class _Passes:
    """The passes of all ranks of a pipeline in an order in which each follows what it waits for."""

    def __init__(self, schedule: Schedule, placement: Placement, micro_batches: int):
        made = orders(schedule, placement, micro_batches)
        split = {key for order in made for key in split_off(order)}
        rank_of = {stage: placement.rank_of(stage) for stage in range(placement.num_stages)}
        index: dict[Action, int] = {}
        self.placement = placement
        self.number = [0] * (_KINDS * placement.num_stages)
        """The passes of each kind, by `_KINDS` * stage + kind."""
        self.last = [-1] * placement.num_stages
        """The index of each stage's last pass that computes gradients of weights."""
        self.first = [-1] * placement.num_stages
        """The index of each stage's first forward pass."""
        self.rows: list[tuple[int, int, int, int]] = []
        """Of each pass: its rank, its kind, the pass that it waits for or -1, the link of their message or -1."""
        for rank, action in _in_order(made, placement):
            key, stage = (action.stage, action.micro_batch), action.stage
            kind = {Pass.F: 0, Pass.B: 2 if key in split else 1, Pass.W: 3}[action.what]
            source = source_of(action, placement)
            link = -1
            if source is not None and rank_of[source.stage] != rank:
                link = min(source.stage, stage)
            index[action] = at = len(self.rows)
            self.rows.append((rank, _KINDS * stage + kind, -1 if source is None else index[source], link))
            self.number[_KINDS * stage + kind] += 1
            if kind in (1, 3):
                self.last[stage] = at
            if action.what is Pass.F and self.first[stage] < 0:
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
        for at, (rank, kind, source, link) in enumerate(self.rows):
            begin = free[rank]
            arrived = ended[source] + links[link]
            if arrived > begin:
                begin = arrived
            end = begin + seconds[kind]
            if at in gates and gates[at] > end:
                end = gates[at]
            free[rank] = ended[at] = end
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


def _in_order(made: Orders, placement: Placement) -> Iterator[tuple[int, Action]]:
    """Yield the passes of all ranks so that each follows what it waits for."""
    done: set[Action] = set()
    at = [0] * len(made)
    while any(begin < len(order) for begin, order in zip(at, made, strict=True)):
        before = len(done)
        for rank, order in enumerate(made):
            while at[rank] < len(order):
                action = order[at[rank]]
                source = source_of(action, placement)
                if source is not None and source not in done:
                    break
                done.add(action)
                at[rank] += 1
                yield rank, action
        assert len(done) > before, "the ranks wait for each other without end"


@lru_cache(maxsize=2048)
def _passes(schedule: Schedule, placement: Placement, micro_batches: int) -> _Passes:
    return _Passes(schedule, placement, micro_batches)
