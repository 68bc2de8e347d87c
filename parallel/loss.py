"""The loss of the last stage, whose vocabulary may be cut over tensor-parallel ranks, and into pieces on each rank."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from model.loss import WHOLE_VOCABULARY, SummedLoss, VocabularyShard, cross_entropy, head_loss, label_scores
from model.transformer import Head
from parallel.heartbeat import heart
from parallel.tensor import TensorParallel, whole_sequence

Forward = Callable[[torch.Tensor], torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], SummedLoss]
"""A function from the last stage's output and the labels, int64 (B, L), to the summed loss."""
Scores = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""A function from the last stage's output and int64 (2, N) to what `model.loss.label_scores` returns. The first row has
positions, counted over the B sequences of L tokens one after another, and the second the tokens that may follow them.
"""


def _vocabulary_shard(first_token: int, tp: TensorParallel) -> VocabularyShard:
    """Return a rank's part of the vocabulary. Logits are never gathered: three numbers per token are all-reduced."""
    if tp.size == 1:
        return WHOLE_VOCABULARY

    def over(op: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduced(values: torch.Tensor) -> torch.Tensor:
            values = values.clone()
            with heart.in_collective:
                dist.all_reduce(values, op=op, group=tp.group)
            return values

        return reduced

    return VocabularyShard(first_token, over(dist.ReduceOp.MAX), over(dist.ReduceOp.SUM))


def head_and_loss(head: Head, pieces: int, first_token: int, tp: TensorParallel) -> tuple[Forward, Loss]:
    """Return the forward function of the last stage's norm, and the loss, the same on every tensor-parallel rank.

    The norm's output (B, L/tp or L, D) is that of the stage; the loss projects it to the vocabulary. For more than one
    piece, the gradient of the head's weight is computed with that of its input, even where other layers defer theirs.

    Args:
        head: this rank's part of the head.
        pieces: the number of pieces of the logits, of which one is in memory at a time; see `model.loss.head_loss`.
        first_token: the first token of this rank's part of the vocabulary.
        tp: the ranks that share the head.
    """
    kernels, shard = head.norm.kernels, _vocabulary_shard(first_token, tp)

    def whole(x_BlD: torch.Tensor, labels_BL: torch.Tensor) -> SummedLoss:
        return cross_entropy(head.proj(x_BlD), labels_BL, shard, kernels)

    def in_pieces(x_BlD: torch.Tensor, labels_BL: torch.Tensor) -> SummedLoss:
        return head_loss(whole_sequence(x_BlD, tp), head.proj.weight, labels_BL, pieces, shard, kernels)

    return partial(head, project=False), whole if pieces == 1 else in_pieces


def head_scores(head: Head, first_token: int, tp: TensorParallel) -> Scores:
    """Return the scores of labels by the output of the function that `head_and_loss` returns for the same head."""
    shard = _vocabulary_shard(first_token, tp)

    def scores(x_BlD: torch.Tensor, asked_2N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions_N, labels_N = asked_2N
        x_ND = whole_sequence(x_BlD, tp).flatten(0, 1)[positions_N]
        return label_scores(x_ND, head.proj.weight, labels_N, shard)

    return scores
