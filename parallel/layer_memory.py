"""The memory of a pass through a layer, tensor by tensor, in the order in which the code makes and frees them.

What follows mirrors `model/transformer.py` and `parallel/tensor.py` with a GPU's kernels: a compiled formula or a flash
kernel makes its results and nothing on the way. `tests/parallel/test_memory.py` holds it against dry runs of the code.

Sizes are in values per token of this rank: D the model's width, R the residual stream's (D / tp where it is cut along
the sequence), Q the queries', K the keys', F the feed-forward network's, V the vocabulary's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from model.config import ModelConfig
from parallel.layout import Layout, Recompute
from parallel.sharding import vocabulary_shard

_FP32 = 4


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


class Tally:
    """The bytes that a pass holds, beyond those that were there when it began.

    Attributes:
        now: the bytes at this time; below 0 once it has freed more than it made.
        most: the most at any time.
    """

    def __init__(self) -> None:
        self.now = self.most = 0.0

    def take(self, *sizes: float) -> None:
        """Allocate tensors."""
        self.now += sum(sizes)
        self.most = max(self.most, self.now)

    def give(self, *sizes: float) -> None:
        """Free tensors."""
        self.now -= sum(sizes)

    @contextmanager
    def holding(self, *sizes: float) -> Iterator[None]:
        """Hold tensors inside this context."""
        self.take(*sizes)
        yield
        self.give(*sizes)


class LayerMemory:
    """The memory of a rank's part of each kind of layer, for one micro-batch.

    A pass begins when the layer's input, or the gradient of its output, is there already. A forward pass leaves its
    output and what it saves; a backward pass frees these and the layer's input, and leaves the gradient of its input.

    Args:
        model: the whole model's shape.
        layout: the rank grid.
        step: the batch, the precision and the recomputation.
    """

    def __init__(self, model: ModelConfig, layout: Layout, step: Step):
        tp = layout.tp
        self.bytes = 2 if step.bf16 else 4
        self._recompute, self._pieces = step.recompute, step.head_pieces
        self.tokens = step.micro_batch * step.seq_len
        self._cut = layout.sequence_parallel
        self._tp = tp
        self.width = model.d_model
        heads, keys = model.n_heads * model.d_head / tp, max(model.n_kv_heads / tp, 1) * model.d_head
        ff = model.d_ff / tp
        shard = vocabulary_shard(model, tp, 0)
        self.vocab = shard.stop - shard.start
        # The gradient of the embedding or of a head in pieces; others are added to their sums as they are multiplied.
        self._w_vocab = self.vocab * model.d_model * self.bytes
        self.block_parameters = model.d_model * (2 * heads + 2 * keys + 3 * ff) + 2 * model.d_model
        # Activations of a micro-batch.
        self.D = self._of_tokens(model.d_model)
        self.R = self.D / tp if self._cut else self.D
        self.Q, self.K, self.F, self.V = (self._of_tokens(one) for one in (heads, keys, ff, self.vocab))
        self._scale = self.tokens / (tp if self._cut else 1) * _FP32  # a norm's, of each token
        self._sums = self.tokens * model.n_heads / tp * _FP32  # attention's, of each token and head
        self._gathered = self.D if self._cut else 0.0
        # A micro-batch of several sequences is copied to be scattered.
        self._scattered = (self.R + self.D * (step.micro_batch > 1)) if self._cut else 0.0

    def _of_tokens(self, values: float) -> float:
        return self.tokens * values * self.bytes

    # ---- blocks ----

    def block_forward(self, tally: Tally) -> None:
        """Run a block's forward pass as it is trained."""
        if self._recompute is Recompute.full:
            # Nothing is saved but the input, and so each tensor goes as soon as it has been used.
            with tally.holding(2 * self.R, self.R, self._gathered, 3 * self.F):
                pass
            tally.take(self.R)
            return
        self._saving_forward(tally, self._recompute)

    def _saving_forward(self, tally: Tally, recompute: Recompute) -> None:
        R, Q, K, F = self.R, self.Q, self.K, self.F
        saves_norms = recompute is Recompute.none
        tally.take(R, self._scale)  # the norm
        with tally.holding(self._gathered):
            tally.take(Q + 2 * K)
        tally.take(Q + K)  # rotated
        tally.give(Q + K)
        tally.take(Q, self._sums)  # attention's output
        self._row_parallel(tally)
        tally.give(0 if saves_norms else R)
        tally.take(2 * R, self._scale)  # the sum, and its norm
        with tally.holding(self._gathered):
            tally.take(2 * F)
        tally.take(F)
        self._row_parallel(tally)
        tally.take(R)  # the output
        tally.give(2 * R)  # what was added
        tally.give(0 if saves_norms else R + F, 2 * F if recompute is Recompute.ffn else 0)

    def _row_parallel(self, tally: Tally) -> None:
        tally.take(self.D)
        if self._cut:
            tally.take(self._scattered)
            tally.give(self.D + self._scattered - self.R)

    def block_backward(self, tally: Tally, split: bool, received: bool = False) -> None:
        """Run a block's backward pass.

        Args:
            tally: of the pass.
            split: whether the gradients of weights are deferred, with the inputs and gradients that they are made of.
            received: whether the gradient of its output came from another rank, and is kept for the whole pass.
        """
        recompute = self._recompute
        if recompute is Recompute.full:
            self._saving_forward(tally, Recompute.none)
            tally.give(self.R)
            recompute = Recompute.none
        self._ffn_backward(tally, split, recompute, received)
        self._attention_backward(tally, split, recompute)

    def _ffn_backward(self, tally: Tally, split: bool, recompute: Recompute, received: bool) -> None:
        R, F = self.R, self.F
        saves_norms = recompute is Recompute.none
        tally.take(self._gathered)  # the gradient of down's output
        if recompute is Recompute.ffn:
            tally.take(R)  # the norm's output, which gate and up are made of and their gradients take as well
            with tally.holding(self._gathered):
                tally.take(2 * F)
        tally.take(0 if saves_norms else F)  # the product
        tally.take(F)  # its gradient
        tally.give(0 if split else self._gathered + F)
        tally.take(2 * F)  # the gradients of gate and up
        tally.give(F, 2 * F)
        tally.take(R if recompute is Recompute.selective else 0)
        self._column_parallel(tally, split)
        tally.give(0 if split else R + 2 * F)
        tally.take(R)  # the gradient of the sum
        tally.give(R, self._scale, R)  # of the norm, and the sum
        # The gradient of the output, unless deferred gradients of weights are made of it.
        tally.give(0 if received or (split and not self._cut) else R)

    def _attention_backward(self, tally: Tally, split: bool, recompute: Recompute) -> None:
        R, Q, K = self.R, self.Q, self.K
        tally.take(self._gathered)
        tally.take(Q)
        tally.give(0 if split else self._gathered)
        tally.take(Q + 2 * K)  # the gradients of queries, keys and values
        tally.give(Q, Q + 2 * K, self._sums, 0 if split else Q)
        with tally.holding(Q + K):
            pass
        tally.take(0 if recompute is Recompute.none else R)
        self._column_parallel(tally, split)
        tally.give(0 if split else R + Q + 2 * K)
        tally.take(R)  # the norm's
        tally.give(R, self._scale)
        # It is added to the gradient of the sum, in place unless deferred gradients of weights are made of that.
        tally.take(R if split and not self._cut else 0)
        tally.give(R if split and not self._cut else 0)
        tally.give(0 if split and not self._cut else R)
        tally.give(R)  # the input

    def _column_parallel(self, tally: Tally, split: bool) -> None:
        """Leave the gradient of the input."""
        tally.take(0 if split else self._gathered)
        tally.take(self.D)
        tally.take(self._scattered)
        tally.give(0 if split else self._gathered)
        if self._cut:
            tally.give(self.D + self._scattered - self.R)

    def block_weights(self, tally: Tally) -> None:
        """Compute the deferred gradients of a block's weights. What they are made of goes at the end of the pass."""
        with tally.holding(self._gathered):
            pass

    @property
    def kept_gradient(self) -> float:
        """The bytes of the gradient of a block's output that a split backward pass keeps as it was given."""
        return 0.0 if self._cut else self.R

    @cached_property
    def block_deferred(self) -> float:
        """The bytes that a block holds between B and W: each matrix's input and its output's gradient."""
        return 2 * self.R + self.Q + self.F + self.Q + 2 * self.K + 2 * self.F + 2 * self.D

    # ---- the embedding and the head ----

    def embedding_forward(self, tally: Tally) -> None:
        """Run the embedding's forward pass."""
        tally.take(self.D)
        if self._tp > 1:
            tally.take(self.D)
            tally.give(self.D)
        if self._cut:
            tally.take(self._scattered)
            tally.give(self.D + self._scattered - self.R)

    def embedding_backward(self, tally: Tally, received: bool = False) -> None:
        """Run the embedding's backward pass; its weight's gradient is never deferred."""
        masked = self.D if self._tp > 1 else 0.0
        with tally.holding(self._gathered, masked, self._w_vocab):
            pass
        tally.give(0 if received else self.R)

    def head_forward(self, tally: Tally) -> None:
        """Run the head's forward pass and the loss."""
        statistics = 3 * self.tokens * _FP32
        tally.take(self.R, self._scale)
        if self._pieces == 1:
            with tally.holding(self._gathered):
                tally.take(self.V)
            tally.take(statistics)
            return
        tally.take(self._gathered)
        tally.give(self.R if self._cut else 0)
        with tally.holding(self._piece):
            pass
        tally.take(statistics)

    def head_backward(self, tally: Tally, split: bool) -> None:
        """Run the backward pass of the loss and the head, which leaves the gradient of the head's input."""
        statistics = 3 * self.tokens * _FP32
        if self._pieces == 1:
            self._column_parallel(tally, split)
            tally.give(statistics, 0 if split else self.V + self.R)
        else:
            in_fp32 = self.tokens * _FP32 * self.width
            tally.take(in_fp32, self._w_vocab)
            with tally.holding(self._piece, self.D):
                pass
            tally.take(self.D if self.bytes < _FP32 else 0)
            tally.give(in_fp32 if self.bytes < _FP32 else 0)
            tally.give(statistics, self._w_vocab, self.D)
            tally.take(self._scattered)
            tally.give(self.D + self._scattered - self.R if self._cut else 0)
        tally.take(self.R)
        tally.give(self.R, self._scale, self.R)  # the gradient of the norm's output, and the head's input

    def head_weights(self, tally: Tally) -> None:
        """Compute the deferred gradient of the head's weight."""
        if self._pieces == 1:
            with tally.holding(self._gathered):
                pass

    @cached_property
    def head_deferred(self) -> float:
        """The bytes that the head holds between B and W; the loss in pieces defers nothing."""
        return self.R + self.V if self._pieces == 1 else 0.0

    @property
    def _piece(self) -> float:
        return self._of_tokens(-(-self.vocab // self._pieces))


@dataclass(frozen=True)
class PassMemory:
    """The memory of a pass of a micro-batch through a stage, in bytes.

    Attributes:
        most: the most bytes at any time of it, beyond those at its beginning.
        left: the bytes at its end, beyond those at its beginning; below 0 where it has freed more than it made.
    """

    most: float
    left: float


def pass_memory(tallies: Sequence[Tally]) -> PassMemory:
    """Return the memory of layers that run one after another."""
    now = most = 0.0
    for tally in tallies:
        most = max(most, now + tally.most)
        now += tally.now
    return PassMemory(most, now)
