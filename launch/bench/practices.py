"""How other codes train: the operations of Megatron-LM and its kin, for steps that others have measured and published.

They are priced as this project's own (`parallel/plan/costs.py`), with the same constants; what differs is what a code
does, which its sources and papers say. GPT blocks have two matrices in the feed-forward network, LayerNorm, biases and
dropout; attention before FlashAttention multiplies whole squares and passes over them; one product makes queries, keys
and values. Kernels between the products are counted by the bytes that they read and write.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.plan.operations import Message, Operation, Product
from parallel.plan.work import LayerWork, RankLayers, Shape

_FP32 = 4


@dataclass(frozen=True)
class Practice:
    """What a code does.

    Attributes:
        flash: whether attention is one kernel; else two products over whole squares, and passes over them.
        dropout: whether attention's weights and both sums of a block have dropout, with masks of a byte.
        gated: whether the feed-forward network is SwiGLU, and the norm RMSNorm.
        overlaps_columns: whether gradients of inputs are reduced over tensor-parallel ranks while gradients of weights
            are computed (Megatron-LM since 2021-07).
        overlaps_rows: whether messages of sequence parallelism run in pieces beside their products
            (Transformer Engine's userbuffers): all but the first of as many pieces as there are ranks is hidden.
        adds_in_product: whether products of gradients of weights add to the accumulated one.
        gradient_bytes: of a parameter's gradient where replicas sum it.
        sharded: whether the optimizer is sharded over the replicas: weights are gathered after its step.
        overlaps_replicas: whether replicas sum gradients during the last backward passes, and gather weights during the
            first forward passes.
        links_block: whether a stage waits for its messages to others before it goes on.
        sequence_parallel: whether norms and residuals are cut along the sequence where ranks share matrices.
        tied: whether embedding and head share a matrix, whose gradients the first and the last stage sum.
    """

    flash: bool = False
    dropout: bool = True
    gated: bool = False
    overlaps_columns: bool = True
    overlaps_rows: bool = False
    adds_in_product: bool = True
    gradient_bytes: int = _FP32
    sharded: bool = False
    overlaps_replicas: bool = False
    links_block: bool = True
    sequence_parallel: bool = True
    tied: bool = True


PRACTICES = {
    # arXiv 2104.04473: fp16, interleaved schedule, scatter and gather between stages.
    "megatron-2021": Practice(overlaps_columns=False, adds_in_product=False, gradient_bytes=2, sequence_parallel=False),
    # arXiv 2205.05198.
    "megatron-2022": Practice(),
    # Megatron-DeepSpeed: DeepSpeed's pipeline, fp16; the optimizer whole on each replica, or ZeRO-1.
    "megatron-deepspeed": Practice(
        overlaps_columns=False, adds_in_product=False, gradient_bytes=2, sequence_parallel=False
    ),
    "megatron-deepspeed-zero1": Practice(
        overlaps_columns=False, adds_in_product=False, gradient_bytes=2, sharded=True, sequence_parallel=False
    ),
    # examples/pretrain_zero_bubble.sh of sail-sg/zero-bubble-pipeline-parallelism.
    "zero-bubble": Practice(flash=True, dropout=False, sharded=True, links_block=False, tied=False),
    # Megatron-LM's README: --overlap-grad-reduce --overlap-param-gather --tp-comm-overlap.
    "megatron-2024": Practice(
        flash=True, overlaps_rows=True, sharded=True, overlaps_replicas=True, links_block=False, tied=False
    ),
    # arXiv 2407.21783, section 3.3.
    "llama3": Practice(
        flash=True, dropout=False, gated=True, sharded=True, overlaps_replicas=True, links_block=False, tied=False
    ),
}


class PracticedLayers(RankLayers):
    """A rank's part of each kind of layer, as another code has it.

    Args:
        shape: the model and its cut.
        practice: what the code does.
        recompute: ``none``, ``selective`` (attention between its products and the projections, arXiv 2205.05198) or
            ``full``.
    """

    def __init__(self, shape: Shape, practice: Practice, recompute: str):
        super().__init__(shape)
        self.practice, self.recomputed = practice, recompute

    # ---- what differs from this project ----

    def weight_products(self, d_in: int, *widths: int) -> list[Operation]:
        """Make the products of the gradients of weights, and the additions to the accumulated ones."""
        if self.practice.adds_in_product:
            return super().weight_products(d_in, *widths)
        made: list[Operation] = []
        for width in widths:
            made += [self.product(width, self.tokens, d_in), self.accumulated(width * d_in)]
        return made

    def gather(self) -> list[Operation]:
        """Gather a rank's part of the sequence."""
        return self._hidden(super().gather())

    def reduce(self) -> list[Operation]:
        """Sum partial sums over the ranks, in place."""
        return self._hidden([one for one in super().reduce() if isinstance(one, Message)])

    def _hidden(self, operations: Sequence[Operation]) -> list[Operation]:
        """Leave of messages what is not hidden by their products."""
        if not self.practice.overlaps_rows:
            return list(operations)
        return [
            Message(one.operation, one.kind, one.ranks, one.num_bytes // one.ranks) if isinstance(one, Message) else one
            for one in operations
        ]

    def column_backward(self, d_in: int, widths: Sequence[int], deferring: bool) -> list[Operation]:
        """Make the backward pass of linear layers of one input, cut by columns."""
        if self.tp == 1 or self.practice.overlaps_columns:
            return super().column_backward(d_in, widths, deferring)
        weights = [] if deferring else self.weight_products(d_in, *widths)
        again = [] if deferring else self.gather()
        return [*again, *self.input_products(d_in, *widths), *self.reduce(), *weights]

    # ---- layers ----

    @property
    def _widths(self) -> list[tuple[int, int]]:
        """The input and output width of a block's linear layers: queries, keys and values; output; up; down."""
        up = 2 * self.f if self.practice.gated else self.f
        return [(self.d, self.q + 2 * self.kv), (self.q, self.d), (self.d, up), (self.f, self.d)]

    def block(self) -> LayerWork:
        """Make the work of a block."""
        (d, qkv), (q, _), (_, up), (f, _) = self._widths
        part, summed = self.part, 3.5 if self.practice.dropout else 3
        forward: list[Operation] = [
            self.pass_over(2, part * d, "norm"),
            *self.gather(),
            *self.forward_products(d, qkv),
            *self.core(backward=False),
            *self.forward_products(q, d),
            *self.reduce(),
            self.pass_over(summed, part * d, "sum with dropout"),
            self.pass_over(2, part * d, "norm"),
            *self.gather(),
            *self.forward_products(d, up),
            self.pass_over((up + f) / f, self.tokens * f, "activation"),
            *self.forward_products(f, d),
            *self.reduce(),
            self.pass_over(summed, part * d, "sum with dropout"),
        ]
        again = forward if self.recomputed == "full" else []
        matrices = sum(wide * out for wide, out in self._widths)
        norms = 2 * d if self.practice.gated else 4 * d
        deferred = [
            *self.weight_products(f, d),
            *self.column_weights(d, up),
            *self.weight_products(q, d),
            *self.column_weights(d, qkv),
        ]
        return LayerWork(
            tuple(forward),
            tuple(self._backward(again, deferring=False)),
            tuple(self._backward(again, deferring=True)),
            tuple(deferred),
            matrices + norms,
            norms if self.cut else 0,
        )

    def _backward(self, whole: Sequence[Operation], deferring: bool) -> list[Operation]:
        """Make a block's backward pass, with the forward pass that full recomputation repeats."""
        (d, qkv), (q, _), (_, up), (f, _) = self._widths
        part = self.part
        summed: list[Operation] = [self.pass_over(2.5, part * d, "dropout")] if self.practice.dropout else []
        norm = [self.pass_over(5, part * d, "gradient of a norm"), self.pass_over(3, part * d, "sum of gradients")]
        again = self.core(backward=False) if self.recomputed == "selective" and not self.practice.flash else []
        biases: list[Operation] = [] if self.practice.gated else [self.pass_over(1, self.tokens * (f + d), "biases")]
        return [
            *summed,
            *self.row_backward(f, d, deferring, whole),
            self.pass_over((2 * up + f) / f, self.tokens * f, "gradient of the activation"),
            *biases,
            *self.column_backward(d, (up,), deferring),
            *norm,
            *summed,
            *self.row_backward(q, d, deferring),
            *again,
            *self.core(backward=True),
            *self.column_backward(d, (qkv,), deferring),
            *norm,
        ]

    def core(self, backward: bool) -> list[Operation]:
        """Make attention between its projections."""
        rotary = [self.pass_over(2, self.tokens * (self.q + self.kv), "rotary")] if self.practice.gated else []
        if self.practice.flash:
            return [*rotary, self.attention(backward)]
        shape = self.shape
        squares = shape.micro_batch * self.heads
        cells = squares * shape.seq_len**2
        dropped = [self.pass_over(2.5, cells, "dropout")] if self.practice.dropout else []
        copy = self.pass_over(2, self.tokens * self.q, "reordered")
        length = shape.seq_len
        scores = Product(length, self.d_head, length, squares, self.b)
        values = Product(length, length, self.d_head, squares, self.b)
        if not backward:
            return [scores, self.pass_over(2, cells, "softmax"), *dropped, values, copy]
        return [copy, values, scores, *dropped, self.pass_over(3, cells, "gradient of softmax"), values, values, copy]

    def head(self) -> LayerWork:
        """Make the work of the last norm, the projection, and the loss in fp32 in several kernels."""
        d, part, v = self.d, self.part, self.v
        loss = [self.pass_over(12, self.tokens * v, "loss"), *self._over_shards()]
        forward = [self.pass_over(2, part * d, "norm"), *self.gather(), *self.forward_products(d, v), *loss]
        after: list[Operation] = [self.pass_over(5, part * d, "gradient of a norm")]
        gradient = self.pass_over(6, self.tokens * v, "gradient of the loss")
        whole = (gradient, *self.column_backward(d, (v,), False), *after)
        split = (gradient, *self.column_backward(d, (v,), True), *after)
        return LayerWork(tuple(forward), whole, split, tuple(self.column_weights(d, v)), v * d, 0)
