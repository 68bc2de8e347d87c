"""Next-token cross-entropy in place: the logits are the only tensor of their size (arXiv 2401.02954, section 2.4).

The logits stay in the precision that they were computed in, are fp32 inside the kernels only, and are overwritten by
their gradient. The vocabulary may be cut into shards, on several ranks or one after another (`head_loss`): a shard
knows its largest logit and the sum of its exponentials, and those of all shards give those of the whole vocabulary.

Compiled for a GPU, the statistics are one kernel and the label's logit another, which reads one value a token; the
gradient is one kernel. `tests/model/test_lowered.py` holds that for an H100.

N tokens (B x L), V vocabulary or a shard of it, D width.
"""

import math
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
"""Logits that are fp32 at a time where no kernel converts them: they fit a CPU's cache, and fill a GPU."""

_LOGITS = 2**26
"""Logits that are made at a time where they have no gradient: 128 MiB in bf16."""


def _alone(values_N: torch.Tensor) -> torch.Tensor:
    return values_N


@dataclass(frozen=True)
class VocabularyShard:
    """Where a shard of the vocabulary begins, and how its statistics are combined with those of the others.

    Attributes:
        first_token: the id of its first token.
        maximum, total: reduce (N,) fp32 over all ranks that hold shards.
    """

    first_token: int = 0
    maximum: Callable[[torch.Tensor], torch.Tensor] = _alone
    total: Callable[[torch.Tensor], torch.Tensor] = _alone


WHOLE_VOCABULARY = VocabularyShard()


