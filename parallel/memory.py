"""The memory of a rank during a step, in bytes, predicted from the shape of the model and its layout.

Three parts add up. The state: weights, accumulated gradients, master weights and moments (`parallel/zero.py`). The
activations that forward passes save for backward, and what a split backward pass holds for its weight gradients, for
each micro-batch that is in flight. And the workspace of the pass that needs most: the gradients of the head's logits,
for instance, or a block that is recomputed.

Documents add nothing to them: a varlen kernel saves the same for a token of a document as of a sequence. Not counted
are what a batch holds, token ids, labels and positions of 8 bytes each, and the copy of attention's output that a CPU
keeps, where documents are computed one after another.

All of them are counted in values per token, times tokens, times bytes; d_model, query and key/value widths, d_ff and
the vocabulary are those of the rank's part under tensor parallelism.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.config import ModelConfig
from parallel.layout import Layout, Recompute
from parallel.schedules import Action, Pass, split_off
from parallel.sharding import vocabulary_shard
from parallel.stages import Stage

_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """The memory of one rank, in bytes.

    Attributes:
        state: the bytes of weights, gradients, master weights and moments.
        activations: the most bytes of activations that are saved for backward passes at any time.
        workspace: the most bytes that any pass needs besides.
    """

    state: float
    activations: float
    workspace: float

    @property
    def peak(self) -> float:
        """The most bytes allocated at any time of a step."""
        return self.state + self.activations + self.workspace


@dataclass(frozen=True)
class Step:
    """The settings of a run that decide its memory, besides the model and the layout.

    Attributes:
        micro_batch: the number of sequences of a micro-batch.
        seq_len: the number of tokens of a sequence.
        bf16: whether the stages compute in bf16, else in fp32.
        recompute: the activations that blocks recompute in the backward pass.
        head_pieces: the number of pieces of the logits.
    """

    micro_batch: int
    seq_len: int
    bf16: bool
    recompute: Recompute = Recompute.none
    head_pieces: int = 1


def state_bytes_per_parameter(bf16: bool, dp: int) -> float:
    """Count whole weights and fp32 gradients; over dp, fp32 master weights (in fp32 the weights) and two moments."""
    return 2 + 4 + 12 / dp if bf16 else 4 + 4 + 8 / dp


def stage_memory(
    model: ModelConfig, layout: Layout, stages: Mapping[int, Stage], order: Sequence[Action], step: Step
) -> Memory:
    """Predict the most memory that a rank with these stages needs.

    Args:
        model: the whole model's shape.
        layout: the rank grid.
        stages: the stages of the rank, by index.
        order: the rank's passes of a step, which say how many micro-batches are in flight, and between which passes.
        step: the batch, the precision and the recomputation.
    """
    layers = _LayerMemory(model, layout, step)
    blocks = {index: _num_blocks(stage, model) for index, stage in stages.items()}
    has_head = {index: stage.stop == model.n_layers + 2 for index, stage in stages.items()}
    first = any(stage.start == 0 for stage in stages.values())
    last = any(has_head.values())
    parameters = sum(blocks.values()) * layers.block_parameters + (first + last) * layers.vocab * model.d_model
    parameters += model.d_model if last else 0
    # A stage's output, which the next stage is sent, is kept for the backward pass as well.
    saved = {
        index: number * layers.saved(step.recompute) + (not has_head[index]) * layers.boundary()
        for index, number in blocks.items()
    }
    deferred = {
        index: number * layers.block_deferred() + has_head[index] * layers.head_deferred()
        for index, number in blocks.items()
    }
    # The head has no saved activations between passes: its backward pass follows its forward pass.
    workspace = max(
        layers.block_backward() if any(blocks.values()) else 0.0,
        layers.head() if last else 0.0,
        layers.embedding() - saved[min(stages)] if first else 0.0,
    )
    state = parameters * state_bytes_per_parameter(step.bf16, layout.dp)
    return Memory(state, _most_activations(order, saved, deferred), workspace)


def _num_blocks(stage: Stage, model: ModelConfig) -> int:
    return len(range(max(stage.start, 1), min(stage.stop, model.n_layers + 1)))


def _most_activations(order: Sequence[Action], saved: Mapping[int, float], deferred: Mapping[int, float]) -> float:
    """Return the most bytes at any time of a step, of what forward passes save and of what split backward passes defer.

    Args:
        order: the passes of the rank.
        saved: the bytes that a micro-batch's forward pass through a stage saves, by stage.
        deferred: the bytes that its backward pass holds until its weight gradients are computed, where it is split.
    """
    split, now, most = split_off(order), 0.0, 0.0
    for action in order:
        is_split = (action.stage, action.micro_batch) in split
        now += {
            Pass.F: saved[action.stage],
            Pass.B: deferred[action.stage] * is_split - saved[action.stage],
            Pass.W: -deferred[action.stage],
        }[action.what]
        most = max(most, now)
    return most


class _LayerMemory:
    """The memory of a rank's part of each kind of layer."""

    def __init__(self, model: ModelConfig, layout: Layout, step: Step):
        tp = layout.tp
        self._model, self._step = model, step
        self._bytes = 2 if step.bf16 else 4
        self._tokens = step.micro_batch * step.seq_len
        self._d = model.d_model
        self._residual = model.d_model / tp if layout.sequence_parallel else model.d_model  # values per token
        self._queries = model.n_heads * model.d_head / tp
        self._keys = max(model.n_kv_heads / tp, 1) * model.d_head
        self._ff = model.d_ff / tp
        self._heads = model.n_heads / tp
        self._sequence_parallel = layout.sequence_parallel
        widest = vocabulary_shard(model, tp, 0)
        self.vocab = widest.stop - widest.start
        self.block_parameters = model.d_model * (2 * self._queries + 2 * self._keys + 3 * self._ff) + 2 * model.d_model

    def _of_tokens(self, values: float, fp32: float = 0.0) -> float:
        return self._tokens * (values * self._bytes + fp32 * _FP32)

    def saved(self, recompute: Recompute) -> float:
        """Return the bytes of activations that a block's forward pass saves for its backward pass."""
        if recompute is Recompute.full:
            return self._of_tokens(self._residual)
        residual = 2 * self._residual  # the inputs of both norms
        attention = 2 * self._queries + 2 * self._keys  # the inputs and the output of attention
        normed = 2 * self._residual if recompute is Recompute.none else 0
        gate_up = 2 * self._ff if recompute is not Recompute.ffn else 0
        product = self._ff if recompute is Recompute.none else 0
        # In fp32 there are the norms' scales and attention's log-sum-exps.
        return self._of_tokens(residual + attention + normed + gate_up + product, 2 + self._heads)

    def boundary(self) -> float:
        """Return the bytes of a micro-batch's activations between two stages, or of their gradient."""
        return self._of_tokens(self._residual)

    def block_deferred(self) -> float:
        """Return the bytes that a block holds between B and W: each matrix's input and its output's gradient."""
        inputs = 2 * self._residual + self._queries + self._ff
        gradients = self._queries + 2 * self._keys + self._d + 2 * self._ff + self._d
        return self._of_tokens(inputs + gradients)

    def head_deferred(self) -> float:
        """Return the bytes that the head holds between B and W; the loss in pieces defers nothing."""
        return self._of_tokens(self._residual + self.vocab) if self._step.head_pieces == 1 else 0.0

    def block_backward(self) -> float:
        """Return the most bytes that a block's backward pass needs beside the saved activations."""
        how = self._step.recompute
        before = self.saved(Recompute.none) - self.saved(how) if how is Recompute.full else 0.0
        saves = Recompute.none if how is Recompute.full else how
        d, residual, ff = self._d, self._residual, self._ff
        gathered = d if self._sequence_parallel else 0
        weights = self._d * ff * self._bytes
        recomputed_product = ff if saves is not Recompute.none else 0
        recomputed_gate_up = 2 * ff + residual if saves is Recompute.ffn else 0
        # The gradients of down's output, of its input and of its weight.
        down = self._of_tokens(residual + gathered + ff + recomputed_product + recomputed_gate_up) + weights
        # The gradients of the product, of gate and of up.
        freed = ff if saves is Recompute.none else 0
        silu = self._of_tokens(residual + ff + recomputed_gate_up + 2 * ff - freed)
        # The gradients of both weights at once, and of their input.
        freed += 2 * ff if saves is not Recompute.ffn else 0
        recomputed_norm = residual if saves is not Recompute.none else 0
        gate_up = self._of_tokens(residual + 2 * ff + recomputed_norm + gathered + d - freed) + 2 * weights
        return before + max(down, silu, gate_up)

    def head(self) -> float:
        """Return the bytes that the head and the loss need, from the norm to the gradient of its input."""
        gathered = self._d if self._sequence_parallel else 0
        weight = self.vocab * self._d * self._bytes
        normed = self._of_tokens(2 * self._residual + gathered, 1)
        if self._step.head_pieces == 1:
            return normed + self._of_tokens(self.vocab + self._d, 4) + weight
        piece = -(-self.vocab // self._step.head_pieces)
        return normed + self._of_tokens(piece + self._d, self._d + 4) + weight

    def embedding(self) -> float:
        """Return the bytes of the last gradients of a step: the embedding's, and that of its output."""
        return self._of_tokens(self._residual) + self.vocab * self._d * self._bytes
