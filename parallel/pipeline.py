"""A rank's execution of a pipeline's step in the order of a schedule: passes through stages, messages between ranks."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd import profiler

from model.batch import Batch
from model.context import Context
from model.loss import SummedLoss
from parallel.build import Forward
from parallel.deferral import Deferred, DeferredGradients
from parallel.device_progress import Marks, follow
from parallel.groups import Links
from parallel.heartbeat import Phase, heart
from parallel.loss import Loss
from parallel.schedules import (
    Action,
    Pass,
    Placement,
    Schedule,
    consumer_of,
    forward_orders,
    orders,
    receiver_of,
    source_of,
    split_off,
)
from parallel.simulation import Program, Span, programs

Result = TypeVar("Result")


@dataclass(frozen=True)
class ActivationSpec:
    """The shape, dtype and device of a micro-batch's activations between stages, and of their gradients.

    Attributes:
        shape: (micro-batch, tokens of this rank's part of a sequence, d_model), for sequences of `seq_len` tokens.
        dtype, device: of the activations.
        seq_len: tokens of a whole sequence of the shape; None where every message has it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    seq_len: int | None = None

    def empty(self, tokens: torch.Size) -> torch.Tensor:
        """Allocate a tensor to receive activations or their gradient in, of a micro-batch with tokens of this shape."""
        shape = self.shape
        if self.seq_len is not None:
            shape = (tokens[0], shape[1] * tokens[1] // self.seq_len, *shape[2:])
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Pipeline:
    """One rank of a pipeline: it runs the passes through its stages, in the order of a schedule.

    Args:
        stages: the forward functions of each stage of this rank, by the index of the stage.
        loss: the function from the last stage's output and the labels to the loss; None on a rank without that stage.
        deferred: the object the layers were built with, for schedules that split the backward pass.
        schedule: the order of passes.
        placement: the placement of the stages on the ranks of the pipeline.
        rank: the pipeline-parallel rank of this process.
        ranks: the global ranks of the pipeline, by pipeline-parallel rank.
        links: the links of this rank (`parallel.groups.Ranks`).
        spec: the shape, dtype and device of the activations between stages.
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
        """The wall-clock time at which this rank began its last step."""
        self.lengths: list[int] = []
        """The lengths of the documents of all micro-batches of its last step, in tokens."""
        self.around: Callable[[Action], AbstractContextManager] = _span
        """Gives the context that each pass is run in; by default the span of a profiler's trace."""
        self.under_way: tuple[Marks, Program, tuple[int, int]] = ([], Program([], [], {}), heart.place)
        """The passes launched so far of the last step or evaluation, its program, and `heart.place` of it."""
        if spec.device.type == "cuda":
            follow(self, heart)
        self._programs: dict[tuple[bool, int], Program] = {}
        self._begin: Any = None
        self._marks: list[tuple[Action, Any, Any]] = []

    def train(self, batches: Iterator[Batch], micro_batches: int) -> SummedLoss:
        """Run the forward and backward passes of a step; gradients of the summed loss are added to the parameters'.

        Args:
            batches: the micro-batches, the same on every rank of the pipeline.
            micro_batches: the number of micro-batches of the step.

        Returns:
            The summed loss of all micro-batches on the rank of the last stage; elsewhere zero over zero labels.
        """
        self.began, self._begin = time.time(), self._now()
        done = _Training(self, self._program(True, micro_batches), batches).run()
        self._marks = done.marks
        self.lengths = [length for batch in done.batches.values() for length in batch.lengths]
        return done.summed_loss()

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], micro_batches: int) -> SummedLoss:
        """Run the forward passes of an evaluation; arguments and result are those of `train`."""
        return _Evaluation(self, self._program(False, micro_batches), batches).run().summed_loss()

    @torch.no_grad()
    def forward(self, batches: Iterator[Batch], micro_batches: int, last: Callable[..., Result] | None) -> list[Result]:
        """Run the forward passes of `evaluate` with another function in the place of the loss.

        Args:
            batches, micro_batches: as in `train`.
            last: a function of the last stage's output and the labels of a micro-batch, whatever these are; None on a
                rank without that stage.

        Returns:
            What the function has returned for each micro-batch, in order; an empty list on a rank without that stage.
        """
        return _Evaluation(self, self._program(False, micro_batches), batches, last).run().results

    def spans(self) -> list[Span]:
        """Return the passes of the last step, in seconds since this rank began it. The host waits for the device."""
        if not self._marks:
            return []
        first = self._begin
        if self.spec.device.type != "cuda":
            return [Span(action, begin - first, end - first) for action, begin, end in self._marks]
        self._marks[-1][2].synchronize()
        since = [(action, first.elapsed_time(begin), first.elapsed_time(end)) for action, begin, end in self._marks]
        return [Span(action, begin / 1000, end / 1000) for action, begin, end in since]

    def _program(self, training: bool, micro_batches: int) -> Program:
        """Return this rank's program, which is computed once for each number of micro-batches."""
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
    """The state of a rank during an evaluation: micro-batches, messages, and results for its own later passes."""

    # No rank is ahead of the next one by more passes than twice the number of ranks.
    _most_sent = 2

    def __init__(
        self,
        pipeline: Pipeline,
        program: Program,
        batches: Iterator[Batch],
        last: Callable[[torch.Tensor, torch.Tensor], Any] | None = None,
    ):
        self._pipeline, self._placement, self._program = pipeline, pipeline.placement, program
        self._source, self._last = batches, last or pipeline.loss
        self.batches: dict[int, Batch] = {}
        self._handed_on: dict[Action, torch.Tensor] = {}  # between stages of this same rank
        most_sent = self._most_sent * pipeline.placement.num_ranks if self._most_sent else None
        self._messages = _Messages(pipeline, program, most_sent)
        self.results: list[Any] = []
        """Of the last stage: the losses, or what another function in their place has returned."""
        self.marks: list[tuple[Action, Any, Any]] = []
        pipeline.under_way = self.marks, program, heart.place

    def run(self) -> "_Evaluation":
        """Run all passes of the program."""
        compute: dict[Pass, Callable[[Action, Any], torch.Tensor | None]]
        compute = {Pass.F: self.forward, Pass.B: self.backward, Pass.W: self.weights}
        for index, (action, awaited) in enumerate(zip(self._program.actions, self._program.receives, strict=True)):
            heart.next_pass(action, index)
            for source in awaited:  # a micro-batch has sequences of its own number and length
                self._messages.receive(source, self._batch(source.micro_batch).tokens.shape)
            with self._pipeline.around(action):
                inputs = self._inputs(action)
                heart.in_pass()
                begin = self._pipeline._now()
                result = compute[action.what](action, inputs)
                if result is not None:
                    self._pass_on(action, result)
                self.marks.append((action, begin, self._pipeline._now()))
        self._messages.wait()
        return self

    def summed_loss(self) -> SummedLoss:
        """Return the summed loss of all micro-batches whose last stage this rank has run."""
        device = self._pipeline.spec.device
        if not self.results:
            return SummedLoss(
                torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
            )
        totals, counts = ([getattr(loss, key) for loss in self.results] for key in ("total", "count"))
        return SummedLoss(torch.stack(totals).sum(), torch.stack(counts).sum())

    def forward(self, action: Action, x: torch.Tensor) -> torch.Tensor | None:
        """Run the forward pass of a micro-batch through a stage; return the activations for the next stage."""
        y = self._run_layers(action, x)
        if self._is_last(action):
            self.results.append(y)
            return None
        return y

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Raise: an evaluation has no backward passes."""
        raise AssertionError(action)

    def weights(self, action: Action, nothing: None) -> None:
        """Raise: an evaluation has no weight gradients."""
        raise AssertionError(action)

    def _is_last(self, action: Action) -> bool:
        return action.stage == self._placement.num_stages - 1

    def _run_layers(self, action: Action, x: torch.Tensor) -> Any:
        """Return the output of a stage, or for the last one what its loss makes of it."""
        pipeline, batch = self._pipeline, self._batch(action.micro_batch)
        context = Context(documents=batch.documents)
        for layer in pipeline.stages[action.stage]:
            x = layer(x, context)
        if not self._is_last(action):
            return x
        assert self._last is not None
        return self._last(x, batch.labels)

    def _batch(self, micro_batch: int) -> Batch:
        """Return a micro-batch, which every rank reads: the stages in the middle need its documents as well."""
        while micro_batch not in self.batches:
            heart.at(Phase.DATA)
            self.batches[len(self.batches)] = next(self._source).to(self._pipeline.spec.device)
        return self.batches[micro_batch]

    def _inputs(self, action: Action) -> Any:
        """Return a pass's input: tokens, or activations or their gradient once they have arrived; None where saved."""
        source = source_of(action, self._placement)
        if source is None:
            return self._batch(action.micro_batch).tokens
        if action.what is not source.what:  # a backward pass from the loss, or a deferred one: its inputs are saved
            return None
        if source in self._handed_on:
            return self._handed_on.pop(source)
        return self._messages.take(source)

    def _pass_on(self, action: Action, result: torch.Tensor) -> None:
        receiver = receiver_of(action, self._placement)
        if receiver == self._pipeline.rank:
            self._handed_on[action] = result
        elif receiver is not None:
            self._messages.send(action, receiver, result.contiguous())


