"""What training has learned, as a rank holds it: fp32 master weights and Adam's moments, by full parameter names.

Tensor parallelism gives a rank a part of each parameter, and ZeRO-1 a range of that part's elements: neither is the
same in another layout. Said as boxes of the whole parameter, both are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from parallel.zero import Zero

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")

Flats = list[dict[str, torch.Tensor]]
"""Per bucket, this replica's share of it: the master weights and each moment, fp32, one size."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of a whole tensor, and where its values lie.

    Attributes:
        offsets: of its first element in the whole, per dimension.
        values: a view of the shape of the box.
    """

    offsets: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """What one rank owns of a tensor.

    Attributes:
        shape: of the whole tensor.
        boxes: disjoint; up to three.
    """

    shape: torch.Size
    boxes: list[Box]


class OptimizerState:
    """The fp32 state of a rank's layers. No method communicates, except `start_gather`.

    Args:
        zero: of the rank.
    """

    def __init__(self, zero: Zero):
        self._zero, self._adam = zero, zero.adam

    @property
    def adam_step(self) -> int:
        """Updates made so far: Adam's own count, which a step skipped for its gradients does not raise."""
        state = self._adam.state[self._zero.buckets[0].master]
        return int(state["step"]) if state else 0

    def flats(self) -> Flats:
        """The state itself, not a copy; an optimizer step or `start_at` has been taken."""
        masters = [bucket.master for bucket in self._zero.buckets]
        states = [self._adam.state[master] for master in masters]
        return [
            {MASTER: master.detach(), **{key: state[key] for key in MOMENTS}}
            for master, state in zip(masters, states, strict=True)
        ]

    def start_at(self, adam_step: int) -> None:
        """Make the moments, which Adam would make at its first step, so that they can be loaded."""
        for master in (bucket.master for bucket in self._zero.buckets):
            count = torch.tensor(float(adam_step), device=master.device)
            moments = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS}
            self._adam.state[master] = {"step": count, **moments}

    def start_gather(self) -> None:
        """Begin to give every replica the weights that the master weights now say, as the stages compute with them."""
        self._zero.start_gather()

    def pieces(self, flats: Flats) -> dict[str, Piece]:
        """What this rank owns of every tensor of its stage, as views of `flats`.

        Tensor-parallel ranks that hold the same part of a parameter own the same boxes.

        Args:
            flats: `self.flats()` or copies of them.

        Returns:
            By name: a master weight has its parameter's full name, a moment ``exp_avg/`` and that.
        """
        found = {}
        for bucket, tensors in zip(self._zero.buckets, flats, strict=True):
            for own in bucket.owned():
                info = own.slot.info
                origin = [0] * len(info.shape)
                origin[info.shard.dim] = info.shard.start
                for key, flat in tensors.items():
                    values = flat.narrow(0, own.offset, own.size)
                    cut = boxes(own.start, values, own.slot.parameter.shape, origin)
                    found[info.name if key == MASTER else f"{key}/{info.name}"] = Piece(info.shape, list(cut))
        return found


def boxes(start: int, values: torch.Tensor, shape: Sequence[int], origin: Sequence[int]) -> Iterator[Box]:
    """Consecutive elements of a vector or matrix in row-major order, as the end of a row, whole rows, a row's start.

    Args:
        start: the first of them, counted from the start of the matrix.
        values: 1-D.
        shape: of the vector or matrix.
        origin: where that lies in the whole tensor.
    """
    if len(shape) == 1:
        yield Box((origin[0] + start,), values)
        return
    _, width = shape
    at, stop = start, start + len(values)
    while at < stop:
        row, column = divmod(at, width)
        whole_rows = 0 if column else (stop - at) // width
        size = (whole_rows, width) if whole_rows else (1, min(stop - at, width - column))
        length = math.prod(size)
        yield Box((origin[0] + row, origin[1] + column), values.narrow(0, at - start, length).view(size))
        at += length
