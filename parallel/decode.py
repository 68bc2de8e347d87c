"""Decoding with a model that is cut over ranks, each of which caches the keys and values of its own stage's heads.

A token costs one message of (B, 1, D) between neighbouring stages, and its logits are broadcast to all ranks, each of
which samples the same token from them.
"""

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.generate import Decoder, through
from model.weights import Weights
from parallel.build import RankStages, build_stages
from parallel.groups import Ranks, make_ranks
from parallel.layout import Layout
from parallel.schedules import Placement
from parallel.sharding import kv_copies, vocabulary_shard
from parallel.stages import split
from parallel.tensor import TensorParallel


class StageDecoder(Decoder):
    """A `model.generate.Decoder` on the ranks of a pipeline, which call it together and all get the same logits.

    Args:
        stages: the layers of each stage of this rank, without sequence parallelism: one token cannot be cut.
        config: the shape of the whole model.
        prompts: the token ids of each prompt, the same on every rank.
        room: the most tokens of a sequence, prompt included; at most the model's context.
        ranks: this process and its groups.
    """

    def __init__(
        self,
        stages: Mapping[int, Sequence[nn.Module]],
        config: ModelConfig,
        prompts: Sequence[Sequence[int]],
        room: int,
        ranks: Ranks,
    ):
        self._config, self._ranks = config, ranks
        super().__init__([layer for layers in stages.values() for layer in layers], prompts, room)
        layers = iter(self._layers)
        self._stages = {stage: list(islice(layers, len(own))) for stage, own in sorted(stages.items())}
        self._dtype = next(self._layers[0][0].parameters()).dtype

    def _is_alone(self) -> bool:
        return len(self._ranks.pipeline) == 1 and self._ranks.tensor_parallel.size == 1

    @torch.no_grad()
    def _run(self, tokens_BL: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        ranks, placement = self._ranks, self._ranks.placement
        last = placement.num_stages - 1
        x, logits_BV = tokens_BL, None
        for stage, layers in self._stages.items():
            if stage and (before := placement.rank_of(stage - 1)) != ranks.pp_rank:
                x = torch.empty(*tokens_BL.shape, self._config.d_model, dtype=self._dtype, device=tokens_BL.device)
                dist.recv(x, ranks.pipeline[before], group=ranks.links[before, ranks.pp_rank])
            x = through(layers, x, last_B)
            if stage == last:
                logits_BV = _gather_vocabulary(x.float(), self._config, ranks.tensor_parallel)
            elif (after := placement.rank_of(stage + 1)) != ranks.pp_rank:
                dist.send(x.contiguous(), ranks.pipeline[after], group=ranks.links[ranks.pp_rank, after])
        if logits_BV is None:
            logits_BV = torch.empty(len(tokens_BL), self._config.vocab_size, device=tokens_BL.device)
        if len(ranks.pipeline) > 1:
            dist.broadcast(logits_BV, src=ranks.pipeline[placement.loss_rank], group=ranks.pp)
        return logits_BV


def load_stages(weights: Weights, layout: Layout, device: torch.device, dtype: torch.dtype) -> tuple[RankStages, Ranks]:
    """Load this rank's part of trained weights, one tensor at a time. All ranks call it together.

    Args:
        weights: the weights of the whole model.
        layout: one replica without sequence parallelism, on as many processes as have been started; for one, no process
            group is needed.
        device: the device of the layers.
        dtype: the dtype of the layers.
    """
    config = weights.config
    ranks = make_ranks(layout, Placement(layout.pp), kv_copies(config, layout.tp))
    stage = split(config.layer_flops(config.max_seq_len), layout.pp)[ranks.pp_rank]
    own = {ranks.pp_rank: range(stage.start, stage.stop)}
    built = build_stages(config, own, ranks.tensor_parallel, device, lambda name, shape: weights.read(name))
    for layer in built.in_order():
        layer.module.to(dtype)
    return built, ranks


def load_stage(
    weights: Weights, layout: Layout, device: torch.device, dtype: torch.dtype
) -> tuple[dict[int, list[nn.Module]], Ranks]:
    """Load as `load_stages` does; return this rank's layers by the index of their stage, for a `StageDecoder`."""
    built, ranks = load_stages(weights, layout, device, dtype)
    return built.modules, ranks


def _gather_vocabulary(logits_BV: torch.Tensor, model: ModelConfig, tp: TensorParallel) -> torch.Tensor:
    """Gather (B, V/tp) of each tensor-parallel rank to (B, V) on all of them."""
    if tp.size == 1:
        return logits_BV.contiguous()
    shards = [vocabulary_shard(model, tp.size, rank) for rank in range(tp.size)]
    widths = [shard.stop - shard.start for shard in shards]
    own = F.pad(logits_BV, (0, max(widths) - logits_BV.shape[1])).contiguous()  # an all-gather takes parts of one size
    parts = [torch.empty_like(own) for _ in range(tp.size)]
    dist.all_gather(parts, own, group=tp.group)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
