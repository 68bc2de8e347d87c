"""Recompute cheap tensors in the backward pass instead of saving them (arXiv 2205.05198, section 5).

A layer offers a way to recompute an output from inputs that are saved anyway (`Rematerialization.offer`), and whoever
trains it decides whether the offers are taken (`Rematerialization.saving`). A norm's output is one pass over its input
and SwiGLU's product one pass over gate and up, while a matrix product costs as much as it did in the forward pass.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class _Recipe:
    """How to recompute some tensors; the results are held until every saved use of them has been served."""

    def __init__(self, compute: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[Any]):
        self._compute, self._inputs = compute, inputs
        self.uses = 0
        self._outputs: Sequence[torch.Tensor] | None = None

    def get(self, index: int) -> torch.Tensor:
        if self._outputs is None:
            with torch.no_grad():
                self._outputs = self._compute(*(_unpack(one) for one in self._inputs))
        output = self._outputs[index]
        self.uses -= 1
        if not self.uses:
            self._outputs = None
        return output


class _Use:
    """What autograd saves in place of a tensor, or of a view of it, that a recipe can recompute."""

    def __init__(self, recipe: _Recipe, index: int, view: torch.Tensor):
        recipe.uses += 1
        self._recipe, self._index = recipe, index
        self._size, self._stride, self._offset = view.size(), view.stride(), view.storage_offset()

    def get(self) -> torch.Tensor:
        return self._recipe.get(self._index).as_strided(self._size, self._stride, self._offset)


class Rematerialization:
    """The recipes of one forward pass.

    They are keyed by the storage of the tensor that they recompute, so that a view of it is found as well. The backward
    pass needs nothing but what autograd saved, and may run on another thread and after this object is gone.

    Args:
        products: whether offers that take a matrix product are accepted.
    """

    def __init__(self, products: bool):
        self._products = products
        self._by_storage: dict[int, tuple[weakref.ref[torch.Tensor], _Recipe, int]] = {}

    def offer(
        self,
        outputs: Sequence[torch.Tensor],
        compute: Callable[..., Sequence[torch.Tensor]],
        *inputs: torch.Tensor,
        product: bool,
    ) -> None:
        """Register a way to recompute fresh, contiguous tensors.

        Args:
            outputs: the results of ``compute(*inputs)``.
            compute: runs in the backward pass without gradients; must hold no tensors but weights.
            inputs: are saved, or recomputed themselves where they were offered before.
            product: whether `compute` takes a matrix product.
        """
        if product and not self._products:
            return
        recipe = _Recipe(compute, [self._pack(one) for one in inputs])
        for index, tensor in enumerate(outputs):
            self._by_storage[_storage(tensor)] = weakref.ref(tensor), recipe, index

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within, autograd saves a recipe in place of each tensor that was offered."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: torch.Tensor) -> Any:
        found = self._by_storage.get(_storage(tensor))
        # The storage of a tensor that is gone may have been given to another, which the recipe does not compute.
        if found is None or found[0]() is None:
            return tensor.detach()
        return _Use(found[1], found[2], tensor)


def _storage(tensor: torch.Tensor) -> int:
    # The storage's own address: the address of its data is 0 for every tensor on the meta device.
    return tensor.untyped_storage()._cdata


def _unpack(saved: Any) -> torch.Tensor:
    return saved.get() if isinstance(saved, _Use) else saved
