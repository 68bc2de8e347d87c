"""ZeRO stage 1 (arXiv 1910.02054), whose communication overlaps the passes of a step.

The parameters of a few neighbouring layers lie one after another in a bucket: a buffer of weights in the precision that
the stages compute in, a buffer of gradients in fp32, and this replica's share of the fp32 master weights and of Adam's
two moments. In bytes per parameter that is

    bf16:  2 + 4 + 12 / dp          fp32:  4 + 4 + 8 / dp          (in fp32 the master weights are the weights)

The gradient of a linear layer's weight is a product of two matrices, and is added to its slot in the buffer by the
kernel that multiplies them, unrounded; others as soon as autograd has computed them, and freed. Once a bucket has
those of the last micro-batch, it is reduced over the replicas, each of which gets its share, while the backward pass
continues with the layers before. After the optimizer has moved the shares, the weights are gathered while the next
forward pass begins, in the order in which it needs them: a layer waits for its own buckets and no others. DeepSpeed's
optimizers do both after the passes, all at once (arXiv 2401.02954, section 2.4, has the first of the two).

Gradients are those of the loss summed over all labels. The mean is taken, and clipped, where Adam reads the gradients.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.build import Layer
from parallel.deferral import add_product, add_products_to
from parallel.heartbeat import heart
from parallel.sharding import ParameterInfo

BUCKET = 2**25
"""The least number of elements of a bucket, but for the last of its kind: enough to use the network's bandwidth."""
_ALIGNMENT = 64
"""Parameters begin at multiples of this number of elements: the fast matrix products want 16 bytes, their loads 128."""
_CHUNK = 2**16
"""The number of elements whose squares are summed in fp32: on the CPU, PyTorch's sum over one long tensor loses digits
(2e-4 of a norm at 8 million elements, 2e-3 at 33 million)."""

MakeOptimizer = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.optim.Optimizer]
"""A function from the tensors that hold matrices and those that hold vectors to the optimizer of both."""


@dataclass(frozen=True)
class Replicas:
    """The data-parallel ranks that hold the same layers.

    Attributes:
        group: the process group of these ranks; None for one rank.
        rank: the index of this rank among them.
        size: the number of these ranks.
    """

    group: Any
    rank: int
    size: int


@dataclass(frozen=True)
class BucketKind:
    """The properties that all parameters of a bucket share: see `parallel.sharding.ParameterInfo`."""

    decays: bool
    shared_by: int
    summed: bool
    counted: bool

    @staticmethod
    def of(info: ParameterInfo) -> "BucketKind":
        """Return the kind of bucket that a parameter belongs to."""
        return BucketKind(info.decays, info.shared_by, info.summed, info.counted)


