"""What a rank holds during a step, in bytes, from the shape of the model and its cut: known before anything runs.

Three things add up. The state: weights, accumulated gradients, master weights and moments (`parallel/zero.py`). The
activations that forward passes save for backward, for each micro-batch that is under way. And the workspace of the pass
that needs most: the gradients of the head's logits, say, or a block that is computed again.

All is counted in values per token, times tokens, times bytes; d_model, query and key/value widths, d_ff and the
vocabulary are those of the rank's part under tensor parallelism.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.config import ModelConfig
from parallel.layout import Layout, Recompute
from parallel.sharding import vocabulary_shard
from parallel.stages import Stage

_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        state: weights, gradients, master weights, moments.
        activations: saved by forward passes for backward, most at any time.
        workspace: what the pass that needs most needs besides.
    """

    state: float
    activations: float
    workspace: float

    @property
    def peak(self) -> float:
        """Most bytes held at any time of a step."""
        return self.state + self.activations + self.workspace


@dataclass(frozen=True)
class Step:
    """What of a run decides about memory, besides the model and the layout.

    Attributes:
        micro_batch: sequences.
        seq_len: tokens of each.
        bf16: whether the stages compute in bf16, else fp32.
        recompute: what blocks compute again.
        head_pieces: of the logits.
    """

    micro_batch: int
    seq_len: int
    bf16: bool
    recompute: Recompute = Recompute.none
    head_pieces: int = 1


def state_bytes_per_parameter(bf16: bool, dp: int) -> float:
    """Weights and fp32 gradients whole; fp32 master weights, which in fp32 are the weights, and two moments over dp."""
    return 2 + 4 + 12 / dp if bf16 else 4 + 4 + 8 / dp


def stage_memory(
    model: ModelConfig, layout: Layout, stages: Sequence[Stage], micro_batches: float, step: Step
) -> Memory:
    """What a rank with these stages holds at most.

    Args:
        model: the whole model's shape.
        layout: the rank grid.
        stages: of the rank.
        micro_batches: whose activations the schedule has it save, in those of all its stages
            (`parallel.simulation.Timeline.activations`).
        step: batch, precision, recomputation.
    """
    part = _Part(model, layout, step)
    blocks = sum(len(range(max(one.start, 1), min(one.stop, model.n_layers + 1))) for one in stages)
    first = any(one.start == 0 for one in stages)
    last = any(one.stop == model.n_layers + 2 for one in stages)
    parameters = blocks * part.block_parameters + (first + last) * part.vocab * model.d_model
    parameters += model.d_model if last else 0
    activations = micro_batches * blocks * part.saved(step.recompute)
    # The head saves nothing for long: its backward pass follows its forward pass.
    workspace = max(
        part.block_backward() if blocks else 0.0,
        part.head() if last else 0.0,
        part.embedding() - activations / max(micro_batches, 1) if first else 0.0,
    )
    return Memory(parameters * state_bytes_per_parameter(step.bf16, layout.dp), activations, workspace)


class _Part:
    """A rank's part of each kind of layer."""

    def __init__(self, model: ModelConfig, layout: Layout, step: Step):
        tp = layout.tp
        self._model, self._step = model, step
        self._bytes = 2 if step.bf16 else 4
        self._tokens = step.micro_batch * step.seq_len
        self._d = model.d_model
        self._between = model.d_model / tp if layout.sequence_parallel else model.d_model  # of what lies between
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
        """Bytes that a block's forward pass leaves for its backward pass."""
        if recompute is Recompute.full:
            return self._of_tokens(self._between)
        residual = 2 * self._between  # the inputs of both norms
        attention = 2 * self._queries + 2 * self._keys  # what attention reads and gives
        normed = 2 * self._between if recompute is Recompute.none else 0
        gate_up = 2 * self._ff if recompute is not Recompute.ffn else 0
        product = self._ff if recompute is Recompute.none else 0
        # The norms' scales, and the logarithms of attention's sums.
        return self._of_tokens(residual + attention + normed + gate_up + product, 2 + self._heads)

    def block_backward(self) -> float:
        """Bytes that the backward pass of a block needs beside what is saved, at its worst moment."""
        how = self._step.recompute
        before = self.saved(Recompute.none) - self.saved(how) if how is Recompute.full else 0.0
        saves = Recompute.none if how is Recompute.full else how
        wide, deep, ff = self._d, self._between, self._ff
        gathered = wide if self._sequence_parallel else 0
        weights = self._d * ff * self._bytes
        recomputed_product = ff if saves is not Recompute.none else 0
        recomputed_gate_up = 2 * ff + deep if saves is Recompute.ffn else 0
        # The gradient of down's output, of its input, and of its weight.
        down = self._of_tokens(deep + gathered + ff + recomputed_product + recomputed_gate_up) + weights
        # The product's own gradient, and those of gate and up.
        let_go = ff if saves is Recompute.none else 0
        silu = self._of_tokens(deep + ff + recomputed_gate_up + 2 * ff - let_go)
        # Both weights' gradients at once, and the input's.
        let_go += 2 * ff if saves is not Recompute.ffn else 0
        recomputed_norm = deep if saves is not Recompute.none else 0
        gate_up = self._of_tokens(deep + 2 * ff + recomputed_norm + gathered + wide - let_go) + 2 * weights
        return before + max(down, silu, gate_up)

    def head(self) -> float:
        """Bytes that the head and the loss need, from the norm to the gradient of its input."""
        gathered = self._d if self._sequence_parallel else 0
        weight = self.vocab * self._d * self._bytes
        normed = self._of_tokens(2 * self._between + gathered, 1)
        if self._step.head_pieces == 1:
            return normed + self._of_tokens(self.vocab + self._d, 4) + weight
        piece = -(-self.vocab // self._step.head_pieces)
        return normed + self._of_tokens(piece + self._d, self._d + 4) + weight

    def embedding(self) -> float:
        """Bytes of the last gradients of a step: the embedding's, and that of its output."""
        return self._of_tokens(self._between) + self.vocab * self._d * self._bytes
