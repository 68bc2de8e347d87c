"""What a rank computes and sends in each pass of a layer, operation by operation, counted from the model's shape.

It says by formula what a dry run records from the code itself: `parallel/tensor.py` for what is gathered and reduced,
and what of that is overlapped, `parallel/deferral.py` for what a split backward pass puts off, `model/loss.py` for the
head in pieces. The tests hold the two against each other.

Of a micro-batch, `tokens` are those of whole sequences and `part` those of this rank's part of them, where sequence
parallelism cuts them. Widths are those of the rank's part of each matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

from model.config import ModelConfig
from parallel.layout import Recompute
from parallel.plan.job import Job
from parallel.plan.operations import Attention, GroupKind, Message, Operation, Product, Traffic, Wait
from parallel.sharding import vocabulary_shard

_FP32 = 4


@dataclass(frozen=True)
class LayerWork:
    """The operations of a layer's passes of one micro-batch on one rank.

    Attributes:
        forward: those of the forward pass.
        backward: those of a whole backward pass.
        input_gradient: those of a backward pass that defers the gradients of weights.
        weights: those of the pass of the deferred gradients.
        parameters: the number of the layer's parameters on the rank.
        shared_parameters: how many of them other tensor-parallel ranks hold as well, whose gradients are summed over
            these ranks after the passes: norms, and key/value heads where there are fewer than ranks.
    """

    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    input_gradient: tuple[Operation, ...]
    weights: tuple[Operation, ...]
    parameters: int
    shared_parameters: int = 0


@dataclass(frozen=True)
class Layers:
    """The work of each kind of layer on a rank."""

    embedding: LayerWork
    block: LayerWork
    head: LayerWork


@dataclass(frozen=True)
class Shape:
    """What decides the work of a layer.

    Attributes:
        model: the dimensions (d_model, n_heads, n_kv_heads, d_head, d_ff, vocabulary) of the whole model.
        tp: the number of tensor-parallel ranks.
        sequence_parallel: whether norms and residuals are cut along the sequence.
        micro_batch, seq_len: sequences of a micro-batch, and their tokens.
        bytes_per_value: of weights and activations.
        recompute: the activations that blocks recompute.
        head_pieces: the number of pieces of the logits.
        window: the tokens that a query of the block sees, itself included; None for all before it.
    """

    model: tuple[int, int, int, int, int, int]
    tp: int
    sequence_parallel: bool
    micro_batch: int
    seq_len: int
    bytes_per_value: int
    recompute: Recompute
    head_pieces: int
    window: int | None = None


def shape_of(job: Job, window: int | None = None) -> Shape:
    """Return the shape of a job's work, its block one with this window of `ModelConfig.windows`."""
    model, layout, settings = job.model, job.layout, job.settings
    return Shape(
        (model.d_model, model.n_heads, model.n_kv_heads, model.d_head, model.d_ff, model.vocab_size),
        layout.tp,
        layout.sequence_parallel,
        settings.micro_batch,
        settings.seq_len,
        2 if settings.bf16 else _FP32,
        settings.recompute,
        settings.head_pieces,
        window,
    )


@lru_cache(maxsize=4096)
def layers_of(shape: Shape) -> Layers:
    """Return the work of each kind of layer; the same for every layout that has this shape."""
    rank = RankLayers(shape)
    return Layers(rank.embedding(), rank.block(), rank.head())