class _Training(_Evaluation):
    """The state of a rank during a training step: that of an evaluation, and tensors saved for backward passes."""

    _most_sent = 0  # no limit: the gradients that come back tell what has been received

    def __init__(self, pipeline: Pipeline, program: Program, batches: Iterator[Batch]):
        super().__init__(pipeline, program, batches)
        self._split = split_off(program.actions)
        self._saved: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._deferred: dict[tuple[int, int], list[Deferred]] = {}

    def forward(self, action: Action, x: torch.Tensor) -> torch.Tensor | None:
        """Run a forward pass as in an evaluation, and save its input and output for the backward pass."""
        if x.is_floating_point():
            x = x.detach().requires_grad_()
        y = self._run_layers(action, x)
        if self._is_last(action):
            self.results.append(SummedLoss(y.total.detach(), y.count))
            y = y.total
            result = None
        else:
            result = y.detach()
        self._saved[action.stage, action.micro_batch] = x, y
        return result

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Compute the gradient of a stage's input, and of its weights where they are not deferred."""
        key = action.stage, action.micro_batch
        x, y = self._saved.pop(key)
        if key in self._split:
            with self._pipeline.deferred.deferring() as deferred:
                torch.autograd.backward(y, gradient)
            self._deferred[key] = deferred
        else:
            torch.autograd.backward(y, gradient)
        return x.grad

    def weights(self, action: Action, nothing: None) -> None:
        """Compute the gradients of weights that a backward pass has deferred."""
        for compute in self._deferred.pop((action.stage, action.micro_batch)):
            compute()


