"""A step of a pipeline, run by one of its ranks as a schedule says: passes through stages, messages between ranks."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import profiler

from model.batch import Batch
from model.context import Context
from model.loss import SummedLoss
from parallel.build import Forward
from parallel.deferral import Deferred, DeferredGradients
from parallel.groups import Links
from parallel.loss import Loss
from parallel.schedules import (
    Action,
    Pass,
    Placement,
    Schedule,
    forward_orders,
    orders,
    receiver_of,
    source_of,
    split_off,
    user_of,
)
from parallel.simulation import Program, Span, programs


@dataclass(frozen=True)
class ActivationSpec:
    """What travels between stages: shape, dtype and device of a micro-batch's activations and of their gradients."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        """A tensor to receive one in."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class Pipeline:
    """What one rank does in a step: forward and backward passes through its stages, in the order of a schedule.

    Args:
        stages: the functions of each stage that this rank holds, by index.
        loss: of the last stage's output and the labels; None on a rank without that stage.
        deferred: what the layers were built with, for schedules that split the backward pass.
        schedule: the order of passes.
        placement: which rank holds which stage.
        rank: this one's place in the pipeline.
        ranks: global, by place.
        links: of this rank (`parallel.groups.Ranks`).
        spec: what travels.
    """

    def __init__(
        self,
        stages: Mapping[int, Sequence[Forward]],
        loss: Loss | None,
        deferred: DeferredGradients,
        schedule: Schedule,
        placement: Placement,
        rank: int,
        ranks: Sequence[int],
        links: Links,
        spec: ActivationSpec,
    ):
        self.stages, self.loss, self.deferred = stages, loss, deferred
        self.schedule, self.placement, self.spec = schedule, placement, spec
        self.rank, self.ranks, self.links = rank, ranks, links
        self.began = 0.0
        """When the last step began here, by the wall clock."""
        self._programs: dict[tuple[bool, int], Program] = {}
        self._begin: Any = None
        self._marks: list[tuple[Action, Any, Any]] = []

    def train(self, batches: Iterator[Batch], micro_batches: int) -> SummedLoss:
        """Forward and backward passes of a step: gradients of the summed loss are added to the parameters'.

        Args:
            batches: the micro-batches, the same on every rank of the pipeline.
            micro_batches: of the step.

        Returns:
            The loss of all micro-batches, summed, where the last stage is; else zero over zero labels.
        """
        self.began, self._begin = time.time(), self._now()
        done = _Training(self, self._program(True, micro_batches), batches).run()
        self._marks = done.marks
        return done.summed_loss()

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], micro_batches: int) -> SummedLoss:
        """As `train`, forward passes only."""
        return _Evaluation(self, self._program(False, micro_batches), batches).run().summed_loss()

    def spans(self) -> list[Span]:
        """What was done in the last step, and when, in seconds after it began here; waits for the device."""
        if not self._marks:
            return []
        first = self._begin
        if self.spec.device.type != "cuda":
            return [Span(action, begin - first, end - first) for action, begin, end in self._marks]
        self._marks[-1][2].synchronize()
        since = [(action, first.elapsed_time(begin), first.elapsed_time(end)) for action, begin, end in self._marks]
        return [Span(action, begin / 1000, end / 1000) for action, begin, end in since]

    def _program(self, training: bool, micro_batches: int) -> Program:
        """Made once; the steps of a run are all alike."""
        if (training, micro_batches) not in self._programs:
            order = (
                orders(self.schedule, self.placement, micro_batches)
                if training
                else forward_orders(self.placement, micro_batches)
            )
            self._programs[training, micro_batches] = programs(order, self.placement)[self.rank]
        return self._programs[training, micro_batches]

    def _now(self) -> Any:
        if self.spec.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()


