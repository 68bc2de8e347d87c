"""Next-token cross-entropy in place: the logits are the only tensor of their size (arXiv 2401.02954, section 2.4).

They stay in the precision that they were computed in, are fp32 inside the kernel alone, and are overwritten by their
gradient. The vocabulary may lie in parts, on several ranks or one after another (`head_loss`): a part knows its largest
logit and the sum of its exponentials, and those of all parts make those of the whole.

N tokens (B x L), V vocabulary or a part of it, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F

from model.config import Kernels
from model.fused import compiled, runs_compiled

IGNORED = -100
"""A label that is not predicted."""

_CHUNK = {"cpu": 2**18, "cuda": 2**26}
"""Logits that are fp32 at a time where no kernel converts them: few enough for a CPU's cache, enough for a GPU."""


def _alone(values_N: torch.Tensor) -> torch.Tensor:
    return values_N


@dataclass(frozen=True)
class VocabularyShard:
    """Where a part of the vocabulary lies, and how its sums become those of all of it.

    Attributes:
        first_token: of the part.
        maximum, total: over all ranks that hold parts, of (N,) fp32.
    """

    first_token: int = 0
    maximum: Callable[[torch.Tensor], torch.Tensor] = _alone
    total: Callable[[torch.Tensor], torch.Tensor] = _alone


WHOLE_VOCABULARY = VocabularyShard()


def cross_entropy(
    logits_BLV: torch.Tensor,
    labels_BL: torch.Tensor,
    part: VocabularyShard = WHOLE_VOCABULARY,
    kernels: Kernels = Kernels.auto,
) -> torch.Tensor:
    """Sum of the token losses, in nats and fp32, over the number of labels, ignored ones included.

    With no label ignored (training on packed sequences) that is the mean. The denominator never varies, so the mean
    over micro-batches and ranks is exact too: an evaluation whose last batch is filled up with ignored labels divides
    by the real share of them at the end.

    Args:
        logits_BLV: (B, L, V), of a part of the vocabulary or all; the backward pass, of which there can be one, leaves
            their gradient in their place.
        labels_BL: int64 (B, L), of the whole vocabulary.
        part: which part.
        kernels: see `model/fused.py`.
    """
    return _CrossEntropy.apply(logits_BLV.flatten(0, 1), labels_BL.flatten(), part, kernels)


