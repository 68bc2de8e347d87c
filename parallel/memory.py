"""The memory of a rank during a step, in bytes, predicted from the shape of the model and its layout.

Three parts add up. The state: weights, accumulated gradients, master weights and moments (`parallel/zero.py`). What
is held between passes: the activations that forward passes save for backward, what a split backward pass leaves for
its weight gradients, messages on their way, token ids. And the workspace of a pass (`parallel/layer_memory.py`): the
gradients of the head's logits, for instance, or a block that is recomputed. The peak is over all passes of the step.

Documents add nothing to them, and windows take nothing from them: a flash kernel saves the same for a token whatever
that sees. Not counted are each token's position in its document, of 8 bytes, and what a CPU keeps: a copy of
attention's output where documents are computed one after another, and one of keys and values within a window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

from model.config import ModelConfig
from parallel.layer_memory import LayerMemory, PassMemory, Step, Tally, pass_memory
from parallel.layout import Layout
from parallel.schedules import Action, Pass, split_off
from parallel.stages import Stage

_IDS = 8
"""Bytes of a token's id, and of its label."""


@dataclass(frozen=True)
class Memory:
    """The memory of one rank, in bytes.

    Attributes:
        state: the bytes of weights, gradients, master weights and moments.
        activations: the bytes that are held between passes, when the most bytes are allocated.
        workspace: the bytes that the pass at that time needs besides.
    """

    state: float
    activations: float
    workspace: float

    @property
    def peak(self) -> float:
        """The most bytes allocated at any time of a step."""
        return self.state + self.activations + self.workspace


def state_bytes_per_parameter(bf16: bool, dp: int) -> float:
    """Count whole weights and fp32 gradients; over dp, fp32 master weights (in fp32 the weights) and two moments."""
    return 2 + 4 + 12 / dp if bf16 else 4 + 4 + 8 / dp


def batch_bytes(tokens: float) -> float:
    """Return the bytes of a micro-batch's token ids and labels, which a rank keeps until the end of the step."""
    return 2 * _IDS * tokens


def stage_memory(
    model: ModelConfig,
    layout: Layout,
    stages: Mapping[int, Stage],
    order: Sequence[Action],
    step: Step,
    messages: Sequence[int] = (),
) -> Memory:
    """Predict the most memory that a rank with these stages needs.

    Args:
        model: the whole model's shape.
        layout: the rank grid.
        stages: the stages of the rank, by index.
        order: the rank's passes of a step, which say how many micro-batches are in flight, and between which passes.
        step: the batch, the precision and the recomputation.
        messages: the number of activations and gradients on their way to or from other ranks during each pass, as
            `parallel.simulation.held_messages` counts them; empty for a rank that is alone.
    """
    layers = _layers(astuple(model), layout.tp, layout.sequence_parallel, step)
    passes = {
        index: _StagePasses(
            layers,
            blocks=len(range(max(stage.start, 1), min(stage.stop, model.n_layers + 1))),
            first=stage.start == 0,
            last=stage.stop == model.n_layers + 2,
            after=index - 1 in stages,
            before=index + 1 in stages,
        )
        for index, stage in stages.items()
    }
    split, now, best = split_off(order), 0.0, (0.0, 0.0)
    for index, action in enumerate(order):
        is_split = bool(split) and (action.stage, action.micro_batch) in split
        one = passes[action.stage].of(action, is_split)
        held = now + (messages[index] if messages else 0) * layers.R
        if held + one.most >= sum(best):
            best = held, one.most
        now += one.left
    parameters = sum(one.parameters for one in passes.values())
    ids = batch_bytes(layers.tokens) * len({action.micro_batch for action in order})
    tables = model.max_seq_len * model.d_head * 4  # of rotary positions, fp32
    state = parameters * state_bytes_per_parameter(step.bf16, layout.dp)
    return Memory(state, best[0] + ids + tables, best[1])


@lru_cache(maxsize=64)
def _layers(model: tuple[Any, ...], tp: int, cut: bool, step: Step) -> LayerMemory:
    return LayerMemory(ModelConfig(*model), Layout(1, 1, tp, cut), step)


@lru_cache(maxsize=1024)
class _StagePasses:
    """The memory of the passes of a micro-batch through a stage.

    Args:
        layers: the memory of each layer.
        blocks: the number of blocks.
        first, last: whether it has the embedding, and the head.
        after, before: whether the stage before, and the one after, is on the same rank: the output of one is the input
            of the other, and there once.
    """

    def __init__(self, layers: LayerMemory, blocks: int, first: bool, last: bool, after: bool, before: bool):
        self._layers, self._blocks, self._first, self._last = layers, blocks, first, last
        self._after, self._before = after, before
        self._known: dict[tuple[Pass, bool], PassMemory] = {}
        self.parameters = blocks * layers.block_parameters
        self.parameters += (first + last) * layers.vocab * layers.width + last * layers.width

    def of(self, action: Action, split: bool) -> PassMemory:
        """Return the memory of a pass, which may be split off the gradients of its weights."""
        key = action.what, split
        if key not in self._known:
            run = {Pass.F: self._forward, Pass.B: self._backward, Pass.W: self._weights}[action.what]
            self._known[key] = run(split)
        return self._known[key]

    def _forward(self, split: bool) -> PassMemory:
        layers = self._layers
        # Its input is received, or there already.
        tallies = [_ran(layers.embedding_forward)] if self._first else [_taken(0 if self._after else layers.R)]
        tallies += [_ran(layers.block_forward)] * self._blocks
        tallies += [_ran(layers.head_forward)] if self._last else []
        return pass_memory(tallies)

    def _backward(self, split: bool) -> PassMemory:
        layers, received = self._layers, not self._last
        # The gradient of its output is there: received from another rank and counted with the messages, or the loss's.
        tallies = [_ran(layers.head_backward, split)] if self._last else []
        block = [_ran(layers.block_backward, split)] * self._blocks
        if received and block:
            block[0] = _ran(layers.block_backward, split, received=True)
        tallies += block
        if self._first:
            tallies.append(_ran(layers.embedding_backward, received=received and not block))
        else:  # the gradient of its input goes on as a message
            tallies.append(_taken(-layers.R))
        if received and not self._before:  # its output, which blocks have left to the next one's pass
            tallies.append(_taken(-layers.R))
        if received and split and block:  # what was a message is kept for the gradient of a weight
            tallies.append(_taken(layers.kept_gradient))
        return pass_memory(tallies)

    def _weights(self, split: bool) -> PassMemory:
        layers = self._layers
        tallies = [_ran(layers.head_weights)] if self._last else []
        tallies += [_ran(layers.block_weights)] if self._blocks else []
        deferred = self._blocks * layers.block_deferred + self._last * layers.head_deferred
        return pass_memory([*tallies, _taken(-deferred)])


def _ran(run: Callable[..., None], *how: bool, **more: bool) -> Tally:
    tally = Tally()
    run(tally, *how, **more)
    return tally


def _taken(size: float) -> Tally:
    tally = Tally()
    tally.take(size)
    return tally
