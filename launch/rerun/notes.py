"""Checksums of what a rank computes in a step, in the order in which it does, taken from outside of its engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from parallel.build import Forward
from parallel.engine import Engine
from parallel.schedules import Action
from parallel.zero import Bucket, Replicas

RECEIVED = "received "
"""Begins the name of what another rank has computed."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: torch.Tensor) -> torch.Tensor:
    """Sum the bits of a tensor's elements as whole numbers, in any order the same: int64 (), on its device."""
    return values.detach().contiguous().view(_BITS[values.element_size()]).sum(dtype=torch.int64)


class Notes:
    """The checksums of an engine's steps: of every layer's output and gradient, of gradients before and after they are
    summed over replicas. The step itself is what it was: all it computes passes through unchanged.

    Args:
        engine: whose steps are noted from here on.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._action: Action | None = None
        self._noted: dict[str, torch.Tensor] = {}
        pipeline = engine.pipeline
        self._last_stage = pipeline.placement.num_stages - 1
        pipeline.stages = {
            stage: [self._layer(function, index, len(functions)) for index, function in enumerate(functions)]
            for stage, functions in pipeline.stages.items()
        }
        self._around, pipeline.around = pipeline.around, self._during
        for index, bucket in enumerate(engine.zero.buckets):
            bucket.reduce = partial(self._reduce, index, bucket, bucket.reduce)  # type: ignore[method-assign]

    def begin(self) -> None:
        """Begin a step: what was noted is forgotten, and the weights are noted."""
        self._engine.wait()
        self._noted = {}
        for index, bucket in enumerate(self._engine.zero.buckets):
            self._noted[f"weights of bucket {index}"] = checksum(bucket.master) + checksum(bucket.weights)

    def ended(self) -> dict[str, int]:
        """Return the checksums of the step that has ended, by name, in the order in which they were computed."""
        for index, bucket in enumerate(self._engine.zero.buckets):
            assert bucket.master.grad is not None
            self._noted[f"reduced gradients of bucket {index}"] = checksum(bucket.master.grad)
        return dict(zip(self._noted, torch.stack(list(self._noted.values())).tolist(), strict=True))

    @contextmanager
    def _during(self, action: Action) -> Iterator[None]:
        self._action = action
        with self._around(action):
            yield

    def _layer(self, function: Forward, index: int, number: int) -> Forward:
        """Wrap a layer: note its output and that one's gradient, and of a stage's first what goes in."""

        def noted(x: torch.Tensor, context: Any) -> torch.Tensor:
            assert self._action is not None
            if index == 0:
                own = not x.is_floating_point()  # tokens
                x = self._through(x, "tokens" if own else f"{RECEIVED}activations", "gradient of its input")
            y = function(x, context)
            last, ends = index == number - 1, self._action.stage == self._last_stage
            said = f"{RECEIVED if last and not ends else ''}gradient of layer {index}"
            return self._through(y, f"layer {index}", said)

        return noted

    def _through(self, x: torch.Tensor, name: str, gradient: str) -> torch.Tensor:
        self._note(name, x)
        return _Through.apply(x, partial(self._note, gradient)) if x.requires_grad else x

    def _note(self, name: str, values: torch.Tensor) -> None:
        action = self._action
        assert action is not None
        received = RECEIVED if name.startswith(RECEIVED) else ""
        where = action.said
        self._noted[f"{received}{name.removeprefix(RECEIVED)} in {where}"] = checksum(values)

    def _reduce(self, index: int, bucket: Bucket, reduce: Callable[[Replicas], None], replicas: Replicas) -> None:
        name = f"gradients of bucket {index}"
        if name not in self._noted:
            self._noted[name] = checksum(bucket.gradients)
        reduce(replicas)


class _Through(torch.autograd.Function):
    """The identity, which tells of the gradient that passes back through it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, told: Callable[[torch.Tensor], None]) -> torch.Tensor:
        ctx.told = told
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.told(gradients[0])
        return gradients[0], None