def head_loss(
    x_BLD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_BL: torch.Tensor,
    pieces: int,
    part: VocabularyShard = WHOLE_VOCABULARY,
    kernels: Kernels = Kernels.auto,
) -> torch.Tensor:
    """`cross_entropy` of the logits ``x W^T``, of which there is one piece at a time.

    Instead of B L V logits, B L V / pieces are held, and none between the passes: the backward pass computes them
    again, which costs a forward pass of the head.

    Args:
        x_BLD: normed.
        weight_VD: the head's, of this part of the vocabulary.
        labels_BL: int64 (B, L).
        pieces: to cut the part of the vocabulary into.
        part: which part.
        kernels: see `model/fused.py`.
    """
    return _HeadLoss.apply(x_BLD.flatten(0, 1), weight_VD, labels_BL.flatten(), pieces, part, kernels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor, part: VocabularyShard, kernels: Kernels
    ) -> torch.Tensor:
        fused = runs_compiled(kernels, logits_NV)
        sums = _of_all_parts(_sums(logits_NV, labels_N - part.first_token, fused), part)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits_NV, labels_N, sums[0], sums[1])
            ctx.part, ctx.fused, ctx.spent = part, fused, False
        return _loss(sums, labels_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        assert not ctx.spent, "the logits are their gradient by now: one backward pass"
        ctx.spent = True
        logits_NV, labels_N, largest_N, total_N = ctx.saved_tensors
        with torch.no_grad():
            scale_N = _scale(grads[0], labels_N)
            _to_gradient(logits_NV, labels_N - ctx.part.first_token, largest_N, total_N, scale_N, ctx.fused)
        return logits_NV, None, None, None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        pieces: int,
        part: VocabularyShard,
        kernels: Kernels,
    ) -> torch.Tensor:
        fused = runs_compiled(kernels, x_ND)
        found = (
            _sums(F.linear(x_ND, weight_VD[rows]), labels_N - (part.first_token + rows.start), fused)
            for rows in _cuts(len(weight_VD), -(-len(weight_VD) // pieces))
        )
        sums = _of_all_parts(reduce(_together, found), part)
        ctx.save_for_backward(x_ND, labels_N, sums[0], sums[1])
        # The parameter itself: under recomputation a saved one comes back as another.
        ctx.weight, ctx.pieces, ctx.part, ctx.fused = weight_VD, pieces, part, fused
        return _loss(sums, labels_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x_ND, labels_N, largest_N, total_N), weight_VD = ctx.saved_tensors, ctx.weight
        scale_N = _scale(grads[0], labels_N)
        with torch.no_grad():
            grad_x = torch.zeros_like(x_ND, dtype=torch.float32)
            grad_weight = torch.empty_like(weight_VD)
            for rows in _cuts(len(weight_VD), -(-len(weight_VD) // ctx.pieces)):
                logits_NV = F.linear(x_ND, weight_VD[rows])
                local_N = labels_N - (ctx.part.first_token + rows.start)
                _to_gradient(logits_NV, local_N, largest_N, total_N, scale_N, ctx.fused)
                grad_x += logits_NV @ weight_VD[rows]
                torch.mm(logits_NV.T, x_ND, out=grad_weight[rows])
        return grad_x.to(x_ND.dtype), grad_weight, None, None, None, None


Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of each token, fp32 (N,): the largest logit, the sum of exponentials of what the logits are above it, and the label's
logit, or 0 in a part that does not have it."""


def _together(a: Sums, b: Sums) -> Sums:
    largest = torch.maximum(a[0], b[0])
    return largest, a[1] * (a[0] - largest).exp() + b[1] * (b[0] - largest).exp(), a[2] + b[2]


def _of_all_parts(sums: Sums, part: VocabularyShard) -> Sums:
    if part is WHOLE_VOCABULARY:
        return sums
    largest = part.maximum(sums[0])
    total, target = part.total(torch.stack((sums[1] * (sums[0] - largest).exp(), sums[2])))
    return largest, total, target


def _loss(sums: Sums, labels_N: torch.Tensor) -> torch.Tensor:
    largest, total, target = sums
    return ((total.log() - (target - largest)) * (labels_N != IGNORED)).sum() / labels_N.numel()


def _scale(grad: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return grad.float() / labels_N.numel() * (labels_N != IGNORED)


def _cuts(whole: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, whole)) for start in range(0, whole, length))


def _row_cuts(logits_NV: torch.Tensor) -> Iterator[slice]:
    return _cuts(len(logits_NV), max(_CHUNK.get(logits_NV.device.type, 2**26) // logits_NV.shape[1], 1))


# ---- the kernels; labels count from the first token of the part, and those of other parts lie outside it ----


def _sums(logits_NV: torch.Tensor, local_N: torch.Tensor, fused: bool) -> Sums:
    if fused:
        return compiled(_row_sums)(logits_NV, local_N)
    found = [_row_sums(logits_NV[rows], local_N[rows]) for rows in _row_cuts(logits_NV)]
    largest, total, target = (torch.cat(values) for values in zip(*found, strict=True))
    return largest, total, target


def _row_sums(logits_NV: torch.Tensor, local_N: torch.Tensor) -> Sums:
    here_N = (local_N >= 0) & (local_N < logits_NV.shape[1])
    target_N = logits_NV.gather(1, local_N.where(here_N, 0).unsqueeze(1)).squeeze(1).float() * here_N
    logits_NV = logits_NV.float()
    largest_N = logits_NV.amax(1)
    return largest_N, (logits_NV - largest_N.unsqueeze(1)).exp().sum(1), target_N


def _to_gradient(
    logits_NV: torch.Tensor,
    local_N: torch.Tensor,
    largest_N: torch.Tensor,
    total_N: torch.Tensor,
    scale_N: torch.Tensor,
    fused: bool,
) -> None:
    """Put (softmax - one-hot) * scale in the place of the logits."""
    if fused:
        compiled(_overwrite)(logits_NV, local_N, largest_N, total_N, scale_N)
        return
    for rows in _row_cuts(logits_NV):
        logits, local, scale = logits_NV[rows], local_N[rows], scale_N[rows, None]
        in_fp32 = logits if logits.dtype == torch.float32 else logits.float()
        in_fp32.sub_(largest_N[rows, None]).exp_().mul_(scale / total_N[rows, None])
        here = ((local >= 0) & (local < logits.shape[1])).unsqueeze(1)
        in_fp32.scatter_add_(1, local.unsqueeze(1).where(here, 0), -scale * here)
        if in_fp32 is not logits:
            logits.copy_(in_fp32)


def _overwrite(
    logits_NV: torch.Tensor,
    local_N: torch.Tensor,
    largest_N: torch.Tensor,
    total_N: torch.Tensor,
    scale_N: torch.Tensor,
) -> None:
    # Compared and not scattered, so that it is one kernel.
    is_label_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == local_N.unsqueeze(1)
    softmax_NV = (logits_NV.float() - largest_N.unsqueeze(1)).exp() / total_N.unsqueeze(1)
    logits_NV.copy_((softmax_NV - is_label_NV.float()) * scale_N.unsqueeze(1))
