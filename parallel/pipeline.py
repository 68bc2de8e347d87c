"""A step of a pipeline, run by one of its ranks as a schedule says: passes through stages, messages between ranks."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import profiler

from parallel.deferral import Later, weights_later
from parallel.schedules import (
    Action,
    Pass,
    Placement,
    Schedule,
    Span,
    forward_orders,
    orders,
    receiver_of,
    source_of,
    split_off,
    user_of,
)

Layers = Sequence[Callable[[torch.Tensor], torch.Tensor]]
Links = Mapping[tuple[int, int], Any]
"""Process groups of two neighbours by (from, to), places in the pipeline: one for each direction, so that no message
waits for one that goes the other way."""


def make_links(place: Placement, pipelines: Sequence[Sequence[int]], group: Any) -> Links:
    """The links of the pipeline that this process is in. Every process calls it, and makes all groups in one order.

    NCCL does what it is told on a group one after another, and a message that is awaited would hold up those that
    leave. Gloo does not, and the group that is there will do.

    Args:
        place: of the stages.
        pipelines: for each pipeline its global ranks by place.
        group: of this process's pipeline.
    """
    own: dict[tuple[int, int], Any] = {}
    ways = {(place.rank_of(s), place.rank_of(s + 1)) for s in range(place.num_stages - 1)}
    ways = {way for a, b in ways if a != b for way in ((a, b), (b, a))}
    for ranks in pipelines:
        for a, b in sorted(ways):
            link = group if dist.get_backend(group) == "gloo" else dist.new_group([ranks[a], ranks[b]])
            if dist.get_rank() in (ranks[a], ranks[b]):
                own[a, b] = link
    return own


class _Inbox:
    """Messages from one neighbour, received in the order in which it sends them, one ahead of what is asked for."""

    def __init__(self, coming: list[Action], source: int, group: Any, empty: Callable[[], torch.Tensor]):
        self._coming, self._source, self._group, self._empty = coming, source, group, empty
        self._asked = 0
        self._under_way: dict[Action, tuple[torch.Tensor, Any]] = {}
        self._ask()

    def _ask(self) -> None:
        if self._asked < len(self._coming):
            tensor = self._empty()
            work = dist.irecv(tensor, src=self._source, group=self._group)
            self._under_way[self._coming[self._asked]] = tensor, work
            self._asked += 1

    def take(self, result_of: Action) -> torch.Tensor:
        """The result of another rank's action, once it is here."""
        while result_of not in self._under_way:
            self._ask()
        tensor, work = self._under_way.pop(result_of)
        self._ask()
        work.wait()
        return tensor


