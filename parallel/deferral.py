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
AddProduct = Callable[[torch.Tensor, torch.Tensor], None]


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
        self, weights: Sequence[nn.Parameter], grads: Sequence[torch.Tensor], of_input: Callable[[], torch.Tensor]
    ) -> Sequence[torch.Tensor | None]:
        """Compute the gradients of the weights of linear layers that share an input, or defer them.

        Args:
            weights: (d_out, d_in) the weight of each layer.
            grads: (..., d_out) the gradient of each layer's output.
            of_input: returns the input, (..., d_in); it is called when the gradients are computed.

        Returns:
            The gradient of each weight; None for one that is deferred, or was added to its sum (`add_products_to`).
        """
        if self._deferred is None:
            return _weight_gradients(weights, grads, of_input())

        def add() -> None:
            with torch.no_grad():
                found = _weight_gradients(weights, grads, of_input())
            left = [(weight, grad) for weight, grad in zip(weights, found, strict=True) if grad is not None]
            if left:  # autograd accumulates them, so that its hooks on the parameters are called
                torch.autograd.backward([weight.view_as(weight) for weight, _ in left], [grad for _, grad in left])

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
        return grad_x, None, *ctx.deferred.gradients(ctx.weights, grads, lambda: x)


def add_products_to(weight: nn.Parameter, add: AddProduct) -> None:
    """Have the gradient of a linear layer's weight added to a sum as it is computed, in place of made by itself.

    Autograd gets no gradient of it then. Megatron-LM calls this the fusion of gradient accumulation.

    Args:
        weight: (d_out, d_in) the parameter.
        add: takes two matrices, (d_out, tokens) and (tokens, d_in), and adds their product to the sum.
    """
    weight.add_product = add  # type: ignore[attr-defined]


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """Add the product of two matrices to a sum, in one kernel that rounds the sum alone.

    For 16-bit matrices cuBLAS has that kernel. On an H200, at the 67B's shapes, it takes 0.77 to 0.80 times as long as
    a product in bf16 and its addition. A CPU has none, and makes the product by itself.

    Args:
        total: (m, n) fp32, added to in place.
        left: (m, k).
        right: (k, n), of the dtype of `left`.
        first: whether the sum begins with this product; what `total` held is overwritten then.
    """
    if left.dtype == total.dtype:
        torch.mm(left, right, out=total) if first else torch.addmm(total, left, right, out=total)
    elif total.device.type == "cpu":
        (total.copy_ if first else total.add_)(left @ right)
    elif first or total.is_meta:  # where nothing is computed, PyTorch 2.11 has no kernel that adds
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _weight_gradients(
    weights: Sequence[nn.Parameter], grads: Sequence[torch.Tensor], x: torch.Tensor
) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = []
    flat_x = x.flatten(0, -2)
    for weight, grad in zip(weights, grads, strict=True):
        left: torch.Tensor = grad.flatten(0, -2).T
        add: AddProduct | None = getattr(weight, "add_product", None)
        found.append(add(left, flat_x) if add else left @ flat_x)
    return found


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
