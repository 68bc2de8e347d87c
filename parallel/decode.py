"""Text from a model that no rank holds whole: each keeps the keys and values of its own stage's heads.

A token costs one hop of (B, 1, D) between neighbouring stages, and its logits go back to all ranks, where every one
makes the same draw from them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.generate import Decoder, through
from model.transformer import layer_builders
from model.weights import Weights
from parallel.layout import Layout
from parallel.schedules import Placement
from parallel.sharding import vocabulary_shard
from parallel.stages import split
from parallel.tensor import TensorParallel, build_layer, whole_sequences

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


@dataclass(frozen=True)
class Line:
    """The ranks that hold the stages of one copy of a model, or of one tensor-parallel part of it.

    Attributes:
        group: the process group of those ranks; None for one.
        ranks: global, by place.
        rank: this process's place.
        place: who holds which stage.
    """

    group: Any
    ranks: Sequence[int]
    rank: int
    place: Placement


class StageDecoder(Decoder):
    """`model.generate.Decoder` on the ranks of a pipeline, which call it together and all get the same logits.

    Args:
        stages: the layers of each stage of this rank, as `parallel.tensor.build_layer` made them.
        config: of the whole model.
        prompts: the same on every rank.
        room: tokens that a sequence may grow to; at most the context.
        line: the ranks.
        tp: the ranks that share this stage's matrices, without sequence parallelism: one token cannot be cut.
    """

    def __init__(
        self,
        stages: Mapping[int, Sequence[nn.Module]],
        config: ModelConfig,
        prompts: Sequence[Sequence[int]],
        room: int,
        line: Line,
        tp: TensorParallel,
    ):
        super().__init__([layer for layers in stages.values() for layer in layers], prompts, room)
        self._config, self._line, self._tp = config, line, tp
        layers = iter(self._layers)
        self._stages = {stage: list(islice(layers, len(own))) for stage, own in sorted(stages.items())}
        self._dtype = next(self._layers[0][0].parameters()).dtype

    @torch.no_grad()
    def _run(self, tokens_BL: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        line, place = self._line, self._line.place
        last = place.num_stages - 1
        x, logits_BV = tokens_BL, None
        for stage, layers in self._stages.items():
            if stage and (before := place.rank_of(stage - 1)) != line.rank:
                x = torch.empty(*tokens_BL.shape, self._config.d_model, dtype=self._dtype, device=tokens_BL.device)
                dist.recv(x, line.ranks[before], group=line.group)
            x = through(layers, x, last_B)
            if stage == last:
                logits_BV = _all_columns(x.float(), self._config, self._tp)
            elif (after := place.rank_of(stage + 1)) != line.rank:
                dist.send(x.contiguous(), line.ranks[after], group=line.group)
        if logits_BV is None:
            logits_BV = torch.empty(len(tokens_BL), self._config.vocab_size, device=tokens_BL.device)
        if len(line.ranks) > 1:
            dist.broadcast(logits_BV, src=line.ranks[place.rank_of(last)], group=line.group)
        return logits_BV


@contextmanager
def engine_decoder(
    engine: "PipelineEngine", model: ModelConfig, prompts: Sequence[Sequence[int]], room: int
) -> Iterator[StageDecoder]:
    """A decoder over the layers that an engine trains, as they are now. All ranks enter and leave it together.

    Args:
        engine: of this rank's stage.
        model: the whole model's shape.
        prompts: token ids, the same on every rank.
        room: tokens that a sequence may grow to; at most the context.
    """
    ranks = [engine.grid.stage_to_global(stage) for stage in range(engine.num_stages)]
    line = Line(engine.grid.get_pipe_parallel_group(), ranks, engine.stage_id, engine.pipeline.place)
    # Not the functions that training runs: those may recompute.
    layers = (layer for name, layer in engine.module.named_children() if name.isdigit())
    stages = {stage: list(islice(layers, len(functions))) for stage, functions in engine.module.stages.items()}
    with whole_sequences(engine.module):
        yield StageDecoder(stages, model, prompts, room, line, engine.module.tp)


def load_stage(
    weights: Weights, layout: Layout, device: torch.device, dtype: torch.dtype
) -> tuple[dict[int, list[nn.Module]], Line, TensorParallel]:
    """This rank's part of trained weights, read one tensor at a time. All ranks call it together.

    Args:
        weights: of the whole model.
        layout: one replica without sequence parallelism, on as many processes as have been started; for one, no process
            group is needed.
        device: to hold the layers.
        dtype: of the layers.

    Returns:
        The layers of its stage, and the groups of ranks that a `StageDecoder` of them wants.
    """
    config = weights.config
    rank = dist.get_rank() if layout.world_size > 1 else 0
    shared = _own([range(s * layout.tp, (s + 1) * layout.tp) for s in range(layout.pp)], rank)
    lined_up = _own([range(t, layout.world_size, layout.tp) for t in range(layout.tp)], rank)
    tp = TensorParallel(shared[0], layout.tp_rank(rank), layout.tp, sequence_parallel=False, sharing={})
    line = Line(lined_up[0], lined_up[1], layout.stage(rank), Placement(layout.pp))
    stage = split(config.layer_flops(config.max_seq_len), layout.pp)[line.rank]
    layers = [
        build_layer(build, f"{name}.", config, tp, device, lambda name, shape: weights.read(name)).to(dtype)
        for name, build in list(layer_builders(config).items())[stage.start : stage.stop]
    ]
    return {line.rank: layers}, line, tp


def _own(sets: Sequence[Sequence[int]], rank: int) -> tuple[Any, Sequence[int]]:
    """A process group, None for one rank, of the set of ranks that this one is in; every rank makes every group."""
    groups = [dist.new_group(list(ranks)) if len(ranks) > 1 else None for ranks in sets]
    index = next(index for index, ranks in enumerate(sets) if rank in ranks)
    return groups[index], sets[index]


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
