"""What training has learned, as a rank holds it: fp32 master weights and Adam's moments, by full parameter names.

Tensor parallelism gives a rank a part of each parameter, and ZeRO-1 a range of that part's elements: neither is the
same in another layout. Said as boxes of the whole parameter, both are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.config import ModelConfig
from model.transformer import full_shapes
from parallel.engine import named_parameters
from parallel.layout import Layout
from parallel.sharding import shard
from parallel.zero import Zero

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

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
    """The fp32 state of a stage's engine. No method communicates, except `publish`.

    Args:
        engine: of this rank, as `parallel.engine.build_engine` made it.
        model: the whole model's shape.
        layout: the rank grid.
        rank: this one.
    """

    def __init__(self, engine: "PipelineEngine", model: ModelConfig, layout: Layout, rank: int):
        self._zero: Zero = engine.optimizer
        self._adam = self._zero.adam
        self._model, self._tp, self._tp_rank = model, layout.tp, layout.tp_rank(rank)
        self._names = {parameter: name for name, parameter in named_parameters(engine, model)}
        self._shapes = full_shapes(model)

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

    def publish(self) -> None:
        """Give every replica the weights that the master weights now say, in the precision that stages compute in."""
        self._zero.publish()

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
                name = self._names[own.parameter]
                shape = self._shapes[name]
                part = shard(name, shape, self._model, self._tp, self._tp_rank)
                origin = [0] * len(shape)
                origin[part.dim] = part.start
                for key, flat in tensors.items():
                    values = flat.narrow(0, own.place, own.size)
                    cut = boxes(own.start, values, own.parameter.shape, origin)
                    found[name if key == MASTER else f"{key}/{name}"] = Piece(shape, list(cut))
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