class _Evaluation:
    """A rank in the middle of its forward passes: what has come, what has left, what is needed again."""

    # In a round no rank is ahead of the next one by more than twice as many passes as there are ranks.
    _most_sent = 2

    def __init__(self, pipeline: Pipeline, program: Program, batches: Iterator[Batch]):
        self._pipeline, self._placement, self._program = pipeline, pipeline.placement, program
        self._source = batches
        self._batches: dict[int, Batch] = {}
        self._results: dict[Action, torch.Tensor] = {}  # of this rank's own actions, for its own
        most_sent = self._most_sent * pipeline.placement.num_ranks if self._most_sent else None
        self._messages = _Messages(pipeline, program, most_sent)
        self._losses: list[SummedLoss] = []
        self.marks: list[tuple[Action, Any, Any]] = []

    def run(self) -> "_Evaluation":
        """All passes of the program."""
        compute: dict[Pass, Callable[[Action, Any], torch.Tensor | None]]
        compute = {Pass.F: self.forward, Pass.B: self.backward, Pass.W: self.weights}
        for action, awaited in zip(self._program.actions, self._program.receives, strict=True):
            for result_of in awaited:
                self._messages.receive(result_of)
            with _span(action):
                operand = self._operand(action)
                begin = self._pipeline._now()
                result = compute[action.what](action, operand)
                if result is not None:
                    self._hand_on(action, result)
                self.marks.append((action, begin, self._pipeline._now()))
        self._messages.wait()
        return self

    def summed_loss(self) -> SummedLoss:
        """Of all micro-batches that have ended here."""
        device = self._pipeline.spec.device
        if not self._losses:
            return SummedLoss(
                torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
            )
        totals, counts = ([getattr(loss, key) for loss in self._losses] for key in ("total", "count"))
        return SummedLoss(torch.stack(totals).sum(), torch.stack(counts).sum())

    def forward(self, action: Action, x: torch.Tensor) -> torch.Tensor | None:
        """The pass of a micro-batch through a stage; what the next stage needs."""
        y = self._through(action, x)
        if isinstance(y, SummedLoss):
            self._losses.append(y)
            return None
        return y

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """There is none in an evaluation."""
        raise AssertionError(action)

    def weights(self, action: Action, nothing: None) -> None:
        """There are none in an evaluation."""
        raise AssertionError(action)

    def _through(self, action: Action, x: torch.Tensor) -> torch.Tensor | SummedLoss:
        pipeline, batch = self._pipeline, self._batch(action.micro_batch)
        context = Context(documents_BL=batch.documents)
        for layer in pipeline.stages[action.stage]:
            x = layer(x, context)
        if action.stage < self._placement.num_stages - 1:
            return x
        assert pipeline.loss is not None
        return pipeline.loss(x, batch.labels)

    def _batch(self, micro_batch: int) -> Batch:
        """Read by every rank: stages between the first and the last one need to know the documents in it."""
        while micro_batch not in self._batches:
            self._batches[len(self._batches)] = next(self._source).to(self._pipeline.spec.device)
        return self._batches[micro_batch]

    def _operand(self, action: Action) -> Any:
        """What a pass works on: tokens, activations or their gradient, once it is here; None where it needs nothing."""
        source = source_of(action, self._placement)
        if source is None:
            return self._batch(action.micro_batch).tokens
        if action.what is not source.what:  # the loss, or this rank's own backward pass, whose results it has saved
            return None
        if source in self._results:
            return self._results.pop(source)
        return self._messages.take(source)

    def _hand_on(self, action: Action, result: torch.Tensor) -> None:
        receiver = receiver_of(action, self._placement)
        if receiver == self._pipeline.rank:
            self._results[action] = result
        elif receiver is not None:
            self._messages.send(action, receiver, result.contiguous())


