"""AdamW as the paper runs it (arXiv 2401.02954, section 2.3)."""

from collections.abc import Iterable

import torch
from torch import nn

from conf.settings import OptimizerConfig


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW (GPU and CPU), with weight decay on matrices and none on norm weights."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],  # a stage with the embedding alone has no norm
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