class _Messages:
    """The messages that a rank receives and sends in a step.

    A tensor that has been sent must not change until it has been received. A message from another rank implies that
    all its earlier passes have run, and so that it has received their inputs. Where no message comes back, in
    evaluation, a limit has the sender wait for a receiver that is far behind.
    """

    def __init__(self, pipeline: Pipeline, program: Program, most_sent: int | None):
        self._pipeline, self._index, self._most_sent = pipeline, program.index, most_sent
        self._receiving: dict[Action, tuple[torch.Tensor, Any]] = {}
        self._sent: dict[int, deque[tuple[int, Action, Any, torch.Tensor]]] = {}

    def receive(self, source: Action, tokens: torch.Size) -> None:
        """Post the receive of the result of another rank's action, on a micro-batch with tokens of this shape."""
        pipeline, sender = self._pipeline, self._pipeline.placement.rank_of(source.stage)
        tensor = pipeline.spec.empty(tokens)
        link = pipeline.links[sender, pipeline.rank]
        self._receiving[source] = tensor, dist.irecv(tensor, src=pipeline.ranks[sender], group=link)

    def take(self, source: Action) -> torch.Tensor:
        """Wait for the result of another rank's action and return it."""
        sender, index = self._pipeline.placement.rank_of(source.stage), self._index[source]
        heart.waits_for(Phase.RECEIVE, source, self._pipeline.ranks[sender], index)
        with _span(source, "wait for "):
            tensor, work = self._receiving.pop(source)
            work.wait()
        self._release(sender, index)
        return tensor

    def send(self, action: Action, to: int, result: torch.Tensor) -> None:
        """Start sending the result of an action to another rank."""
        pipeline = self._pipeline
        work = dist.isend(result, dst=pipeline.ranks[to], group=pipeline.links[pipeline.rank, to])
        sent = self._sent.setdefault(to, deque())
        consumer = consumer_of(action)
        sent.append((self._index[consumer], consumer, work, result))
        if self._most_sent and len(sent) > self._most_sent:
            self._wait_for_receipt(to)

    def wait(self) -> None:
        """Wait until all messages of this rank have been received."""
        for receiver, sent in self._sent.items():
            while sent:
                self._wait_for_receipt(receiver)

    def _wait_for_receipt(self, receiver: int) -> None:
        """Wait until a rank has received the earliest of the messages to it."""
        index, consumer, work, _ = self._sent[receiver].popleft()
        heart.waits_for(Phase.SEND, consumer, self._pipeline.ranks[receiver], index)
        work.wait()

    def _release(self, receiver: int, index: int) -> None:
        """Release the tensors that a rank has received once it has run the action of this index in its order."""
        sent = self._sent.get(receiver, deque())
        while sent and sent[0][0] < index:
            sent.popleft()[2].wait()


def _span(action: Action, prefix: str = "") -> AbstractContextManager:
    """Name a span of a profiler's trace ``F stage 0 micro-batch 3``, with a prefix; do nothing without a profiler."""
    if not profiler._is_profiler_enabled:  # record_function would take 5 us to find that out
        return nullcontext()
    return profiler.record_function(f"{prefix}{action.said}")
