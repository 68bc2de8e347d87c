"""Backward passes that leave the gradients of weights for later (zero bubble, arXiv 2401.10241).

A linear map's backward pass has two halves that need nothing of each other: the gradient of its input, for which the
stage before waits, and that of its weight. Within `DeferredGradients.deferring` the maps of a rank leave the latter, to
be computed when there is time. Norms and the embedding, whose share is small, compute all of theirs at once.

Each map saves its parameter itself, not as a saved tensor: under recomputation a saved tensor comes back as another
one, to which no gradient would be added.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from model.layers import FusedLinears

Deferred = Callable[[], None]


class DeferredGradients:
    """What the backward pass under way leaves for later: one object, which all layers of a rank are built with.

    It is no context variable: on a GPU, backward passes run on threads of autograd's own.
    """

    def __init__(self) -> None:
        self._left: list[Deferred] | None = None

    @property
    def active(self) -> bool:
        """Whether the backward pass under way leaves the gradients of its weights."""
        return self._left is not None

    @contextmanager
    def deferring(self) -> Iterator[list[Deferred]]:
        """Within, backward passes append to this list what is left of them."""
        assert self._left is None, "one backward pass at a time"
        left: list[Deferred] = []
        self._left = left
        try:
            yield left
        finally:
            self._left = None

    def gradients(
        self, weights: Sequence[nn.Parameter], compute: Callable[[], Sequence[torch.Tensor]]
    ) -> Sequence[torch.Tensor | None]:
        """What a backward pass returns for its weights: their gradients, or None for each, to be computed later.

        Args:
            weights: parameters, each of which gets one gradient.
            compute: makes the gradients.
        """
        if self._left is None:
            return compute()

        def add() -> None:
            # Through autograd, so that whoever watches a parameter's gradient (`parallel/zero.py`) sees it.
            with torch.no_grad():
                gradients = list(compute())
            torch.autograd.backward([weight.view_as(weight) for weight in weights], gradients)

        self._left.append(add)
        return [None] * len(weights)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, deferred: DeferredGradients, *weights: nn.Parameter
    ) -> tuple[torch.Tensor, ...]:
        ctx.deferred, ctx.weights = deferred, weights
        ctx.save_for_backward(x)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        grad_x = input_gradient(grads, ctx.weights) if ctx.needs_input_grad[0] else None
        return (
            grad_x,
            None,
            *ctx.deferred.gradients(ctx.weights, lambda: [grad.flatten(0, -2).T @ x.flatten(0, -2) for grad in grads]),
        )


def input_gradient(grads: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The gradient of what several linear maps read, summed as they are multiplied.

    Args:
        grads: (..., d_out) of each map's output.
        weights: (d_out, d_in) of each.

    Returns:
        (..., d_in).
    """
    total = grads[0] @ weights[0]
    flat = total.view(-1, total.shape[-1])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        flat.addmm_(grad.flatten(0, -2), weight)
    return total


def linear(x: torch.Tensor, weight: nn.Parameter, deferred: DeferredGradients) -> torch.Tensor:
    """(..., d_in) to (..., d_out), with a weight gradient that can be deferred."""
    return _Linear.apply(x, deferred, weight)[0]


class DeferringLinear(nn.Module):
    """An `nn.Linear` without bias whose weight gradient can be deferred; its parameter bears the same name."""

    def __init__(self, plain: nn.Linear, deferred: DeferredGradients):
        super().__init__()
        self.weight, self.deferred = nn.Parameter(plain.weight), deferred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) to (..., d_out)."""
        return linear(x, self.weight, self.deferred)


class DeferringFusedLinears(nn.Module):
    """A `FusedLinears` whose weight gradients can be deferred."""

    def __init__(self, plain: FusedLinears, deferred: DeferredGradients):
        super().__init__()
        self.deferred = deferred
        for name, one in plain.named_children():
            self.add_module(name, one)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(..., d_in) to one (..., width) for each map."""
        return _Linear.apply(x, self.deferred, *self.parameters())
