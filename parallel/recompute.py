"""Blocks that keep less of their forward pass and compute it again in backward (arXiv 2205.05198, section 5)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.rematerialization import remaking
from parallel.layout import Recompute


def recomputing(block: nn.Module, recompute: Recompute) -> Callable[[torch.Tensor], torch.Tensor]:
    """The block's forward pass, keeping what `recompute` says; values and gradients are the same.

    The random state is not kept: a model without dropout draws no numbers in its forward pass.
    """
    if recompute is Recompute.none:
        return block
    if recompute is Recompute.full:
        return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)

    def forward(x_BLD: torch.Tensor) -> torch.Tensor:
        with remaking(products=recompute is Recompute.ffn):
            return block(x_BLD)

    return forward
