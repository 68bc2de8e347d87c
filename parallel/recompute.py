"""Blocks that save less of their forward pass and recompute it in backward (arXiv 2205.05198, section 5)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.context import EMPTY_CONTEXT, Context
from model.rematerialization import Rematerialization
from parallel.layout import Recompute


def recomputing(block: nn.Module, recompute: Recompute) -> Callable[[torch.Tensor, Context], torch.Tensor]:
    """Return the forward pass of a block that saves the activations `recompute` says; results stay the same.

    The random state is not saved: a model without dropout draws no numbers in its forward pass.

    Args:
        block: a `model.transformer.Block`, plain or tensor-parallel.
        recompute: the activations that the backward pass recomputes.

    Returns:
        A function of the activations (B, L, D) and their `Context`, by default an empty one.
    """
    if recompute is Recompute.none:
        return block
    if recompute is Recompute.full:
        return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)

    def forward(x_BLD: torch.Tensor, context: Context = EMPTY_CONTEXT) -> torch.Tensor:
        rematerialization = Rematerialization(products=recompute is Recompute.ffn)
        with rematerialization.saving():
            return block(x_BLD, replace(context, rematerialization=rematerialization))

    return forward
