"""ZeRO stage 1 (arXiv 1910.02054), the traffic of which runs beside the passes of a step.

The parameters of a few neighbouring layers lie one after another in a bucket: a buffer of weights in the precision that
the stages compute in, a buffer of gradients in fp32, and this replica's share of the fp32 master weights and of Adam's
two moments. In bytes per parameter that is

    bf16:  2 + 4 + 12 / dp          fp32:  4 + 4 + 8 / dp          (in fp32 the master weights are the weights)

A gradient is added to its place in the buffer the moment that autograd has made it, and let go. Once a bucket has those
of the last micro-batch, it is reduced over the replicas, each of which gets its share, while the backward pass goes on
with the layers before. After the optimizer has moved the shares, the weights are gathered while the next forward pass
begins: a layer waits for its own buckets and no others. DeepSpeed's optimizers do either after the passes, all at once
(arXiv 2401.02954, section 2.4, has the first of the two).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

BUCKET = 2**25
"""Elements that a bucket has at least, where layers are left: enough to make the most of the network."""
_ALIGNMENT = 64
"""Parameters begin at multiples of so many elements: the fast matrix products want 16 bytes, their loads 128."""

MakeOptimizer = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.optim.Optimizer]
"""From the tensors that hold matrices and those that hold vectors to the optimizer of both."""


@dataclass(frozen=True)
class Replicas:
    """The data-parallel ranks that hold the same layers.

    Attributes:
        group: of these processes.
        rank: of this one among them.
        size: how many they are.
    """

    group: Any
    rank: int
    size: int


@dataclass(frozen=True)
class Kind:
    """What the parameters of a bucket have in common.

    Attributes:
        matrix: whether they are matrices, on which weight decay acts.
        sum_over: tensor-parallel ranks that hold the same parameter and compute its gradient in parts.
        counted: whether their gradients enter the norm here; of several ranks that hold the same, one counts.
    """

    matrix: bool
    sum_over: int
    counted: bool


@dataclass(frozen=True)
class Owned:
    """Consecutive elements of a parameter that are in this replica's share of a bucket.

    Attributes:
        parameter: the whole of what this rank computes with.
        start: the first of them, counted in the parameter.
        place: the first of them, counted in the share.
        size: how many.
    """

    parameter: nn.Parameter
    start: int
    place: int
    size: int


@dataclass(eq=False)
class Bucket:
    """Flat buffers over some parameters.

    Attributes:
        kind: of them all.
        parameters: in order, with the place where each begins.
        own: this replica's share.
        weights: (n,) in the stages' precision; the parameters are views of it.
        gradients: (n,) fp32, summed over the micro-batches of a step, and after the reduction, in `own`, over replicas.
        master: (n / dp,) fp32.
    """

    kind: Kind
    parameters: list[tuple[nn.Parameter, int]]
    own: slice
    weights: torch.Tensor
    gradients: torch.Tensor
    master: nn.Parameter
    _arrived: list[int] = field(default_factory=list)
    _missing: int = 0
    _reducing: Any = None
    _gathering: Any = None

    def owned(self) -> Iterator[Owned]:
        """What of each parameter this replica has the master weights of."""
        for parameter, begin in self.parameters:
            first, stop = max(begin, self.own.start), min(begin + parameter.numel(), self.own.stop)
            if first < stop:
                yield Owned(parameter, first - begin, first - self.own.start, stop - first)

    def expect(self, micro_batches: int) -> None:
        """Begin a step."""
        self._arrived = [0] * len(self.parameters)
        self._missing = micro_batches * len(self.parameters)

    def add(self, index: int) -> bool:
        """Take a parameter's gradient, which is let go; whether it was the last one of the step."""
        parameter, begin = self.parameters[index]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        place = self.gradients.narrow(0, begin, gradient.numel()).view_as(gradient)
        (place.add_ if self._arrived[index] else place.copy_)(gradient)
        self._arrived[index] += 1
        self._missing -= 1
        return self._missing == 0

    def reduce(self, replicas: Replicas) -> None:
        """Begin to sum the gradients over the replicas; done once a step, whoever asks first."""
        if self._reducing is not None:
            return
        for (parameter, begin), arrived in zip(self.parameters, self._arrived, strict=True):
            if not arrived:
                self.gradients.narrow(0, begin, parameter.numel()).zero_()
        self._reducing = True
        if replicas.size > 1:
            share = self.gradients[self.own]
            self._reducing = dist.reduce_scatter_tensor(share, self.gradients, group=replicas.group, async_op=True)

    def reduced(self) -> torch.Tensor:
        """This replica's share of the sum, once it is there."""
        if self._reducing is not True:
            self._reducing.wait()
        self._reducing = None
        return self.gradients[self.own]

    def publish(self, replicas: Replicas) -> None:
        """Begin to give every replica the weights that the master weights now say."""
        if self.weights.dtype != self.master.dtype:
            self.weights[self.own].copy_(self.master)
        if replicas.size > 1:
            share = self.weights[self.own]
            self._gathering = dist.all_gather_into_tensor(self.weights, share, group=replicas.group, async_op=True)

    def wait(self) -> None:
        """Until the weights are those of all replicas."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None


class Zero:
    """The optimizer of a rank's layers, sharded over its replicas. What it is given is what it keeps.

    Args:
        layers: of this rank, in the order of the forward pass, with fp32 parameters on their device; those are made
            views of the buckets, in `dtype`. A parameter may say `sum_over` and `counted` (see `Kind`).
        make_optimizer: of the master weights; has to take `grad_scale` and `found_inf`, as PyTorch's fused ones do.
        dtype: that the stages compute in.
        micro_batches: of a step.
        clip: largest norm of the gradient over all ranks; None does not clip.
        replicas: the ranks that hold the same.
        sharing: for each `sum_over`, the group of the ranks to sum over.
        bucket: elements to fill a bucket with, at least, where layers are left.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        make_optimizer: MakeOptimizer,
        *,
        dtype: torch.dtype,
        micro_batches: int,
        clip: float | None,
        replicas: Replicas,
        sharing: Mapping[int, Any],
        bucket: int = BUCKET,
    ):
        self._micro_batches, self._clip = micro_batches, clip
        self._replicas, self._sharing = replicas, sharing
        layers = list(layers)
        self.buckets = [_bucket(kind, parameters, dtype, replicas) for kind, parameters in _grouped(layers, bucket)]
        of_parameter = {}
        for one in self.buckets:
            one.expect(micro_batches)
            for index, (parameter, _) in enumerate(one.parameters):
                of_parameter[parameter] = one
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, one, index))
        for layer in layers:
            used = list(dict.fromkeys(of_parameter[parameter] for parameter in layer.parameters()))
            layer.register_forward_pre_hook(partial(_wait, used))
        masters: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for one in self.buckets:
            masters[one.kind.matrix].append(one.master)
        self.adam = make_optimizer(masters[True], masters[False])
        self.norm = torch.zeros((), device=self.buckets[0].weights.device)
        """Of the last step's gradient over all ranks, before clipping."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, whose learning rate is set here."""
        return self.adam.param_groups

    def _arrived(self, bucket: Bucket, index: int, parameter: torch.Tensor) -> None:
        # A backward pass that leaves a weight's gradient for later comes here as well, with none.
        if parameter.grad is not None and bucket.add(index) and bucket.kind.sum_over == 1:
            bucket.reduce(self._replicas)

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights by the gradients of a step, whose passes are done. All ranks of all stages call it.

        Gradients that are not finite move nothing, and Adam does not count the step. Nothing here waits for a GPU.
        """
        for bucket in self.buckets:
            if bucket.kind.sum_over > 1:
                dist.all_reduce(bucket.gradients, group=self._sharing[bucket.kind.sum_over])
            bucket.reduce(self._replicas)
        squares = torch.zeros_like(self.norm)
        for bucket in self.buckets:
            bucket.master.grad = bucket.reduced()
            if bucket.kind.counted:
                squares += torch.linalg.vector_norm(bucket.master.grad).square()
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)
        # The sum over the replicas becomes a mean, and the mean is clipped, where Adam reads it: no pass for either.
        self.norm = squares.sqrt() / self._replicas.size
        excess = (self.norm / self._clip).clamp(min=1.0) if self._clip else torch.ones_like(self.norm)
        self.adam.grad_scale = excess * self._replicas.size  # type: ignore[attr-defined]
        self.adam.found_inf = (~self.norm.isfinite()).float()  # type: ignore[attr-defined]
        self.adam.step()
        for bucket in self.buckets:
            bucket.expect(self._micro_batches)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Begin to give every replica the weights that the master weights now say; layers wait for them when used."""
        for bucket in self.buckets:
            bucket.publish(self._replicas)

    def wait(self) -> None:
        """Until all weights are those that `publish` said."""
        for bucket in self.buckets:
            bucket.wait()


