"""One forward pass through all stages, outside of training: for text sampled from a model that no rank holds whole."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.config import ModelConfig
from parallel.sharding import vocabulary_shard
from parallel.tensor import TensorParallel

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


@torch.no_grad()
def next_token_logits(
    engine: "PipelineEngine", model: ModelConfig, tokens_BL: torch.Tensor, lengths_B: torch.Tensor
) -> torch.Tensor:
    """Logits of the token after each sequence, on every rank. All ranks call it together with the same arguments.

    Args:
        engine: of this rank's stage.
        model: the whole model's shape.
        tokens_BL: int64 (B, L) on the engine's device; what stands at and after a sequence's length is never looked at,
            since attention is causal.
        lengths_B: int64 (B,), the real length of each sequence, at least 1.

    Returns:
        fp32 (B, V).
    """
    from deepspeed.runtime.pipe import p2p

    engine.module.eval()
    tp = engine.module.tp
    if tp.sequence_parallel:  # the sequence is cut evenly; what is added is never looked at
        tokens_BL = F.pad(tokens_BL, (0, -tokens_BL.shape[1] % tp.size))
    B, L = tokens_BL.shape
    if engine.is_first_stage():
        x = tokens_BL
    else:
        dtype = next(engine.module.parameters()).dtype
        own_L = L // tp.size if tp.sequence_parallel else L
        x = torch.empty(B, own_L, model.d_model, dtype=dtype, device=tokens_BL.device)
        p2p.recv(x, engine.stage_id - 1)
    for layer in engine.module.forward_funcs:
        x = layer(x)
    if engine.is_last_stage():
        logits_BV = _all_columns(x[torch.arange(B, device=x.device), lengths_B - 1].float(), model, tp)
    else:
        p2p.send(x.contiguous(), engine.stage_id + 1)
        logits_BV = torch.empty(B, model.vocab_size, device=tokens_BL.device)
    if engine.num_stages > 1:
        last_rank = engine.grid.stage_to_global(engine.num_stages - 1)
        dist.broadcast(logits_BV, src=last_rank, group=engine.grid.get_pipe_parallel_group())
    return logits_BV


def _all_columns(logits_BV: torch.Tensor, model: ModelConfig, tp: TensorParallel) -> torch.Tensor:
    """(B, V/tp) of each tensor-parallel rank to (B, V) on all."""
    if tp.size == 1:
        return logits_BV.contiguous()
    shards = [vocabulary_shard(model, tp.size, rank) for rank in range(tp.size)]
    widths = [shard.stop - shard.start for shard in shards]
    own = F.pad(logits_BV, (0, max(widths) - logits_BV.shape[1])).contiguous()  # parts that travel are of one size
    parts = [torch.empty_like(own) for _ in range(tp.size)]
    dist.all_gather(parts, own, group=tp.group)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
