"""What each rank of a pipeline says in its steps: the real machine, run for each by itself on tensors of one element.

`parallel.pipeline` gets a `torch.distributed` that notes what it is told, and stages that note when their kernels would
be launched. No rank sees another, which is how a host does its work under NCCL.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import repeat
from unittest import mock

import torch

from model.batch import Batch
from model.context import Context
from model.loss import SummedLoss
from parallel import pipeline
from parallel.deferral import DeferredGradients
from parallel.pipeline import ActivationSpec, Pipeline
from parallel.schedules import Schedule, placement_of
from tests.emulated.notes import Note

Steps = tuple[tuple[bool, int], ...]
"""Of each step: whether it trains or evaluates, and its micro-batches."""


class _Work:
    """What `isend` and `irecv` return."""

    def __init__(self, notes: list[Note]) -> None:
        self._notes, self._number = notes, len(notes) - 1

    def wait(self) -> None:
        self._notes.append(("wait", self._number))


class _NotingDist:
    """In the place of `torch.distributed`."""

    def __init__(self, notes: list[Note]) -> None:
        self._notes = notes

    def isend(self, tensor: torch.Tensor, dst: int, group: object) -> _Work:
        self._notes.append(("send", group, dst, tensor.numel()))
        return _Work(self._notes)

    def irecv(self, tensor: torch.Tensor, src: int, group: object) -> _Work:
        tensor.zero_()
        self._notes.append(("recv", group, src, tensor.numel()))
        return _Work(self._notes)


class _NotingStage(torch.autograd.Function):
    """x + w, each of whose passes is noted."""

    @staticmethod
    def forward(ctx, x, weight, deferred, note):
        note("F")
        ctx.weight, ctx.deferred, ctx.note = weight, deferred, note
        return x + weight

    @staticmethod
    def backward(ctx, grad):
        ctx.note("B")
        late = ctx.deferred.active

        def of_input() -> torch.Tensor:
            if late:
                ctx.note("W")
            return torch.eye(len(grad))  # by which the gradient is that of the weight

        return grad, *ctx.deferred.gradients([ctx.weight], [grad.T], of_input), None, None


def _stage(index: int, deferred: DeferredGradients, notes: list[Note]) -> Callable[..., torch.Tensor]:
    weight = torch.zeros(1, 1, requires_grad=True)

    def run(x: torch.Tensor, context: Context) -> torch.Tensor:
        return _NotingStage.apply(
            x.float(), weight, deferred, lambda what: notes.append(("compute", f"{what} stage {index}"))
        )

    return run


def _loss(y: torch.Tensor, labels: torch.Tensor) -> SummedLoss:
    return SummedLoss(y.double().sum(), torch.tensor(1))


@cache
def recorded(name: str, p: int, virtual: int, steps: Steps) -> Sequence[Sequence[Note]]:
    """The notes of each rank of a pipeline.

    Args:
        name: of the schedule.
        p: ranks.
        virtual: stages of a rank.
        steps: one after another.
    """
    placement = placement_of(Schedule[name], p, virtual)
    spec = ActivationSpec((1, 1), torch.float32, torch.device("cpu"))
    programs: list[list[Note]] = []
    for rank in range(p):
        notes: list[Note] = []
        deferred = DeferredGradients()
        stages = {index: [_stage(index, deferred, notes)] for index in placement.stages_of(rank)}
        links = {link: link for link in placement.links if rank in link}
        loss = _loss if rank == placement.loss_rank else None
        machine = Pipeline(stages, loss, deferred, Schedule[name], placement, rank, range(p), links, spec)
        batches = repeat(Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)))
        with mock.patch.object(pipeline, "dist", _NotingDist(notes)):
            for trains, micro_batches in steps:
                (machine.train if trains else machine.evaluate)(batches, micro_batches)
        programs.append(notes)
    return programs
