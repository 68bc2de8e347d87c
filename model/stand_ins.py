"""What runs in the place of kernels where nothing is computed.

On meta tensors, which have shapes and no values, a rank can be run for the memory that it takes and the messages that
it sends (`parallel/dry_run`). A kernel holds nothing but its results, while the operators that it is written in, one
after another, would hold every intermediate one. Who runs such a rank says what stands in for its kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from model.documents import Documents

AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents | None, int | None], torch.Tensor]
"""From queries (B, L, H, K), keys and values (B, L, G, K), documents or None, window or None to (B, L, H, K)."""


@dataclass(frozen=True)
class StandIns:
    """What stands in for the kernels of a GPU.

    Attributes:
        compiled: the function that takes a formula of `model.fused` or `model.loss` and returns what runs in the place
            of its compiled kernel.
        attention: runs in the place of a flash kernel.
    """

    compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    attention: AttentionKernel


_CURRENT: ContextVar[StandIns | None] = ContextVar("stand_ins", default=None)


def stand_ins() -> StandIns | None:
    """What stands in for kernels here; None where they run."""
    return _CURRENT.get()


@contextmanager
def standing_in(kernels: StandIns) -> Iterator[None]:
    """Within, in this thread, these stand in for the kernels that a GPU would run.

    Backward passes of meta tensors are run by the thread that asks for them, so that they see it as well.
    """
    token = _CURRENT.set(kernels)
    try:
        yield
    finally:
        _CURRENT.reset(token)
