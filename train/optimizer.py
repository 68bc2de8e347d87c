"""AdamW as the paper runs it (arXiv 2401.02954, section 2.3)."""

from collections.abc import Sequence

import torch

from conf.train_settings import OptimizerConfig


def adamw(
    matrices: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor], settings: OptimizerConfig
) -> torch.optim.AdamW:
    """Make PyTorch's fused AdamW (GPU and CPU), with weight decay on matrices and none on norm weights.

    Args:
        matrices: parameters with weight decay, in any shape: `parallel/zero.py` keeps them flat.
        vectors: parameters without.
        settings: rates and decay.
    """
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],  # a stage with the embedding alone has no norm
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