@dataclass(frozen=True)
class SummedLoss:
    """The loss of some tokens as a sum and a count, of which the mean over any set of micro-batches can be made.

    Attributes:
        total: fp64 scalar, nats summed over the labels that are not ignored; has a gradient.
        count: int64 scalar, the number of those labels.
    """

    total: torch.Tensor
    count: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Nats per label, fp64; nan where no label counts."""
        return self.total / self.count


def cross_entropy(
    logits_BLV: torch.Tensor,
    labels_BL: torch.Tensor,
    shard: VocabularyShard = WHOLE_VOCABULARY,
    kernels: Kernels = Kernels.auto,
) -> SummedLoss:
    """The cross-entropy of logits and labels.

    Its gradient at a label that counts is (softmax - one-hot) times the gradient of the sum, and 0 at an ignored one.

    Args:
        logits_BLV: (B, L, V), of a shard of the vocabulary or all of it. The backward pass, of which there can be one,
            overwrites them with their gradient.
        labels_BL: int64 (B, L), ids in the whole vocabulary, or `IGNORED`.
        shard: the shard that the logits belong to.
        kernels: see `model/fused.py`.
    """
    total = _CrossEntropy.apply(logits_BLV.flatten(0, 1), labels_BL.flatten(), shard, kernels)
    return SummedLoss(total, _count(labels_BL))


def head_loss(
    x_BLD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_BL: torch.Tensor,
    pieces: int,
    shard: VocabularyShard = WHOLE_VOCABULARY,
    kernels: Kernels = Kernels.auto,
) -> SummedLoss:
    """The `cross_entropy` of the logits ``x W^T``, computed in pieces of the vocabulary, one at a time.

    Instead of B L V logits, B L V / pieces are held, and none between the passes: the backward pass recomputes them,
    which costs a forward pass of the head.

    Args:
        x_BLD: the output of the head's norm.
        weight_VD: the head's weight, of this shard of the vocabulary.
        labels_BL: int64 (B, L), ids in the whole vocabulary, or `IGNORED`.
        pieces: number of pieces that the shard is cut into.
        shard: the shard that the weight belongs to.
        kernels: see `model/fused.py`.
    """
    total = _HeadLoss.apply(x_BLD.flatten(0, 1), weight_VD, labels_BL.flatten(), pieces, shard, kernels)
    return SummedLoss(total, _count(labels_BL))


@torch.no_grad()
def label_scores(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, shard: VocabularyShard = WHOLE_VOCABULARY
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each label by the softmax of the logits ``x W^T``, and whether it is the likeliest token.

    Of several tokens that are equally likely the one with the smallest id counts as the likeliest, as by ``argmax``.
    The logits of at most `_LOGITS` values of a shard are in memory at a time.

    Args:
        x_ND: the output of the head's norm; N is at least 1.
        weight_VD: the head's weight, of this shard of the vocabulary.
        labels_N: int64 (N,), ids in the whole vocabulary, none of them `IGNORED`.
        shard: the shard that the weight belongs to.

    Returns:
        fp32 (N,) in nats, and bool (N,), which no token is where logits are no numbers.
    """
    found = [
        (*_sums(logits_NV, labels_N[rows] - shard.first_token, fused=False), logits_NV.argmax(1))
        for rows in _cuts(len(x_ND), max(_LOGITS // len(weight_VD), 1))
        for logits_NV in [F.linear(x_ND[rows], weight_VD)]
    ]
    own_largest_N, total_N, target_N, own_likeliest_N = (torch.cat(values) for values in zip(*found, strict=True))
    largest_N, total_N, target_N = _of_all_shards((own_largest_N, total_N, target_N), shard)
    # The smallest id over the shards as a largest one, in fp32, which has every integer up to 2^24.
    likeliest_N = (own_likeliest_N + shard.first_token).float().masked_fill(own_largest_N < largest_N, math.inf)
    scores_N = target_N - largest_N - total_N.log()
    return scores_N, (-shard.maximum(-likeliest_N) == labels_N) & ~scores_N.isnan()


def _count(labels_BL: torch.Tensor) -> torch.Tensor:
    return (labels_BL != IGNORED).sum()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor, shard: VocabularyShard, kernels: Kernels
    ) -> torch.Tensor:
        fused = runs_compiled(kernels, logits_NV)
        sums = _of_all_shards(_sums(logits_NV, labels_N - shard.first_token, fused), shard)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits_NV, labels_N, sums[0], sums[1])
            ctx.shard, ctx.fused, ctx.spent = shard, fused, False
        return _loss(sums, labels_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        assert not ctx.spent, "the logits have been overwritten by their gradient: one backward pass"
        ctx.spent = True
        logits_NV, labels_N, largest_N, total_N = ctx.saved_tensors
        with torch.no_grad():
            scale_N = _scale(grads[0], labels_N)
            _to_gradient(logits_NV, labels_N - ctx.shard.first_token, largest_N, total_N, scale_N, ctx.fused)
        return logits_NV.detach(), None, None, None  # a deferred gradient of a weight would keep the graph behind it


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        pieces: int,
        shard: VocabularyShard,
        kernels: Kernels,
    ) -> torch.Tensor:
        fused = runs_compiled(kernels, x_ND)
        found = (
            _sums(F.linear(x_ND, weight_VD[rows]), labels_N - (shard.first_token + rows.start), fused)
            for rows in _cuts(len(weight_VD), -(-len(weight_VD) // pieces))
        )
        sums = _of_all_shards(reduce(_together, found), shard)
        ctx.save_for_backward(x_ND, labels_N, sums[0], sums[1])
        # The parameter itself: under recomputation a saved one comes back as another.
        ctx.weight, ctx.pieces, ctx.shard, ctx.fused = weight_VD, pieces, shard, fused
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
                local_N = labels_N - (ctx.shard.first_token + rows.start)
                _to_gradient(logits_NV, local_N, largest_N, total_N, scale_N, ctx.fused)
                grad_x += logits_NV @ weight_VD[rows]
                torch.mm(logits_NV.T, x_ND, out=grad_weight[rows])
                del logits_NV  # or two pieces would be there when the next one is made
        return grad_x.to(x_ND.dtype), grad_weight, None, None, None, None


Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Statistics of each token, fp32 (N,): the largest logit, the sum of exponentials of the logits less the largest, and
the label's logit, or 0 in a shard that does not hold it."""


def _together(a: Sums, b: Sums) -> Sums:
    largest = torch.maximum(a[0], b[0])
    return largest, a[1] * (a[0] - largest).exp() + b[1] * (b[0] - largest).exp(), a[2] + b[2]


def _of_all_shards(sums: Sums, shard: VocabularyShard) -> Sums:
    if shard is WHOLE_VOCABULARY:
        return sums
    largest = shard.maximum(sums[0])
    total, target = shard.total(torch.stack((sums[1] * (sums[0] - largest).exp(), sums[2])))
    return largest, total, target


def _loss(sums: Sums, labels_N: torch.Tensor) -> torch.Tensor:
    largest, total, target = sums
    losses_N = total.log() - (target - largest)
    return losses_N.masked_fill(labels_N == IGNORED, 0).sum(dtype=torch.float64)


def _scale(grad: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return grad.float() * (labels_N != IGNORED)


def _cuts(whole: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, whole)) for start in range(0, whole, length))


def _row_cuts(logits_NV: torch.Tensor) -> Iterator[slice]:
    return _cuts(len(logits_NV), max(_CHUNK.get(logits_NV.device.type, 2**26) // logits_NV.shape[1], 1))


# ---- the kernels; labels count from the first token of the shard, and those of other shards lie outside it ----


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
    """Overwrite the logits with (softmax - one-hot) * scale."""
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
    # A comparison instead of a scatter, so that it is one kernel.
    is_label_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == local_N.unsqueeze(1)
    softmax_NV = (logits_NV.float() - largest_N.unsqueeze(1)).exp() / total_N.unsqueeze(1)
    logits_NV.copy_((softmax_NV - is_label_NV.float()) * scale_N.unsqueeze(1))