class RankLayers:
    """A rank's part of each kind of layer."""

    def __init__(self, shape: Shape):
        d_model, n_heads, n_kv_heads, d_head, d_ff, vocab_size = shape.model
        tp = shape.tp
        self.shape, self.tp, self.b = shape, tp, shape.bytes_per_value
        self.cut = shape.sequence_parallel
        self.tokens = shape.micro_batch * shape.seq_len
        self.part = self.tokens // tp if self.cut else self.tokens
        self.d, self.f = d_model, d_ff // tp
        self.heads, self.kv_heads, self.d_head = n_heads // tp, max(n_kv_heads // tp, 1), d_head
        self.q, self.kv = self.heads * d_head, self.kv_heads * d_head
        whole = ModelConfig(vocab_size=vocab_size)
        widest = vocabulary_shard(whole, tp, 0)
        self.v = widest.stop - widest.start
        self.index = count()

    # ---- operations ----

    def product(self, m: int, k: int, n: int) -> Product:
        """Make a matrix product."""
        return Product(m, k, n, bytes_per_value=self.b)

    def forward_products(self, d_in: int, *widths: int) -> list[Operation]:
        """Make the products of several linear layers of one input."""
        return [self.product(self.tokens, d_in, width) for width in widths]

    def input_products(self, d_in: int, *widths: int) -> list[Operation]:
        """Make the products of the gradient of their input."""
        return [self.product(self.tokens, width, d_in) for width in widths]

    def weight_products(self, d_in: int, *widths: int) -> list[Operation]:
        """Make the products of the gradients of their weights, which add to the accumulated ones."""
        made: list[Operation] = []
        for width in widths:
            added = Traffic(2 * _FP32 * width * d_in, "accumulated gradient")
            made += [self.product(width, self.tokens, d_in), added]
        return made

    def accumulated(self, parameters: int) -> Traffic:
        """Make the addition of a gradient to the fp32 sum over the micro-batches."""
        return Traffic(parameters * (self.b + 2 * _FP32), "accumulated gradient")

    def pass_over(self, tensors: float, values: int, name: str) -> Traffic:
        """Make a kernel that reads and writes so many tensors of so many values."""
        return Traffic(round(tensors * values * self.b), name)

    def _message(self, operation: str, values: int, bytes_per_value: int | None = None, index: int = -1) -> Message:
        return Message(operation, GroupKind.tp, self.tp, values * (bytes_per_value or self.b), index)

    def _copy(self) -> list[Operation]:
        """Make the copy between the orders of a message and of several sequences; one sequence needs none."""
        return [self.pass_over(2, self.tokens * self.d, "reordered")] if self.shape.micro_batch > 1 else []

    def gather(self) -> list[Operation]:
        """Gather a rank's part of the sequence; nothing without sequence parallelism."""
        return [self._message("all_gather", self.tokens * self.d), *self._copy()] if self.cut else []

    def reduce(self) -> list[Operation]:
        """Sum partial sums over the ranks, and wait for it."""
        if self.cut:
            return [*self._copy(), self._message("reduce_scatter", self.tokens * self.d)]
        if self.tp == 1:
            return []
        clone = self.pass_over(2, self.tokens * self.d, "clone")
        return [clone, self._message("all_reduce", self.tokens * self.d)]

    # ---- column-parallel layers ----

    def column_backward(self, d_in: int, widths: Sequence[int], deferring: bool) -> list[Operation]:
        """Make the backward pass of linear layers of one input, cut by columns.

        The input is gathered again while its gradient is computed, and that is reduced while the gradients of weights
        are; where these are deferred, so is the gather, and nothing runs during the reduction.
        """
        weights = [] if deferring else self.weight_products(d_in, *widths)
        if self.tp == 1:
            return [*self.input_products(d_in, *widths), *weights]
        made: list[Operation] = []
        if self.cut and not deferring:
            gather = next(self.index)
            made += [self._message("all_gather", self.tokens * d_in, index=gather)]
            made += [*self.input_products(d_in, *widths), Wait(gather), *self._copy()]
        else:
            made += self.input_products(d_in, *widths)
        operation = "reduce_scatter" if self.cut else "all_reduce"
        before = self._copy() if self.cut else []
        if deferring:
            return [*made, *before, self._message(operation, self.tokens * d_in)]
        reduction = next(self.index)
        return [
            *made,
            *before,
            self._message(operation, self.tokens * d_in, index=reduction),
            *weights,
            Wait(reduction),
        ]

    def column_weights(self, d_in: int, *widths: int) -> list[Operation]:
        """Make the deferred gradients of their weights."""
        return [*self.gather(), *self.weight_products(d_in, *widths)]

    def row_backward(self, d_in: int, d_out: int, deferring: bool, again: Sequence[Operation] = ()) -> list[Operation]:
        """Make the backward pass of a linear layer that is cut by rows.

        Args:
            d_in, d_out: its widths.
            deferring: whether the gradient of its weight is deferred.
            again: what is recomputed when its saved input is asked for.
        """
        weights = [] if deferring else self.weight_products(d_in, d_out)
        return [*self.gather(), *again, *self.input_products(d_in, d_out), *weights]

    # ---- layers ----

    def block(self) -> LayerWork:
        """Make the work of a block."""
        d, part = self.d, self.part
        forward: list[Operation] = [
            self.pass_over(2, part * d, "norm"),
            *self.gather(),
            *self.forward_products(d, self.q, self.kv, self.kv),
            self.pass_over(2, self.tokens * (self.q + self.kv), "rotary"),
            self.attention(backward=False),
            *self.forward_products(self.q, d),
            *self.reduce(),
            self.pass_over(4, part * d, "norm of a sum"),
            *self.gather(),
            *self.forward_products(d, self.f, self.f),
            self.pass_over(3, self.tokens * self.f, "silu"),
            *self.forward_products(self.f, d),
        ]
        last = [*self.reduce(), self.pass_over(3, part * d, "sum")]
        # A checkpoint stops where the last tensor that backward needs has been recomputed: before the last sum.
        again = forward if self.shape.recompute is Recompute.full else self._again()
        deferred = [
            *self.weight_products(self.f, d),
            *self.column_weights(d, self.f, self.f),
            *self.weight_products(self.q, d),
            *self.column_weights(d, self.q, self.kv, self.kv),
        ]
        matrices = d * (2 * self.q + 2 * self.kv + 3 * self.f)
        return LayerWork(
            (*forward, *last),
            tuple(self.block_backward(again, deferring=False)),
            tuple(self.block_backward(again, deferring=True)),
            tuple(deferred),
            matrices + 2 * d,
            self._shared(),
        )

    def _shared(self) -> int:
        """Return how many of a block's parameters other tensor-parallel ranks hold as well."""
        if self.tp == 1:
            return 0
        copied = self.tp > self.shape.model[2]  # key/value heads, each of which several ranks hold
        return 2 * self.d + (2 * self.d * self.kv if copied else 0)

    def attention(self, backward: bool) -> Attention:
        """Make causal attention of the rank's heads."""
        shape = self.shape
        return Attention(
            *(shape.micro_batch, shape.seq_len, self.heads, self.kv_heads, self.d_head),
            *(backward, self.b, shape.window),
        )

    def _again(self) -> list[Operation]:
        """Make what a block recomputes of its feed-forward network, where it is not checkpointed whole."""
        how = self.shape.recompute
        if how is Recompute.none:
            return []
        silu = self.pass_over(3, self.tokens * self.f, "silu")
        if how is Recompute.selective:
            return [silu]
        norm = self.pass_over(2, self.part * self.d, "norm")
        return [norm, *self.gather(), *self.forward_products(self.d, self.f, self.f), silu]

    def block_backward(self, again: Sequence[Operation], deferring: bool) -> list[Operation]:
        """Make a block's backward pass, with what it recomputes of its forward pass first."""
        d, part, how = self.d, self.part, self.shape.recompute
        norm_again: list[Operation] = []
        if how in (Recompute.selective, Recompute.ffn):
            norm_again = [self.pass_over(2, part * d, "norm")]
        return [
            *self.row_backward(self.f, d, deferring, again),
            self.pass_over(5, self.tokens * self.f, "gradient of silu"),
            *(norm_again if how is not Recompute.ffn else []),
            *self.column_backward(d, (self.f, self.f), deferring),
            self.pass_over(6, part * d, "gradient of a norm"),
            self.accumulated(d),
            *self.row_backward(self.q, d, deferring),
            self.attention(backward=True),
            self.pass_over(2, self.tokens * (self.q + self.kv), "gradient of rotary"),
            *norm_again,
            *self.column_backward(d, (self.q, self.kv, self.kv), deferring),
            self.pass_over(5, part * d, "gradient of a norm"),
            self.pass_over(3, part * d, "sum of gradients"),
            self.accumulated(d),
        ]

    def embedding(self) -> LayerWork:
        """Make the work of the embedding, whose gradient is never deferred."""
        lookup = self.pass_over(2 if self.tp == 1 else 6, self.tokens * self.d, "lookup")
        backward = [
            *self.gather(),
            self.pass_over(1, self.v * self.d + 2 * self.tokens * self.d, "gradient of the embedding"),
            self.accumulated(self.v * self.d),
        ]
        return LayerWork((lookup, *self.reduce()), tuple(backward), tuple(backward), (), self.v * self.d)

    def head(self) -> LayerWork:
        """Make the work of the head and the loss."""
        d, part, v = self.d, self.part, self.v
        norm: Operation = self.pass_over(2, part * d, "norm")
        after: list[Operation] = [self.pass_over(5, part * d, "gradient of a norm"), self.accumulated(d)]
        parameters, shared = v * d + d, d if self.tp > 1 else 0
        if self.shape.head_pieces > 1:
            forward, backward = self._in_pieces()
            backward = [*backward, *after]
            return LayerWork((norm, *forward), tuple(backward), tuple(backward), (), parameters, shared)
        forward = [
            norm,
            *self.gather(),
            *self.forward_products(d, v),
            self.pass_over(1, self.tokens * v, "loss"),
            *self._over_shards(),
        ]
        overwrite = self.pass_over(2, self.tokens * v, "gradient of the loss")
        whole = [overwrite, *self.column_backward(d, (v,), False), *after]
        split = [overwrite, *self.column_backward(d, (v,), True), *after]
        weights = self.column_weights(d, v)
        return LayerWork(tuple(forward), tuple(whole), tuple(split), tuple(weights), parameters, shared)

    def _over_shards(self) -> list[Operation]:
        """Make the messages of the loss over the shards of the vocabulary: three fp32 numbers of each token."""
        if self.tp == 1:
            return []
        return [self._message("all_reduce", number * self.tokens, _FP32) for number in (1, 2)]

    def _in_pieces(self) -> tuple[list[Operation], list[Operation]]:
        """Make the head's passes in pieces of the vocabulary, one after another, without the norm."""
        length = -(-self.v // self.shape.head_pieces)
        pieces = [min(length, self.v - start) for start in range(0, self.v, length)]
        forward: list[Operation] = list(self.gather())
        backward: list[Operation] = []
        summed = self.tokens * self.d * (self.b + 2 * _FP32)  # the gradient of the input is summed in fp32
        for piece in pieces:
            logits = self.product(self.tokens, self.d, piece)
            forward += [logits, self.pass_over(1, self.tokens * piece, "loss")]
            backward += [
                logits,
                self.pass_over(2, self.tokens * piece, "gradient of the loss"),
                self.product(self.tokens, piece, self.d),
                Traffic(summed, "sum of gradients"),
                self.product(piece, self.tokens, self.d),
            ]
        forward += self._over_shards()
        backward += [Traffic(self.tokens * self.d * (self.b + _FP32), "cast"), *self.reduce()]
        return forward, [*backward, self.accumulated(self.v * self.d)]