@dataclass(frozen=True)
class Slot:
    """The range of a parameter in the flat buffers of a bucket.

    Attributes:
        parameter: the parameter, a view of the bucket's weights.
        info: the record of the parameter.
        offset: the index of its first element in the buffers.
    """

    parameter: nn.Parameter
    info: ParameterInfo
    offset: int

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the parameter's elements in a flat buffer of the bucket, as a view of the parameter's shape."""
        return buffer.narrow(0, self.offset, self.parameter.numel()).view_as(self.parameter)


@dataclass(frozen=True)
class Owned:
    """A range of consecutive elements of a parameter that lies in this replica's share of a bucket.

    Attributes:
        slot: the slot of the parameter.
        start: the index of the first element in the parameter.
        offset: the index of the first element in the share.
        size: the number of elements.
    """

    slot: Slot
    start: int
    offset: int
    size: int


@dataclass(eq=False)
class Bucket:
    """The flat buffers of some parameters.

    Attributes:
        kind: the properties that all parameters share.
        slots: the ranges of the parameters, in order.
        own: the range of this replica's share.
        weights: (n,) weights in the stages' precision; the parameters are views of it.
        gradients: (n,) fp32, summed over the micro-batches of a step, and after the reduction, in `own`, over replicas.
        master: (n / dp,) fp32 master weights of this replica's share.
        first_use: the index of the first layer that has one of the parameters.
    """

    kind: BucketKind
    slots: list[Slot]
    own: slice
    weights: torch.Tensor
    gradients: torch.Tensor
    master: nn.Parameter
    first_use: int
    _arrived: list[int] = field(default_factory=list)
    _missing: int = 0
    _reducing: Any = None
    _gathering: Any = None

    def owned(self) -> Iterator[Owned]:
        """Yield the range of each parameter whose master weights this replica owns."""
        for slot in self.slots:
            first = max(slot.offset, self.own.start)
            stop = min(slot.offset + slot.parameter.numel(), self.own.stop)
            if first < stop:
                yield Owned(slot, first - slot.offset, first - self.own.start, stop - first)

    def expect(self, micro_batches: int) -> None:
        """Begin a step: expect a gradient of every parameter from each micro-batch."""
        self._arrived = [0] * len(self.slots)
        self._missing = micro_batches * len(self.slots)

    def add(self, index: int) -> bool:
        """Accumulate and free a parameter's gradient; return whether it was the last one of the step."""
        slot = self.slots[index]
        gradient, slot.parameter.grad = slot.parameter.grad, None
        assert gradient is not None
        total = slot.of(self.gradients)
        (total.add_ if self._arrived[index] else total.copy_)(gradient)
        return self._counted(index)

    def add_product(self, index: int, left: torch.Tensor, right: torch.Tensor) -> bool:
        """Accumulate a gradient, the product of two matrices; return whether it was the last of the step."""
        add_product(self.slots[index].of(self.gradients), left, right, first=not self._arrived[index])
        return self._counted(index)

    def _counted(self, index: int) -> bool:
        self._arrived[index] += 1
        self._missing -= 1
        return self._missing == 0

    def reduce(self, replicas: Replicas) -> None:
        """Begin to sum the gradients over the replicas; further calls in the same step do nothing."""
        if self._reducing is not None:
            return
        for slot, arrived in zip(self.slots, self._arrived, strict=True):
            if not arrived:
                slot.of(self.gradients).zero_()
        self._reducing = True
        if replicas.size > 1:
            share = self.gradients[self.own]
            self._reducing = dist.reduce_scatter_tensor(share, self.gradients, group=replicas.group, async_op=True)

    def reduced(self) -> torch.Tensor:
        """Wait for the reduction and return this replica's share of the sum."""
        if self._reducing is not True:
            self._reducing.wait()
        self._reducing = None
        return self.gradients[self.own]

    def start_gather(self, replicas: Replicas) -> None:
        """Begin to gather the weights of all replicas, cast from their master weights."""
        if self.weights.dtype != self.master.dtype:
            self.weights[self.own].copy_(self.master)
        if replicas.size > 1:
            share = self.weights[self.own]
            self._gathering = dist.all_gather_into_tensor(self.weights, share, group=replicas.group, async_op=True)

    def wait(self) -> None:
        """Wait for the weight gather, if one is under way."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None


class Zero:
    """The optimizer of a rank's layers, whose state is sharded over the replicas.

    Args:
        layers: the layers of this rank, in the order of the forward pass, with fp32 parameters on their device; the
            parameters become views of the buckets, in `dtype`.
        make_optimizer: makes the optimizer of the master weights, which has to support `grad_scale` and `found_inf`, as
            PyTorch's fused optimizers do.
        dtype: the dtype in which the stages compute.
        micro_batches: the number of micro-batches of the first step.
        clip: the largest norm of the gradient over all ranks; None does not clip.
        replicas: the ranks that hold the same layers.
        sharing: the process group of the ranks that share a parameter, by `ParameterInfo.shared_by` above 1.
        bucket: the least number of elements of a bucket, but for the last of its kind.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
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
        self.buckets = [_bucket(*group, dtype, replicas) for group in _grouped(layers, bucket)]
        self._by_first_use = sorted(self.buckets, key=lambda one: one.first_use)
        of_parameter = {}
        self.expect(micro_batches)
        for one in self.buckets:
            for index, slot in enumerate(one.slots):
                of_parameter[slot.parameter] = one
                # A strong reference from an autograd hook to its bucket would be a cycle that Python's GC cannot see.
                hook = partial(_accumulate, weakref.ref(one), index, replicas)
                slot.parameter.register_post_accumulate_grad_hook(hook)
                if slot.parameter.dim() == 2:  # which a linear layer may have
                    add_products_to(slot.parameter, partial(_accumulate_product, weakref.ref(one), index, replicas))
        for layer in layers:
            used = list(dict.fromkeys(of_parameter[parameter] for parameter, _ in layer.parameters()))
            layer.module.register_forward_pre_hook(partial(_wait_for_weights, used))
        masters: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for one in self.buckets:
            masters[one.kind.decays].append(one.master)
        self.adam = make_optimizer(masters[True], masters[False])

    def expect(self, micro_batches: int) -> None:
        """Begin a step of so many micro-batches; without this call, it is of as many as the step before."""
        self._micro_batches = micro_batches
        for bucket in self.buckets:
            bucket.expect(micro_batches)

    @torch.no_grad()
    def reduce(self) -> torch.Tensor:
        """Sum the gradients of a step, whose passes are done, over all ranks that hold the same parameters.

        Returns:
            The sum of squares of this rank's part of the gradient, fp64; summed over all ranks it is the squared norm.
        """
        for bucket in self.buckets:
            if (shared_by := bucket.kind.shared_by) > 1:
                with heart.in_collective:
                    dist.all_reduce(bucket.gradients, group=self._sharing[shared_by])
                if not bucket.kind.summed:
                    bucket.gradients /= shared_by
            bucket.reduce(self._replicas)
        squares = torch.zeros((), dtype=torch.float64, device=self.buckets[0].weights.device)
        for bucket in self.buckets:
            bucket.master.grad = bucket.reduced()
            if bucket.kind.counted:
                squares += sum_of_squares(bucket.master.grad)
        return squares

    @torch.no_grad()
    def update(self, rate: float, norm: torch.Tensor, count: torch.Tensor, sound: torch.Tensor | None = None) -> None:
        """Update the master weights and begin to gather the weights; the host does not wait for the GPU.

        A step that is not sound changes no weight and no moment, and Adam does not count it.

        Args:
            rate: the learning rate.
            norm: the norm over all ranks of the gradient of the mean loss, before clipping.
            count: the number of labels that the loss was summed over.
            sound: whether to update, bool on the device, the same on every rank; None wherever the norm is finite.
        """
        sound = norm.isfinite() if sound is None else sound
        excess = (norm / self._clip).clamp(min=1.0) if self._clip else torch.ones_like(norm)
        self.adam.grad_scale = (excess * count).float()  # type: ignore[attr-defined]
        self.adam.found_inf = (~sound).float()  # type: ignore[attr-defined]
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.expect(self._micro_batches)
        self.start_gather()

    @torch.no_grad()
    def start_gather(self) -> None:
        """Begin to gather the weights of all replicas; each layer waits for its own before its forward pass."""
        for bucket in self._by_first_use:
            bucket.start_gather(self._replicas)

    def wait(self) -> None:
        """Wait until the weight gather of every bucket has finished."""
        for bucket in self.buckets:
            bucket.wait()


def sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """Sum the squares of a flat fp32 tensor of any length: in fp32 within a chunk, in fp64 over the chunks."""
    whole = len(values) // _CHUNK * _CHUNK
    parts = [values[:whole].view(-1, _CHUNK), values[whole:].view(1, -1)]
    norms = [torch.linalg.vector_norm(part, dim=1) for part in parts if part.numel()]
    return torch.stack([norm.double().square().sum() for norm in norms]).sum()


def _accumulate(of_bucket: "weakref.ref[Bucket]", index: int, replicas: Replicas, parameter: torch.Tensor) -> None:
    # Autograd also calls this hook for a weight whose gradient a backward pass has deferred; it has none then.
    bucket = of_bucket()
    if bucket is not None and parameter.grad is not None and bucket.add(index) and bucket.kind.shared_by == 1:
        bucket.reduce(replicas)


def _accumulate_product(
    of_bucket: "weakref.ref[Bucket]", index: int, replicas: Replicas, left: torch.Tensor, right: torch.Tensor
) -> None:
    bucket = of_bucket()
    if bucket is not None and bucket.add_product(index, left, right) and bucket.kind.shared_by == 1:
        bucket.reduce(replicas)


def _wait_for_weights(buckets: Sequence[Bucket], *_: Any) -> None:
    for bucket in buckets:
        bucket.wait()


Group = tuple[BucketKind, list[tuple[nn.Parameter, ParameterInfo]], int]


def _grouped(layers: Sequence[Layer], least: int) -> Iterator[Group]:
    """Yield the kind, the parameters and the first layer of each bucket, which spans as few layers as fill it."""
    filling: dict[BucketKind, Group] = {}
    for index, layer in enumerate(layers):
        for parameter, info in layer.parameters():
            kind = BucketKind.of(info)
            filling.setdefault(kind, (kind, [], index))[1].append((parameter, info))
        for kind, (_, parameters, _) in list(filling.items()):
            if sum(parameter.numel() for parameter, _ in parameters) >= least:
                yield filling.pop(kind)
    yield from filling.values()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bucket(
    kind: BucketKind,
    parameters: Sequence[tuple[nn.Parameter, ParameterInfo]],
    first_use: int,
    dtype: torch.dtype,
    replicas: Replicas,
) -> Bucket:
    slots: list[Slot] = []
    size = 0
    for parameter, info in parameters:
        slots.append(Slot(parameter, info, size))
        size = _aligned(size + parameter.numel())
    share = _aligned(-(-size // replicas.size))
    own = slice(replicas.rank * share, (replicas.rank + 1) * share)
    buffer = partial(torch.zeros, share * replicas.size, device=parameters[0][0].device)
    weights, gradients = buffer(dtype=dtype), buffer(dtype=torch.float32)
    master = weights[own] if dtype == torch.float32 else torch.zeros_like(gradients[own])
    bucket = Bucket(kind, slots, own, weights, gradients, nn.Parameter(master), first_use)
    with torch.no_grad():
        for owned in bucket.owned():  # the master weights are copied before the weights are rounded
            drawn = owned.slot.parameter.flatten().narrow(0, owned.start, owned.size)
            bucket.master.narrow(0, owned.offset, owned.size).copy_(drawn)
        for slot in slots:
            view = slot.of(weights)
            view.copy_(slot.parameter)
            slot.parameter.data = view
    return bucket
