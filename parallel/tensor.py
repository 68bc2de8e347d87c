"""Tensor- and sequence-parallel layers, and the function that swaps them in for the modules of a plain layer.

The cut is Megatron-LM's (arXiv 1909.08053, sequence parallelism arXiv 2205.05198). In a block, with the latter:

    x (B, L/tp, D)  norm  ->  all-gather  ->  q,k,v or gate,up: some columns each   (B, L, F/tp)
                              attention or silu, per rank on its own heads or columns
                              o or down: some rows each, partial sums (B, L, D)  ->  reduce-scatter  ->  (B, L/tp, D)

Without sequence parallelism there is no all-gather, and an all-reduce takes the place of the reduce-scatter. In the
backward pass the two swap roles. A model without dropout needs no random state in common between ranks.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

# The functions of this module take the default group at import as a default argument, and PyTorch imports it when a
# layer is built: a group referenced like that is never destroyed, and its threads may abort a process that ends.
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.layers import FusedLinears
from parallel.deferral import (
    DeferredGradients,
    DeferringFusedLinears,
    DeferringLinear,
    input_gradient,
    linear,
    saved_input,
)
from parallel.heartbeat import heart
from parallel.sharding import Cut, cut_of, shard


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share every matrix of a stage.

    Attributes:
        group: the process group of those ranks.
        rank: the rank of this process in the group.
        size: the number of these ranks.
        sequence_parallel: whether norms and residuals between the matrices are cut along the sequence.
        sharing: the group of the neighbouring ranks that hold the same parameter, by how many they are.
    """

    group: Any
    rank: int
    size: int
    sequence_parallel: bool
    sharing: Mapping[int, Any]


# ---- collectives along the sequence, dimension 1 of (B, L, D) ----


def _start_gather(x_BlD: torch.Tensor, tp: TensorParallel) -> tuple[torch.Tensor, Any]:
    """Start gathering (B, L/tp, D) to (tp * B, L/tp, D), which `_gathered` reshapes to (B, L, D) on arrival."""
    out = x_BlD.new_empty(tp.size * x_BlD.shape[0], *x_BlD.shape[1:])
    handle = dist.all_gather_into_tensor(out, x_BlD.contiguous(), group=tp.group, async_op=True)
    return out, handle


