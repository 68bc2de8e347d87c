"""Next-token cross-entropy."""

import torch
import torch.nn.functional as F

IGNORED = -100
"""A label that is not predicted."""


def cross_entropy(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Sum of the token losses, in nats and fp32, over the number of labels, ignored ones included.

    With no label ignored (training on packed sequences) that is the mean. The denominator never varies, so the mean
    over micro-batches and ranks is exact too: an evaluation whose last batch is filled up with ignored labels divides
    by the real share of them at the end.
    """
    loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss / labels_BL.numel()