class _Training(_Evaluation):
    """A rank in the middle of a step: as an evaluation, with what backward passes need of forward passes."""

    _most_sent = 0  # messages that come back tell what has been received

    def __init__(self, pipeline: Pipeline, program: Program, batches: Iterator[Batch]):
        super().__init__(pipeline, program, batches)
        self._split = split_off(program.actions)
        self._saved: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._left: dict[tuple[int, int], list[Deferred]] = {}

    def forward(self, action: Action, x: torch.Tensor) -> torch.Tensor | None:
        """As in an evaluation; what goes in and comes out is saved for the backward pass."""
        if x.is_floating_point():
            x = x.detach().requires_grad_()
        y = self._through(action, x)
        if isinstance(y, SummedLoss):
            self._losses.append(SummedLoss(y.total.detach(), y.count))
            y = y.total
            result = None
        else:
            result = y.detach()
        self._saved[action.stage, action.micro_batch] = x, y
        return result

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient of a stage's input, and of its weights where they are not deferred."""
        key = action.stage, action.micro_batch
        x, y = self._saved.pop(key)
        if key in self._split:
            with self._pipeline.deferred.deferring() as left:
                torch.autograd.backward(y, gradient)
            self._left[key] = left
        else:
            torch.autograd.backward(y, gradient)
        return x.grad

    def weights(self, action: Action, nothing: None) -> None:
        """The gradients of weights that a backward pass has deferred."""
        for compute in self._left.pop((action.stage, action.micro_batch)):
            compute()


class _Messages:
    """What travels to and from a rank in a step.

    What has been sent must stay as it is until it has been received. A message from another rank tells that whatever
    that did before is done, and so that what it used for that has come. Where none comes back, in evaluation, a limit
    has the sender wait for a receiver that is far behind.
    """

    def __init__(self, pipeline: Pipeline, program: Program, most_sent: int | None):
        self._pipeline, self._turn, self._most_sent = pipeline, program.turn, most_sent
        self._coming: dict[Action, tuple[torch.Tensor, Any]] = {}
        self._sent: dict[int, deque[tuple[int, Any, torch.Tensor]]] = {}

    def receive(self, result_of: Action) -> None:
        """Ask for the result of another rank's action."""
        pipeline, sender = self._pipeline, self._pipeline.placement.rank_of(result_of.stage)
        tensor = pipeline.spec.empty()
        link = pipeline.links[sender, pipeline.rank]
        self._coming[result_of] = tensor, dist.irecv(tensor, src=pipeline.ranks[sender], group=link)

    def take(self, result_of: Action) -> torch.Tensor:
        """The result of another rank's action, once it is here."""
        with _span(result_of, "wait for "):
            tensor, work = self._coming.pop(result_of)
            work.wait()
        self._let_go(self._pipeline.placement.rank_of(result_of.stage), self._turn[result_of])
        return tensor

    def send(self, action: Action, to: int, result: torch.Tensor) -> None:
        """Give another rank the result of an action."""
        pipeline = self._pipeline
        work = dist.isend(result, dst=pipeline.ranks[to], group=pipeline.links[pipeline.rank, to])
        sent = self._sent.setdefault(to, deque())
        sent.append((self._turn[user_of(action)], work, result))
        if self._most_sent and len(sent) > self._most_sent:
            sent.popleft()[1].wait()

    def wait(self) -> None:
        """Wait until all that was sent has been received."""
        for sent in self._sent.values():
            while sent:
                sent.popleft()[1].wait()

    def _let_go(self, receiver: int, turn: int) -> None:
        """Let go of what a rank that has come to this place in its order has received."""
        sent = self._sent.get(receiver, deque())
        while sent and sent[0][0] < turn:
            sent.popleft()[1].wait()


def _span(action: Action, before: str = "") -> AbstractContextManager:
    """A span of a profiler's trace, ``F stage 0 micro-batch 3`` with some words before it; nothing without one."""
    if not profiler._is_profiler_enabled:  # record_function would take 5 us to find that out
        return nullcontext()
    return profiler.record_function(f"{before}{action.what.name} stage {action.stage} micro-batch {action.micro_batch}")