@dataclass(frozen=True)
class Hop:
    """What travels between stages: the shape, dtype and device of a micro-batch's activations."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        """Room for one."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class Pipeline:
    """What one rank does in a step.

    Args:
        stages: the layers of each stage that this rank holds, by index.
        loss_fn: from the last stage's output and the labels to a scalar.
        schedule: the order of passes.
        place: which rank holds which stage.
        rank: this one's place in the pipeline.
        ranks: global, by place.
        links: from `make_links`.
        hop: what travels.
    """

    def __init__(
        self,
        stages: Mapping[int, Layers],
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        schedule: Schedule,
        place: Placement,
        rank: int,
        ranks: Sequence[int],
        links: Links,
        hop: Hop,
    ):
        self._stages, self._loss_fn, self._schedule, self.place = stages, loss_fn, schedule, place
        self._rank, self._ranks, self._links, self._hop = rank, ranks, links, hop
        self._plans: dict[tuple[bool, int], _Plan] = {}
        self.began = 0.0
        """When the last step began here, by the wall clock."""
        self._begin: Any = None
        self._marks: list[tuple[Action, Any, Any]] = []

    @property
    def loss_rank(self) -> int:
        """The place of the rank that has the last stage."""
        return self.place.rank_of(self.place.num_stages - 1)

    def train(self, data: Iterator[Sequence[torch.Tensor]], micro_batches: int) -> list[torch.Tensor]:
        """Forward and backward passes of a step: gradients of the mean loss are added to the parameters'.

        Args:
            data: (tokens, labels) of each micro-batch; read where the first or the last stage is.
            micro_batches: of the step.

        Returns:
            The loss of each micro-batch, where the last stage is; else nothing.
        """
        return self._run(self._plan(True, micro_batches), data, 1 / micro_batches)

    @torch.no_grad()
    def evaluate(self, data: Iterator[Sequence[torch.Tensor]], micro_batches: int) -> list[torch.Tensor]:
        """As `train`, forward only."""
        return self._run(self._plan(False, micro_batches), data, None)

    def blocks(self) -> list[Span]:
        """What was done in the last step, and when, in seconds after it began here; waits for the device."""
        if not self._marks:
            return []
        first = self._begin
        if self._hop.device.type != "cuda":
            return [Span(action, begin - first, end - first) for action, begin, end in self._marks]
        self._marks[-1][2].synchronize()
        since = [(action, first.elapsed_time(begin), first.elapsed_time(end)) for action, begin, end in self._marks]
        return [Span(action, begin / 1000, end / 1000) for action, begin, end in since]

    def _plan(self, training: bool, micro_batches: int) -> "_Plan":
        """Made once; the steps of a run are all alike."""
        if (training, micro_batches) not in self._plans:
            made = (
                orders(self._schedule, self.place, micro_batches)
                if training
                else forward_orders(self.place, micro_batches)
            )
            others = {other for other, to in self._links if to == self._rank}
            coming = {
                other: [action for action in made[other] if receiver_of(action, self.place) == self._rank]
                for other in others
            }
            turn = {action: index for order in made for index, action in enumerate(order)}
            self._plans[training, micro_batches] = _Plan(made[self._rank], coming, turn)
        return self._plans[training, micro_batches]

    def _run(self, plan: "_Plan", data: Iterator[Sequence[torch.Tensor]], share: float | None) -> list[torch.Tensor]:
        place, last = self.place, self.place.num_stages - 1
        split = split_off(plan.own)
        inboxes = {
            other: _Inbox(plan.coming[other], self._ranks[other], group, self._hop.empty)
            for (other, to), group in self._links.items()
            if to == self._rank
        }
        batches: dict[int, Sequence[torch.Tensor]] = {}
        results: dict[Action, torch.Tensor] = {}  # of this rank's own actions, for its own
        kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        later: dict[tuple[int, int], list[Later]] = {}
        # In a round no rank is ahead of the next one by more than it has ranks.
        outbox = _Outbox(2 * place.num_ranks if share is None else None)
        losses: list[torch.Tensor] = []
        marks: list[tuple[Action, Any, Any]] = []
        began, start = time.time(), self._now()

        def batch(mb: int) -> Sequence[torch.Tensor]:
            while mb not in batches:
                batches[len(batches)] = [part.to(self._hop.device, non_blocking=True) for part in next(data)]
            return batches[mb]

        def take(source: Action) -> torch.Tensor:
            other = place.rank_of(source.stage)
            if other == self._rank:
                return results.pop(source)
            with _span(source, "wait for "):
                result = inboxes[other].take(source)
            outbox.clear(other, plan.turn[source])
            return result

        def hand_on(action: Action, result: torch.Tensor) -> None:
            to = receiver_of(action, place)
            if to == self._rank:
                results[action] = result
            elif to is not None:
                result = result.contiguous()
                work = dist.isend(result, dst=self._ranks[to], group=self._links[self._rank, to])
                outbox.add(to, plan.turn[user_of(action)], work, result)

        for action in _spanned(plan.own):
            stage, mb = action.stage, action.micro_batch
            source = source_of(action, place)
            if action.what is Pass.F:
                x = batch(mb)[0] if source is None else take(source)
                begin = self._now()
                if source is not None and share is not None:
                    x = x.detach().requires_grad_()
                y = x
                for layer in self._stages[stage]:
                    y = layer(y)
                if stage == last:
                    y = self._loss_fn(y, batch(mb)[1])
                    losses.append(y.detach())
                else:
                    hand_on(action, y.detach())
                if share is not None:
                    kept[stage, mb] = x, y
            elif action.what is Pass.B:
                assert share is not None
                grad = None if stage == last else take(source)  # type: ignore[arg-type]
                begin = self._now()
                x, y = kept.pop((stage, mb))
                if stage == last:
                    y = y * share
                if (stage, mb) in split:
                    with weights_later() as left:
                        torch.autograd.backward(y, grad)
                    later[stage, mb] = left
                else:
                    torch.autograd.backward(y, grad)
                if x.grad is not None:
                    hand_on(action, x.grad)
            else:
                begin = self._now()
                for make in later.pop((stage, mb)):
                    make()
            marks.append((action, begin, self._now()))
        outbox.clear()
        if share is not None:
            self.began, self._begin, self._marks = began, start, marks
        return losses

    def _now(self) -> Any:
        if self._hop.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()


def _span(action: Action, before: str = "") -> AbstractContextManager:
    """A span of a profiler's trace, ``F stage 0 micro-batch 3`` with some words before it; nothing without one."""
    if not profiler._is_profiler_enabled:  # record_function would take 5 us to find that out
        return nullcontext()
    return profiler.record_function(f"{before}{action.what.name} stage {action.stage} micro-batch {action.micro_batch}")


def _spanned(actions: Iterable[Action]) -> Iterator[Action]:
    """The actions, each in a span from when it is taken to when the next one is."""
    for action in actions:
        with _span(action):
            yield action


@dataclass(frozen=True)
class _Plan:
    """Orders as one rank sees them.

    Attributes:
        own: this rank's.
        coming: by neighbour, those of its actions whose results come here, in the order in which it sends them.
        turn: the place of each action in its rank's order.
    """

    own: list[Action]
    coming: dict[int, list[Action]]
    turn: dict[Action, int]


class _Outbox:
    """What has been sent, which must stay as it is until it has been received.

    A message from another rank tells that whatever it did before is done, and so that what it used for that has come.
    Where none comes back, in evaluation, a limit has the sender wait for a receiver that is far behind.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._to: dict[int, deque[tuple[int, Any, torch.Tensor]]] = {}

    def add(self, to: int, used_at: int, work: Any, tensor: torch.Tensor) -> None:
        """A message that the receiver uses at this place in its order."""
        sent = self._to.setdefault(to, deque())
        sent.append((used_at, work, tensor))
        if self._limit and len(sent) > self._limit:
            sent.popleft()[1].wait()

    def clear(self, other: int | None = None, turn: int = 0) -> None:
        """Let go of what a rank that has come to this place in its order has received; without one, wait for all."""
        for to, sent in self._to.items():
            while sent and (other is None or (to == other and sent[0][0] < turn)):
                sent.popleft()[1].wait()
