"""The construction of a rank's layers: one function builds them for training, decoding, benchmarks and dry runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from model.config import ModelConfig
from model.context import Context
from model.init import initial_value
from model.transformer import Block, Head, layer_builders
from parallel.deferral import DeferredGradients
from parallel.layout import Recompute
from parallel.loss import Loss, Scores, head_and_loss, head_scores
from parallel.recompute import recomputing
from parallel.sharding import ParameterInfo, parameter_info
from parallel.tensor import TensorParallel, swap

Forward = Callable[[torch.Tensor, Context], torch.Tensor]
Value = Callable[[str, torch.Size], torch.Tensor]
"""A function from a parameter's full name and shape to its whole value, fp32 on the CPU."""

ALONE = TensorParallel(None, 0, 1, sequence_parallel=False, sharing={})
"""The tensor parallelism of a rank that shares its matrices with no other."""


@dataclass(frozen=True)
class Layer:
    """A layer of the model, by its name in it.

    Attributes:
        name: the name of the layer: ``"embedding"``, ``"blocks.3"``, ``"head"``.
        module: this rank's part of the layer.
        infos: the records of its parameters, by their names inside the module.
    """

    name: str
    module: nn.Module
    infos: Mapping[str, ParameterInfo]

    def parameters(self) -> Iterator[tuple[nn.Parameter, ParameterInfo]]:
        """Yield each parameter with its record."""
        return ((parameter, self.infos[name]) for name, parameter in self.module.named_parameters())


@dataclass(frozen=True)
class RankStages:
    """The stages of a model that a rank holds.

    Attributes:
        layers: the layers of each stage, by the index of the stage.
        tp: the ranks that share its matrices.
        deferred: the weight gradients that backward passes of all its layers defer.
    """

    layers: Mapping[int, Sequence[Layer]]
    tp: TensorParallel
    deferred: DeferredGradients

    @property
    def modules(self) -> dict[int, list[nn.Module]]:
        """The modules of each stage, by its index."""
        return {index: [layer.module for layer in layers] for index, layers in self.layers.items()}

    def in_order(self) -> list[Layer]:
        """Return all layers, in the order of the model."""
        return [layer for _, layers in sorted(self.layers.items()) for layer in layers]


def initial_values(model: ModelConfig, seed: int) -> Value:
    """Return the initial values of parameters: by seed and full name, so that they are the same in every layout."""
    return lambda name, shape: initial_value(name, shape, seed, model.init_std)


def build_stages(
    model: ModelConfig, ranges: Mapping[int, range], tp: TensorParallel, device: torch.device, value: Value
) -> RankStages:
    """Build the stages of a rank in fp32, with their weights; no layer of another rank is ever built.

    Args:
        model: the whole model's shape.
        ranges: the indices of each stage's layers in `model.transformer.layer_builders`, by the index of the stage.
        tp: the ranks to cut every matrix over.
        device: the device of the layers.
        value: the value of each parameter.
    """
    deferred, builders = DeferredGradients(), list(layer_builders(model).items())
    layers = {
        stage: [_build_layer(*builders[index], model, tp, deferred, device, value) for index in indices]
        for stage, indices in ranges.items()
    }
    return RankStages(layers, tp, deferred)


def _build_layer(
    name: str,
    build: Callable[[], nn.Module],
    model: ModelConfig,
    tp: TensorParallel,
    deferred: DeferredGradients,
    device: torch.device,
    value: Value,
) -> Layer:
    """Build a layer on the meta device, swap its modules by the table, materialise and fill it.

    Every parameter is initialised or read at full size and then cut, so that all layouts hold the same bits; one at a
    time is in memory whole.
    """
    with torch.device("meta"):
        module = build()
    shapes = {inner: parameter.shape for inner, parameter in module.named_parameters()}
    infos = {
        inner: parameter_info(f"{name}.{inner}", shape, model, tp.size, tp.rank, tp.sequence_parallel)
        for inner, shape in shapes.items()
    }
    module = swap(module, f"{name}.", model, tp, deferred).to_empty(device=device)
    with torch.no_grad():
        for inner, parameter in module.named_parameters():
            info = infos[inner]
            parameter.copy_(info.shard.of(value(info.name, info.shape)))
    return Layer(name, module, infos)


def forward_functions(
    stages: RankStages, recompute: Recompute, head_pieces: int
) -> tuple[dict[int, list[Forward]], Loss | None]:
    """Return the forward functions of each stage for training, and the loss where the head is among them.

    Args:
        stages: the stages of the rank.
        recompute: the activations that blocks recompute in the backward pass.
        head_pieces: the number of pieces of the logits, of which one is in memory at a time.
    """
    functions: dict[int, list[Forward]] = {}
    loss: Loss | None = None
    for stage, layers in stages.layers.items():
        functions[stage] = []
        for layer in layers:
            if isinstance(layer.module, Block):
                functions[stage].append(recomputing(layer.module, recompute))
            elif isinstance(layer.module, Head):
                first_token = layer.infos["proj.weight"].shard.start
                last, loss = head_and_loss(layer.module, head_pieces, first_token, stages.tp)
                functions[stage].append(_without_context(last))
            else:
                functions[stage].append(_without_context(layer.module))
    return functions, loss


def score_function(stages: RankStages) -> Scores | None:
    """Return the scores of labels by the output of the last stage; None where the head is not among the stages."""
    last = stages.in_order()[-1]
    if not isinstance(last.module, Head):
        return None
    return head_scores(last.module, last.infos["proj.weight"].shard.start, stages.tp)


def _without_context(run: Callable[[torch.Tensor], torch.Tensor]) -> Forward:
    return lambda x, context: run(x)
