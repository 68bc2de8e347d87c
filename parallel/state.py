"""The optimizer state of a rank by full parameter names: fp32 master weights and Adam's moments.

Tensor parallelism gives a rank a part of each parameter, and ZeRO-1 a range of that part's elements: both differ by
layout. As boxes of the whole parameter, the state can be saved in one layout and loaded in another.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from parallel.zero import Zero

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")

Flats = list[dict[str, torch.Tensor]]
"""For each bucket, this replica's share of the master weights and of each moment, fp32 tensors of one size."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of a whole tensor.

    Attributes:
        offsets: the index of its first element in the whole tensor, per dimension.
        values: the elements of the box, a view of its shape.
    """

    offsets: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that one rank owns.

    Attributes:
        shape: the shape of the whole tensor.
        boxes: up to three disjoint boxes.
    """

    shape: torch.Size
    boxes: list[Box]


class OptimizerState:
    """The fp32 optimizer state of a rank's layers. No method communicates, except `start_gather`.

    Args:
        zero: the optimizer of the rank.
    """

    def __init__(self, zero: Zero):
        self._zero, self._adam = zero, zero.adam

    @property
    def adam_step(self) -> int:
        """The number of updates so far, by Adam's own count: steps that were skipped do not count."""
        state = self._adam.state[self._zero.buckets[0].master]
        return int(state["step"]) if state else 0

    def flats(self) -> Flats:
        """Return the state itself, not a copy. Needs an optimizer step or `start_at` to have been taken."""
        masters = [bucket.master for bucket in self._zero.buckets]
        states = [self._adam.state[master] for master in masters]
        return [
            {MASTER: master.detach(), **{key: state[key] for key in MOMENTS}}
            for master, state in zip(masters, states, strict=True)
        ]

    def start_at(self, adam_step: int) -> None:
        """Allocate the moments, which Adam would allocate in its first step, so that they can be loaded."""
        for master in (bucket.master for bucket in self._zero.buckets):
            count = torch.tensor(float(adam_step), device=master.device)
            moments = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS}
            self._adam.state[master] = {"step": count, **moments}

    def start_gather(self) -> None:
        """Begin to gather the weights of all replicas, cast from their master weights."""
        self._zero.start_gather()

    def pieces(self, flats: Flats) -> dict[str, Piece]:
        """Return what this rank owns of every tensor of its stages, as views of `flats`.

        Tensor-parallel ranks that hold the same part of a parameter own the same boxes.

        Args:
            flats: the result of `self.flats()` or copies of it.

        Returns:
            The pieces by name: a master weight's is its parameter's full name, a moment's ``exp_avg/`` and that.
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
    """Cut consecutive elements of a vector or matrix in row-major order: the end of a row, whole rows, a row's start.

    Args:
        start: the index of the first element in the flattened vector or matrix.
        values: the elements, 1-D.
        shape: the shape of the vector or matrix.
        origin: the offsets of the vector or matrix in the whole tensor.
    """
    if len(shape) == 1:
        yield Box((origin[0] + start,), values)
        return
    _, width = shape
    index, stop = start, start + len(values)
    while index < stop:
        row, column = divmod(index, width)
        whole_rows = 0 if column else (stop - index) // width
        size = (whole_rows, width) if whole_rows else (1, min(stop - index, width - column))
        length = math.prod(size)
        yield Box((origin[0] + row, origin[1] + column), values.narrow(0, index - start, length).view(size))
        index += length