def _wait(buckets: Sequence[Bucket], *_: Any) -> None:
    for bucket in buckets:
        bucket.wait()


def _grouped(layers: Sequence[nn.Module], least: int) -> Iterator[tuple[Kind, list[nn.Parameter]]]:
    """The parameters of each bucket: of one kind, in order, from as few layers as are enough."""
    open_ones: dict[Kind, list[nn.Parameter]] = {}
    for layer in layers:
        for parameter in layer.parameters():
            kind = Kind(parameter.ndim > 1, getattr(parameter, "sum_over", 1), getattr(parameter, "counted", True))
            open_ones.setdefault(kind, []).append(parameter)
        for kind, parameters in list(open_ones.items()):
            if sum(parameter.numel() for parameter in parameters) >= least:
                yield kind, open_ones.pop(kind)
    yield from open_ones.items()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bucket(kind: Kind, parameters: Sequence[nn.Parameter], dtype: torch.dtype, replicas: Replicas) -> Bucket:
    places: list[tuple[nn.Parameter, int]] = []
    size = 0
    for parameter in parameters:
        places.append((parameter, size))
        size = _aligned(size + parameter.numel())
    share = _aligned(-(-size // replicas.size))
    own = slice(replicas.rank * share, (replicas.rank + 1) * share)
    buffer = partial(torch.zeros, share * replicas.size, device=parameters[0].device)
    weights, gradients = buffer(dtype=dtype), buffer(dtype=torch.float32)
    master = weights[own] if dtype == torch.float32 else torch.zeros_like(gradients[own])
    bucket = Bucket(kind, places, own, weights, gradients, nn.Parameter(master))
    with torch.no_grad():
        for piece in bucket.owned():  # before the weights are rounded
            drawn = piece.parameter.flatten().narrow(0, piece.start, piece.size)
            bucket.master.narrow(0, piece.place, piece.size).copy_(drawn)
        for parameter, begin in places:
            place = weights.narrow(0, begin, parameter.numel()).view_as(parameter)
            place.copy_(parameter)
            parameter.data = place
    return bucket
