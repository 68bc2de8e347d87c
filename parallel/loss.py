"""Cross-entropy over logits whose vocabulary is cut over the tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist

from model.loss import IGNORED
from parallel.tensor import TensorParallel

_ROWS = 256  # of logits that are fp32 at a time


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """The logits are never gathered, and no second copy of them is held: fp32 exists for a few rows at a time, and the
    gradient overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int, tp: TensorParallel) -> torch.Tensor:
        rows = logits.shape[0]
        largest, total, target = (logits.new_zeros(rows, dtype=torch.float32) for _ in range(3))
        local = labels - first
        here = (local >= 0) & (local < logits.shape[1])
        local = local.masked_fill(~here, 0)
        for part in _chunks(rows):
            largest[part] = logits[part].amax(-1).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tp.group)
        for part in _chunks(rows):
            shifted = logits[part].float() - largest[part, None]
            target[part] = shifted.gather(-1, local[part, None]).squeeze(-1) * here[part]
            total[part] = shifted.exp_().sum(-1)
        sums = torch.stack((total, target))
        dist.all_reduce(sums, group=tp.group)
        total, target = sums
        ctx.save_for_backward(logits, local, here, largest, total, labels)
        counted = labels != IGNORED
        return ((total.log() - target) * counted).sum() / rows

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        logits, local, here, largest, total, labels = ctx.saved_tensors
        rows = logits.shape[0]
        scale = grads[0].float() / rows * (labels != IGNORED)
        with torch.no_grad():
            for part in _chunks(rows):
                grad = logits[part].float().sub_(largest[part, None]).exp_().div_(total[part, None])
                grad.scatter_add_(-1, local[part, None], -here[part, None].float())
                logits[part] = grad.mul_(scale[part, None]).to(logits.dtype)
        return logits, None, None, None


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, rows, _ROWS)]


def vocab_parallel_cross_entropy(
    logits_BLV: torch.Tensor, labels_BL: torch.Tensor, first_token: int, tp: TensorParallel
) -> torch.Tensor:
    """`model.loss.cross_entropy` over logits whose vocabulary is cut over the ranks; the same value on each.

    Args:
        logits_BLV: (B, L, V/tp), this rank's part of the vocabulary; overwritten by its gradient in backward.
        labels_BL: int64 (B, L), whole on every rank.
        first_token: where this rank's part of the vocabulary begins.
        tp: the ranks.
    """
    return _VocabParallelCrossEntropy.apply(logits_BLV.flatten(0, 1), labels_BL.flatten(), first_token, tp)
