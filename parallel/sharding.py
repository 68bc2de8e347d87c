"""The table of how tensor parallelism cuts each parameter, and the record of a parameter that follows from it.

The parallel layers, the gradient reduction, the gradient norm and the checkpoints all read this table; nothing else
knows how a weight is cut.
"""

import re
from dataclasses import dataclass
from enum import Enum

import torch

from model.config import ModelConfig
from model.problems import either, nearest


class Cut(Enum):
    """The cuts of a parameter over the tensor-parallel ranks; each value names what of it is divided."""

    COLUMNS = "its output features"
    """Each rank computes some of the outputs: dimension 0 of a linear's weight."""
    KV_HEADS = "its key/value heads, each on every rank whose query heads read it"
    """Each rank computes some key/value heads; with fewer heads than ranks, neighbouring ranks hold the same head."""
    ROWS = "its input features"
    """Each rank computes a part of every sum: dimension 1 of a linear's weight."""
    VOCABULARY = "its rows, a token each"
    """Each rank holds some rows of dimension 0, the last rank fewer where the vocabulary does not divide, unpadded."""
    WHOLE = "not at all"
    """Every rank holds all of it."""


TABLE: dict[str, Cut] = {
    r"embedding\.tokens\.weight": Cut.VOCABULARY,
    r"blocks\.\d+\.attention\.qkv\.q_proj\.weight": Cut.COLUMNS,
    r"blocks\.\d+\.attention\.qkv\.[kv]_proj\.weight": Cut.KV_HEADS,
    r"blocks\.\d+\.attention\.o_proj\.weight": Cut.ROWS,
    r"blocks\.\d+\.ffn\.gate_up\.(gate|up)_proj\.weight": Cut.COLUMNS,
    r"blocks\.\d+\.ffn\.down_proj\.weight": Cut.ROWS,
    r"blocks\.\d+\.(attention|ffn)_norm\.weight": Cut.WHOLE,
    r"head\.norm\.weight": Cut.WHOLE,
    r"head\.proj\.weight": Cut.VOCABULARY,
}


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that one tensor-parallel rank holds.

    Attributes:
        dim: the dimension that is cut; 0 where none is.
        start, stop: the half-open range of that dimension.
        copies: the number of neighbouring ranks that hold this same part.
    """

    dim: int
    start: int
    stop: int
    copies: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this part of the whole parameter, as a view."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def counts(self, tp_rank: int) -> bool:
        """Return whether this rank is the one that counts the part in a norm or a sum, of those that hold it."""
        return tp_rank % self.copies == 0


@dataclass(frozen=True)
class ParameterInfo:
    """The record of a parameter: what the optimizer, the gradient norm and a checkpoint need besides its values.

    Attributes:
        name: the full name in the whole model, such as ``blocks.3.attention.o_proj.weight``.
        shape: the shape of the whole parameter.
        shard: the part of it that this rank holds.
        shared_by: the number of neighbouring tensor-parallel ranks, this one included, that hold the same part and have
            to agree on its gradient; 1 for a part of one rank alone.
        summed: whether each of these ranks computes a part of the gradient (from its own query heads, or its own
            tokens), so that the parts are summed; else each computes all of it, and their mean keeps the ranks equal.
        counted: whether the gradient enters the norm on this rank: one of the ranks that share it counts it.
        decays: whether weight decay acts on it: on matrices, not on norm weights.
    """

    name: str
    shape: torch.Size
    shard: Shard
    shared_by: int
    summed: bool
    counted: bool
    decays: bool


def cut_of(name: str) -> Cut:
    """Look up a parameter's full name, such as ``blocks.3.attention.o_proj.weight``, in the table.

    Raises:
        KeyError: no row matches; a parameter was added to the model and not to the table.
    """
    for pattern, cut in TABLE.items():
        if re.fullmatch(pattern, name):
            return cut
    raise KeyError(f"{name}: parallel/sharding.py has no row for this parameter")


def shard(name: str, shape: torch.Size, model: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Return the part of the parameter `name`, of full `shape`, that rank `tp_rank` of `tp` holds.

    `problems` is empty for this model and `tp`, so that the sizes divide.
    """
    cut = cut_of(name)
    if cut is Cut.WHOLE:
        return Shard(0, 0, shape[0], tp)
    if cut is Cut.VOCABULARY:
        return vocabulary_shard(model, tp, tp_rank)
    if cut is Cut.KV_HEADS and (copies := kv_copies(model, tp)) > 1:
        head = tp_rank // copies
        return Shard(0, head * model.d_head, (head + 1) * model.d_head, copies)
    dim = 1 if cut is Cut.ROWS else 0
    size = shape[dim] // tp
    return Shard(dim, tp_rank * size, (tp_rank + 1) * size, 1)


def parameter_info(
    name: str, shape: torch.Size, model: ModelConfig, tp: int, tp_rank: int, sequence_parallel: bool
) -> ParameterInfo:
    """Return the record of the parameter `name`, of full `shape`, on rank `tp_rank` of `tp`."""
    part = shard(name, shape, model, tp, tp_rank)
    # Ranks that share key/value heads compute their gradients from different query heads; those that share a norm
    # weight, from different tokens, if the sequence is cut.
    summed = cut_of(name) is not Cut.WHOLE or sequence_parallel
    return ParameterInfo(name, shape, part, part.copies, summed, part.counts(tp_rank), decays=len(shape) > 1)


def vocabulary_shard(model: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Return the range of tokens whose embeddings, head rows and logits a rank holds."""
    rows = -(-model.vocab_size // tp)
    return Shard(0, min(tp_rank * rows, model.vocab_size), min((tp_rank + 1) * rows, model.vocab_size), 1)


def kv_copies(model: ModelConfig, tp: int) -> int:
    """Return how many neighbouring ranks hold the same key/value head: 1 unless there are fewer heads than ranks."""
    return max(1, tp // model.n_kv_heads)


def assemble(name: str, parts: list[torch.Tensor], shape: torch.Size, model: ModelConfig) -> torch.Tensor:
    """Assemble a whole parameter from the tensor-parallel ranks' parts, in rank order: the inverse of `shard`."""
    whole = parts[0].new_empty(shape)
    for tp_rank, part in enumerate(parts):
        shard(name, shape, model, len(parts), tp_rank).of(whole).copy_(part)
    return whole


def problems(model: ModelConfig, tp: int) -> list[str]:
    """Return why this model cannot be cut over `tp` ranks, one sentence each with key, value and what would work."""
    if tp < 1:
        return [f"parallel.tp={tp}: must be at least 1"]
    works = [n for n in range(1, tp + 64) if not _obstacles(model, n)]
    hint = either("parallel.tp", nearest(works, tp))
    return [f"parallel.tp={tp}: {obstacle}; {hint} would work" for obstacle in _obstacles(model, tp)]


def _obstacles(model: ModelConfig, tp: int) -> list[str]:
    found = []
    if model.n_heads % tp:
        found.append(f"does not divide the query heads, model.n_heads={model.n_heads}")
    elif model.n_kv_heads % tp and tp % model.n_kv_heads:
        found.append(f"neither divides nor is a multiple of the key/value heads, model.n_kv_heads={model.n_kv_heads}")
    if model.d_ff % tp:
        found.append(f"does not divide the feed-forward width, model.d_ff={model.d_ff}")
    if (tp - 1) * -(-model.vocab_size // tp) >= model.vocab_size:
        found.append(f"leaves ranks without a row of the vocabulary, model.vocab_size={model.vocab_size}")
    return found
