"""A step of a pipeline before it is run: how long it takes, what it holds, and when each message is asked for.

NCCL differs from Gloo in that a message is a kernel on both sides: the sender's ends when the receiver's has begun, the
first message between two ranks blocks both hosts until the other is there, and whatever waits for a whole device (a
kernel that is timed when it is first met, an allocator that gives memory back, code that is loaded) waits for its
messages too. A rank that asks for a message before others can send it, or sends one that is not asked for, may then
wait for itself. `programs` asks for every message at a place where that cannot be: there is one order of all passes of
all ranks, in which each message follows the pass that makes it, and in which every rank does its passes, sends and
receives. Even if each of them waited until the one before was over, none would wait for a later one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.schedules import Action, Orders, Pass, Placement, receiver_of, source_of, split_off


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
        spans: of each rank, in order.
        activations: the most that each rank saved for its backward passes, in micro-batches of a rank's whole part of
            the model.
    """

    spans: list[list[Span]]
    activations: list[float]

    @property
    def seconds(self) -> float:
        """From the first rank's beginning to the last rank's end."""
        return max(rank[-1].end for rank in self.spans) - min(rank[0].start for rank in self.spans)

    @property
    def busy(self) -> list[float]:
        """Share of that time in which each rank computes."""
        return [sum(span.end - span.start for span in rank) / self.seconds for rank in self.spans]

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait."""
        return 1 - sum(self.busy) / len(self.spans)


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


def simulate(orders: Orders, placement: Placement, costs: Costs) -> Timeline:
    """Play a step: each rank does its actions in order, as soon as what they need has come.

    Raises:
        ValueError: the ranks wait for each other without end.
    """
    split = {key for order in orders for key in split_off(order)}
    seconds_of = {Pass.F: costs.forward, Pass.B: costs.backward, Pass.W: costs.weights}
    ended: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in orders]
    saved, most = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while len(spans[rank]) < len(order):
                action = order[len(spans[rank])]
                source = source_of(action, placement)
                if source is not None and source not in ended:
                    break
                arrived = 0.0
                if source is not None:
                    arrived = ended[source] + (costs.link if placement.rank_of(source.stage) != rank else 0.0)
                whole = action.what is Pass.B and (action.stage, action.micro_batch) not in split
                start = max(arrived, spans[rank][-1].end if spans[rank] else 0.0)
                end = start + seconds_of[action.what][action.stage] + (costs.weights[action.stage] if whole else 0.0)
                spans[rank].append(Span(action, start, end))
                ended[action] = end
                saved[rank] += 1 if action.what is Pass.F else -1 if whole or action.what is Pass.W else 0
                most[rank] = max(most[rank], saved[rank])
                moved = True
    if any(len(done) < len(order) for done, order in zip(spans, orders, strict=True)):
        raise ValueError("the ranks wait for each other without end")
    return Timeline(spans, [number / placement.virtual for number in most])


@dataclass(frozen=True)
class Program:
    """What one rank does in a step.

    Attributes:
        actions: its passes, in order.
        receives: before each of these, the actions of other ranks whose results it asks for, in order.
        turn: of every action of all ranks, its place among those of its rank.
    """

    actions: list[Action]
    receives: list[list[Action]]
    turn: dict[Action, int]


def programs(orders: Orders, placement: Placement) -> list[Program]:
    """What each rank of a pipeline does, its receives among its passes.

    All passes are ordered by when they end if each takes equally long. A message follows the pass that makes it, so its
    receiver asks for it before the first of its own passes that ends later: in time for the message to travel while
    that pass runs, and never before something that the sender waits for. Both ends of a link meet its messages, of
    either direction, in the same order.

    Args:
        orders: of all ranks.
        placement: of the stages.
    """
    even = [1.0] * placement.num_stages
    spans = simulate(orders, placement, Costs(even, even, even)).spans
    in_order = sorted((span.end, rank, span.action) for rank, row in enumerate(spans) for span in row)
    turn = {action: index for order in orders for index, action in enumerate(order)}
    waiting: list[list[Action]] = [[] for _ in orders]
    receives: list[list[list[Action]]] = [[] for _ in orders]
    for _, rank, action in in_order:
        receives[rank].append(waiting[rank])
        waiting[rank] = []
        receiver = receiver_of(action, placement)
        if receiver is not None and receiver != rank:
            waiting[receiver].append(action)
    assert not any(waiting), "a message that no pass uses"
    return [Program(order, receives[rank], turn) for rank, order in enumerate(orders)]
