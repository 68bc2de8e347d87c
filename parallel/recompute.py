"""Blocks that keep less of their forward pass and compute it again in backward (arXiv 2205.05198, section 5)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.layout import Recompute

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.linear.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}
"""What selective recomputation keeps: nearly all of a block's FLOPs are in these."""


def recomputing(block: nn.Module, recompute: Recompute) -> Callable[[torch.Tensor], torch.Tensor]:
    """The block's forward pass, keeping what `recompute` says; values and gradients are the same.

    The random state is not kept: a model without dropout draws no numbers in its forward pass.
    """
    if recompute is Recompute.none:
        return block
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute is Recompute.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, block, **options)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
