"""Tensors that a backward pass need not find kept, since what is kept anyway makes them again.

The model says how (`remade`), and whoever trains it says whether (`remaking`): a norm's output is one pass over its
input, and SwiGLU's product one over gate and up, while a matrix product costs what it costs (arXiv 2205.05198, section
5, tells the two apart).
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_open: "_Recipes | None" = None


class _Recipe:
    """How to make some tensors; what it makes is held until all that asked for it have had it."""

    def __init__(self, make: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[Any]):
        self._make, self._inputs = make, inputs
        self.uses = 0
        self._made: Sequence[torch.Tensor] | None = None

    def get(self, index: int) -> torch.Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = self._make(*(one.get() if isinstance(one, _Use) else one for one in self._inputs))
        made = self._made[index]
        self.uses -= 1
        if not self.uses:
            self._made = None
        return made


class _Use:
    """One tensor, or a view of it, in the place of which a recipe is kept."""

    def __init__(self, recipe: _Recipe, index: int, view: torch.Tensor):
        recipe.uses += 1
        self._recipe, self._index = recipe, index
        self._size, self._stride, self._offset = view.size(), view.stride(), view.storage_offset()

    def get(self) -> torch.Tensor:
        return self._recipe.get(self._index).as_strided(self._size, self._stride, self._offset)


class _Recipes:
    """Those of a forward pass, by where in memory the tensor is that they make."""

    def __init__(self, products: bool):
        self.products = products
        self._by_place: dict[int, tuple[Any, _Recipe, int]] = {}

    def add(self, made: Sequence[torch.Tensor], make: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> None:
        recipe = _Recipe(make, [self.pack(one) for one in inputs])
        for index, tensor in enumerate(made):
            self._by_place[tensor.untyped_storage().data_ptr()] = weakref.ref(tensor), recipe, index

    def pack(self, tensor: torch.Tensor) -> Any:
        alive, recipe, index = self._by_place.get(tensor.untyped_storage().data_ptr(), (None, None, 0))
        # A tensor that is gone has left its place to another, which is not what the recipe makes.
        if recipe is None or alive is None or alive() is None:
            return tensor.detach()
        return _Use(recipe, index, tensor)


def _unpack(kept: Any) -> torch.Tensor:
    return kept.get() if isinstance(kept, _Use) else kept


def remade(
    made: Sequence[torch.Tensor], make: Callable[..., Sequence[torch.Tensor]], *inputs: torch.Tensor, product: bool
) -> None:
    """Say how fresh, contiguous tensors can be made again; does nothing outside of `remaking`.

    Args:
        made: just now, by ``make(*inputs)``.
        make: must hold no tensor but weights; runs without gradients.
        inputs: which may be remade themselves.
        product: whether it takes a matrix product.
    """
    if _open is not None and (_open.products or not product):
        _open.add(made, make, inputs)


@contextmanager
def remaking(products: bool) -> Iterator[None]:
    """Within, forward passes keep recipes where they can.

    Args:
        products: for matrix products too.
    """
    global _open
    before, _open = _open, _Recipes(products)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_open.pack, _unpack):
            yield
    finally:
        _open = before
