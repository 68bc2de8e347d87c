"""Simulation of a pipeline's step before it runs: its time, its saved activations, and when each receive is posted.

NCCL differs from Gloo in that a message is a kernel on both sides: the sender's ends when the receiver's has begun, the
first message between two ranks blocks both hosts until the other is there, and whatever synchronises a whole device
(autotuning of a kernel, an allocator that frees memory, loading of code) waits for its messages too. A rank that posts
a receive before others can send, or sends where no receive is posted, may then wait for itself. `programs` posts
every receive at a point where that cannot happen: there is one order of all passes of all ranks, in which each message
follows the pass that produces it, and in which every rank does its passes, sends and receives. Even if each of them
waited until the one before was over, none would wait for a later one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.schedules import Action, Orders, Pass, Placement, consumer_of, receiver_of, source_of, split_off


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
        spans: the passes of each rank, in order.
        activations: the most activations that each rank saved for its backward passes, in micro-batches through all its
            stages.
    """

    spans: list[list[Span]]
    activations: list[float]

    @property
    def seconds(self) -> float:
        """The seconds from the start of the first pass to the end of the last one, over all ranks."""
        return max(rank[-1].end for rank in self.spans) - min(rank[0].start for rank in self.spans)

    @property
    def busy(self) -> list[float]:
        """The share of the step in which each rank computes."""
        return [sum(span.end - span.start for span in rank) / self.seconds for rank in self.spans]

    @property
    def bubble(self) -> float:
        """The share of the step in which ranks wait, averaged over the ranks."""
        return 1 - sum(self.busy) / len(self.spans)


@dataclass(frozen=True)
class Costs:
    """The seconds of each stage's passes of a micro-batch, and of a message between two ranks.

    Attributes:
        forward, backward, weights: the seconds of each pass, by stage; a backward pass that is not split takes the sum
            of the last two.
        link: the seconds from the end of a pass until another rank has its result.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weights: Sequence[float]
    link: float = 0.0


def simulate(orders: Orders, placement: Placement, costs: Costs) -> Timeline:
    """Simulate a step: each rank runs its actions in order, as soon as their inputs have arrived.

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
    """The passes and the receives of one rank in a step.

    Attributes:
        actions: the passes of the rank, in order.
        receives: for each pass, the actions of other ranks whose results the rank posts receives for just before.
        index: the index of every action of all ranks in the order of its own rank.
    """

    actions: list[Action]
    receives: list[list[Action]]
    index: dict[Action, int]


def programs(orders: Orders, placement: Placement) -> list[Program]:
    """Return the program of each rank of a pipeline: its passes with its receives among them.

    All passes are ordered by when they end if each takes equally long. A message follows the pass that produces it, so
    its receiver posts the receive before the first of its own passes that ends later: in time for the message to travel
    while that pass runs, and never before something that the sender waits for. Both ends of a link meet its messages,
    of either direction, in the same order.

    Args:
        orders: the actions of all ranks.
        placement: the placement of the stages.
    """
    even = [1.0] * placement.num_stages
    spans = simulate(orders, placement, Costs(even, even, even)).spans
    in_order = sorted((span.end, rank, span.action) for rank, row in enumerate(spans) for span in row)
    index = {action: i for order in orders for i, action in enumerate(order)}
    waiting: list[list[Action]] = [[] for _ in orders]
    receives: list[list[list[Action]]] = [[] for _ in orders]
    for _, rank, action in in_order:
        receives[rank].append(waiting[rank])
        waiting[rank] = []
        receiver = receiver_of(action, placement)
        if receiver is not None and receiver != rank:
            waiting[receiver].append(action)
    assert not any(waiting), "a message that no pass uses"
    return [Program(order, receives[rank], index) for rank, order in enumerate(orders)]


def held_messages(orders: Orders, placement: Placement) -> list[list[int]]:
    """Count the tensors that each rank holds for messages during each of its passes, as `parallel.pipeline` does.

    They are receives that are posted and whose tensors no pass has used yet, the gradient that a backward pass begins
    with, and gradients that have been sent, until the receiver is known to have them. Activations are not among them
    once a stage has received or computed them: they are saved for the backward pass.
    """
    counts = []
    for program in programs(orders, placement):
        receiving: set[Action] = set()
        own: set[Action] = set()  # gradients for a later pass of this rank
        sent: dict[int, deque[int]] = {}
        mine: list[int] = []
        underway, number, last = 0, -1, None
        rank = placement.rank_of(program.actions[0].stage)
        for action, awaited in zip(program.actions, program.receives, strict=True):
            receiving.update(awaited)
            source = source_of(action, placement)
            begins_with = False  # a gradient, for as long as the pass takes
            if source is not None and action.what is source.what:
                begins_with = action.what is Pass.B
                own.discard(source)
                if source in receiving:
                    receiving.remove(source)
                    queue = sent.get(placement.rank_of(source.stage), deque())
                    while queue and queue[0] < program.index[source]:
                        queue.popleft()
                        underway -= 1
            # The result of the pass before is held until this one has its own, sent or not.
            lasting = last is not None and (not sent[last] or sent[last][-1] != number)
            mine.append(len(receiving) + len(own) + underway + begins_with + lasting)
            last = receiver_of(action, placement) if action.what is Pass.B else None
            if last == rank:
                own.add(action)
                last = None
            elif last is not None:
                number = program.index[consumer_of(action)]
                sent.setdefault(last, deque()).append(number)
                underway += 1
        counts.append(mine)
    return counts