def _gathered(out: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    return out.unflatten(0, (tp.size, -1)).movedim(0, 1).flatten(1, 2)  # no copy for a micro-batch of one sequence


def _gather(x_BlD: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    out, handle = _start_gather(x_BlD, tp)
    with heart.in_collective:
        handle.wait()
    return _gathered(out, tp)


def _start_reduce_scatter(x_BLD: torch.Tensor, tp: TensorParallel) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Start summing over the ranks, each of which gets its part of the sequence."""
    parts = x_BLD.unflatten(1, (tp.size, -1)).movedim(1, 0).flatten(0, 1).contiguous()
    out = torch.empty_like(parts[: x_BLD.shape[0]])
    # The input is returned: it must live until the handle has been waited for.
    return out, dist.reduce_scatter_tensor(out, parts, group=tp.group, async_op=True), parts


def _reduce(x_BLD: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Sum partial sums over the ranks; return this rank's part of the sequence, or all of it."""
    if tp.sequence_parallel:
        out, handle, _ = _start_reduce_scatter(x_BLD, tp)
        with heart.in_collective:
            handle.wait()
        return out
    out = x_BLD.clone()  # the input may be saved by selective recomputation, and must not change under it
    with heart.in_collective:
        dist.all_reduce(out, group=tp.group)
    return out


class _ReducePartialSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        ctx.tp = tp
        return _reduce(x_BLD, tp)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _gather(grads[0], ctx.tp) if ctx.tp.sequence_parallel else grads[0], None


class _WholeSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
        ctx.tp = tp
        return _gather(x, tp) if tp.sequence_parallel else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _reduce(grads[0], ctx.tp), None


def whole_sequence(x_BlD: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    """Gather (B, L/tp or L, D) to (B, L, D), of which each rank uses a part: gradients are summed over the ranks."""
    return _WholeSequence.apply(x_BlD, tp) if tp.size > 1 else x_BlD


class _ColumnParallel(torch.autograd.Function):
    """y_i = gather(x) W_i^T for several W_i at once.

    In the backward pass, the gradient of the input is reduced while the gradients of the weights are computed, and the
    input, whose gathered form is not saved, is gathered again while its gradient is computed. Where gradients of
    weights are deferred, so is that gather.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, tp: TensorParallel, deferred: DeferredGradients, *weights: nn.Parameter
    ) -> tuple[torch.Tensor, ...]:
        ctx.tp, ctx.deferred, ctx.weights = tp, deferred, weights
        ctx.save_for_backward(x)
        whole = _gather(x, tp) if tp.sequence_parallel else x
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x = saved_input(ctx)
        tp, weights = ctx.tp, ctx.weights
        gather = None
        if tp.sequence_parallel and not ctx.deferred.active:
            gathering, gather = _start_gather(x, tp)
        grad_x = input_gradient(grads, weights)
        if gather:
            with heart.in_collective:
                gather.wait()
            x = _gathered(gathering, tp)
            del gathering  # a micro-batch of several sequences has been copied from it
        if tp.sequence_parallel:
            grad_x, reduction, _alive = _start_reduce_scatter(grad_x, tp)
        else:
            reduction = dist.all_reduce(grad_x, group=tp.group, async_op=True)

        def whole_input() -> torch.Tensor:
            return x if gather or not tp.sequence_parallel else _gather(x, tp)

        gradients = ctx.deferred.gradients(weights, grads, whole_input)
        with heart.in_collective:
            reduction.wait()
        return grad_x, None, None, *gradients


# ---- layers; their parameters have the names of the plain layers' ----


class ColumnParallelFusedLinears(nn.Module):
    """A `FusedLinears` with some output features of each linear layer on each rank."""

    def __init__(self, plain: FusedLinears, tp: TensorParallel, deferred: DeferredGradients):
        super().__init__()
        self.tp, self.deferred = tp, deferred
        for name, one in plain.named_children():
            self.add_module(name, one)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map (B, L/tp or L, d_in) to one (B, L, width/tp) per linear layer."""
        return _ColumnParallel.apply(x, self.tp, self.deferred, *self.parameters())


class ColumnParallelLinear(nn.Module):
    """A linear layer with some of its output features on each rank: the output head, by vocabulary."""

    def __init__(self, plain: nn.Linear, tp: TensorParallel, deferred: DeferredGradients):
        super().__init__()
        self.weight, self.tp, self.deferred = nn.Parameter(plain.weight), tp, deferred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L/tp or L, d_in) to (B, L, d_out/tp)."""
        return _ColumnParallel.apply(x, self.tp, self.deferred, self.weight)[0]


class RowParallelLinear(nn.Module):
    """A linear layer with some of its input features on each rank."""

    def __init__(self, plain: nn.Linear, tp: TensorParallel, deferred: DeferredGradients):
        super().__init__()
        self.weight, self.tp, self.deferred = nn.Parameter(plain.weight), tp, deferred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L, d_in/tp) to (B, L/tp or L, d_out)."""
        return _ReducePartialSums.apply(linear(x, self.weight, self.deferred), self.tp)


class VocabParallelEmbedding(nn.Module):
    """An embedding with the rows of some tokens on each rank; the others contribute zeros to a sum over the ranks."""

    def __init__(self, plain: nn.Embedding, first_token: int, tp: TensorParallel):
        super().__init__()
        self.weight, self.first_token, self.tp = nn.Parameter(plain.weight), first_token, tp

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Map int64 (B, L) to (B, L/tp or L, D)."""
        local = tokens_BL - self.first_token
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        x_BLD = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return _ReducePartialSums.apply(x_BLD.masked_fill(elsewhere.unsqueeze(-1), 0), self.tp)


def swap(
    layer: nn.Module, prefix: str, model: ModelConfig, tp: TensorParallel, deferred: DeferredGradients
) -> nn.Module:
    """Replace the modules of a plain layer by ones that are cut by the table and can defer their weight gradients.

    Args:
        layer: the layer, on the meta device.
        prefix: the prefix of the full names of its parameters, ``"blocks.3."``.
        model: the whole model's shape.
        tp: the ranks to cut over; for one, only the computation of weight gradients differs from the plain layer.
        deferred: the weight gradients that are deferred, shared by all layers of the rank.
    """
    if tp.size > 1:
        _swap_linears(layer, prefix, model, tp, deferred)
        return layer
    for name, module in list(layer.named_modules()):
        if isinstance(module, FusedLinears):
            _replace(layer, name, DeferringFusedLinears(module, deferred))
        elif isinstance(module, nn.Linear) and not isinstance(_parent(layer, name), DeferringFusedLinears):
            _replace(layer, name, DeferringLinear(module, deferred))
    return layer


def _swap_linears(
    layer: nn.Module, prefix: str, model: ModelConfig, tp: TensorParallel, deferred: DeferredGradients
) -> None:
    for name, module in list(layer.named_modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        full_name = f"{prefix}{name}.weight"
        part = shard(full_name, weight.shape, model, tp.size, tp.rank)
        module.weight = nn.Parameter(part.of(weight.data).clone())
        cut = cut_of(full_name)
        if isinstance(module, nn.Embedding):
            _replace(layer, name, VocabParallelEmbedding(module, part.start, tp))
        elif isinstance(module, nn.Linear) and cut is Cut.ROWS:
            _replace(layer, name, RowParallelLinear(module, tp, deferred))
        elif isinstance(module, nn.Linear) and cut is Cut.VOCABULARY:
            _replace(layer, name, ColumnParallelLinear(module, tp, deferred))
    for name, module in list(layer.named_modules()):
        if isinstance(module, FusedLinears):
            _replace(layer, name, ColumnParallelFusedLinears(module, tp, deferred))


def _parent(layer: nn.Module, name: str) -> nn.Module:
    return layer.get_submodule(name.rpartition(".")[0])


def _replace(layer: nn.Module, name: str, module: nn.Module) -> None:
    setattr(_parent(layer, name), name.rpartition(".")[2], module)


@contextmanager
def whole_sequences(layers_of_rank: Iterable[nn.Module]) -> Iterator[None]:
    """Turn sequence parallelism off for these layers inside this context."""
    layers: list[Any] = [module for layer in layers_of_rank for module in layer.modules()]
    cut = [(layer, layer.tp) for layer in layers if isinstance(getattr(layer, "tp", None), TensorParallel)]
    for layer, tp in cut:
        layer.tp = replace(tp, sequence_parallel=False)
    try:
        yield
    finally:
        for layer, tp in cut:
            layer.tp = tp
