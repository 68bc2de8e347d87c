"""Backward passes that defer the gradients of weights (zero bubble, arXiv 2401.10241).

A linear layer's backward pass has two independent halves: the gradient of its input, for which the stage before waits,
and that of its weight. Within `DeferredGradients.deferring` the linear layers of a rank defer the latter to a later
pass. Norms and the embedding, whose share is small, compute all of their gradients at once.

Each layer refers to its parameter itself, not to a saved tensor: under recomputation a saved tensor comes back as
another one, to which no gradient would be added.
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
    """The weight gradients that the current backward pass defers: one object, shared by all layers of a rank.

    It is not a context variable, since on a GPU backward passes run on autograd's own threads.
    """

    def __init__(self) -> None:
        self._deferred: list[Deferred] | None = None

    @property
    def active(self) -> bool:
        """Whether the current backward pass defers the gradients of its weights."""
        return self._deferred is not None

    @contextmanager
    def deferring(self) -> Iterator[list[Deferred]]:
        """Have backward passes inside this context append their deferred computations to the returned list."""
        assert self._deferred is None, "one backward pass at a time"
        deferred: list[Deferred] = []
        self._deferred = deferred
        try:
            yield deferred
        finally:
            self._deferred = None

    def gradients(
        self, weights: Sequence[nn.Parameter], compute: Callable[[], Sequence[torch.Tensor]]
    ) -> Sequence[torch.Tensor | None]:
        """Compute the gradients of weights, or defer them and return None for each.

        Args:
            weights: the parameters, each of which gets one gradient.
            compute: the function that computes the gradients.
        """
        if self._deferred is None:
            return compute()

        def add() -> None:
            # Autograd accumulates them, so that its hooks on the parameters (`parallel/zero.py`) are called.
            with torch.no_grad():
                gradients = list(compute())
            torch.autograd.backward([weight.view_as(weight) for weight in weights], gradients)

        self._deferred.append(add)
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
        x = saved_input(ctx)
        grad_x = input_gradient(grads, ctx.weights) if ctx.needs_input_grad[0] else None
        return (
            grad_x,
            None,
            *ctx.deferred.gradients(ctx.weights, lambda: [grad.flatten(0, -2).T @ x.flatten(0, -2) for grad in grads]),
        )


def saved_input(ctx: Any) -> torch.Tensor:
    """Return the one tensor that a function has saved, without the graph behind it.

    A deferred gradient would otherwise keep the stage's input, and the gradient of that, which the graph ends at.
    """
    (x,) = ctx.saved_tensors
    return x.detach()


def input_gradient(grads: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the gradient of the input that several linear layers share; each product is added to the sum in place.

    Args:
        grads: (..., d_out) the gradient of each layer's output.
        weights: (d_out, d_in) the weight of each layer.

    Returns:
        (..., d_in) the gradient of the input.
    """
    total = grads[0] @ weights[0]
    flat = total.view(-1, total.shape[-1])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        flat.addmm_(grad.flatten(0, -2), weight)
    return total


def linear(x: torch.Tensor, weight: nn.Parameter, deferred: DeferredGradients) -> torch.Tensor:
    """Map (..., d_in) to (..., d_out), with a weight gradient that can be deferred."""
    return _Linear.apply(x, deferred, weight)[0]


class DeferringLinear(nn.Module):
    """An `nn.Linear` without bias whose weight gradient can be deferred; its parameter has the same name."""

    def __init__(self, plain: nn.Linear, deferred: DeferredGradients):
        super().__init__()
        self.weight, self.deferred = nn.Parameter(plain.weight), deferred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return linear(x, self.weight, self.deferred)


class DeferringFusedLinears(nn.Module):
    """A `FusedLinears` whose weight gradients can be deferred."""

    def __init__(self, plain: FusedLinears, deferred: DeferredGradients):
        super().__init__()
        self.deferred = deferred
        for name, one in plain.named_children():
            self.add_module(name, one)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map (..., d_in) to one (..., width) per linear layer."""
        return _Linear.apply(x, self.deferred, *self.parameters())
