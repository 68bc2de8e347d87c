"""The loss of a last stage, whose vocabulary may be cut over tensor-parallel ranks, and into pieces on each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from model.config import Kernels
from model.loss import WHOLE, Part, cross_entropy, head_loss
from model.transformer import Head
from parallel.tensor import TensorParallel, whole_sequence


def vocabulary_part(first_token: int, tp: TensorParallel) -> Part:
    """A rank's part of the vocabulary. The logits are never gathered: three numbers of each token travel."""
    if tp.size == 1:
        return WHOLE

    def over(op: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduced(values: torch.Tensor) -> torch.Tensor:
            values = values.clone()
            dist.all_reduce(values, op=op, group=tp.group)
            return values

        return reduced

    return Part(first_token, over(dist.ReduceOp.MAX), over(dist.ReduceOp.SUM))


def loss_of_logits(part: Part, kernels: Kernels) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """From a part's logits (B, L, V/tp) and labels (B, L) to the loss, the same on every rank."""
    return lambda logits_BLV, labels_BL: cross_entropy(logits_BLV, labels_BL, part, kernels)


def loss_in_pieces(
    head: Head, pieces: int, part: Part, kernels: Kernels, tp: TensorParallel
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """From what the head has normed (B, L/tp or L, D) and labels (B, L) to the loss; see `model.loss.head_loss`.

    The gradient of the head's weight is made with that of its input, whatever waits elsewhere.
    """

    def loss(x_BlD: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        x_BLD = whole_sequence(x_BlD, tp)
        return head_loss(x_BLD, head.proj.weight, labels_BL, pieces, part, kernels)

    return loss
