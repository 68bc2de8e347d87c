"""What prefill and decoding multiply and move, and the seconds that a device needs for it at least: its roofline.

A pass is cut into parts that run one after another. A part takes as long as its multiplications take at the device's
peak or its bytes take at the bandwidth of its memory, whichever is longer (Williams, Waterman and Patterson,
"Roofline", CACM 2009). FLOPs over bytes is the part's arithmetic intensity; below the ridge of the device, its peak
over its bandwidth, the memory is what bounds it.

Of B sequences, H query heads of width K on G key/value heads, b bytes a value, a sequence of T tokens:

    prefill   attention multiplies 4 H K T^2/2 a block and sequence, the causal half, however many heads G has, and
              reads queries, keys and values once, as flash attention does (arXiv 2205.14135)
    decode    attention multiplies 4 H K (T + 1) a block and sequence, and reads 2 G K b (T + 1) bytes of the cache:
              2 H / (G b) FLOPs a byte, which no batch and no length changes. That is the group size in bf16.
    products  a matrix of k x n multiplies 2 m k n, with m = B T rows in a prefill and B in decoding, and is read once:
              about 2 m / b FLOPs a byte, so that a batch makes up for reading the weights, and not for the cache

A block with a window of W tokens has the band of its prefill, and min(T + 1, W) tokens in its cache.
"""

from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum
from math import inf

from model.config import ModelConfig
from parallel.layout import Recompute
from parallel.plan.cluster import Cluster
from parallel.plan.operations import Attention, Message, Operation, Product, Traffic
from parallel.plan.work import RankLayers, Shape

PARTS = ("products", "attention", "head", "between", "messages")
"""Parts of a pass: the matrices of the blocks; attention and the cache; the output head on one token of each sequence;
lookup, norms, rotary positions, SwiGLU's product and sums, each kernel fused as compiled ones are; and what
tensor-parallel ranks send each other."""


class Phase(Enum):
    """What a model does at inference."""

    prefill = "prefill"
    """The first pass, over the whole prompt of each sequence."""
    decode = "decode"
    """A step that adds a token to each sequence."""


@dataclass(frozen=True)
class Work:
    """What a part of a pass multiplies and moves on one rank.

    Attributes:
        flops: multiplications and additions of matrix products and attention, the causal half counted.
        weights: bytes of weights that are read.
        cache: bytes of the KV cache, read and written.
        activations: bytes of everything else, read and written by each kernel.
        sent: bytes that a rank sends in a ring.
    """

    flops: float = 0.0
    weights: float = 0.0
    cache: float = 0.0
    activations: float = 0.0
    sent: float = 0.0

    @property
    def num_bytes(self) -> float:
        """The bytes that memory reads and writes."""
        return self.weights + self.cache + self.activations

    @property
    def intensity(self) -> float:
        """FLOPs a byte; 0 where no memory is moved."""
        return self.flops / self.num_bytes if self.num_bytes else 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.weights + other.weights,
            self.cache + other.cache,
            self.activations + other.activations,
            self.sent + other.sent,
        )

    def times(self, number: int) -> "Work":
        """Return the work of so many of these."""
        values = (self.flops, self.weights, self.cache, self.activations, self.sent)
        return Work(*(number * value for value in values))


@dataclass(frozen=True)
class Ceilings:
    """The most that a device does in a second.

    Attributes:
        name: of the device.
        source: where the figures are from.
        product_flops, attention_flops: FLOP/s of matrix products and of attention.
        bytes_per_second: of its memory.
        sent_per_second: bytes to other ranks, in one direction.
        memory_bytes: what weights and caches may fill; None where that is not known.
    """

    name: str
    source: str
    product_flops: float
    attention_flops: float
    bytes_per_second: float
    sent_per_second: float = inf
    memory_bytes: float | None = None

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which products are bound by multiplication."""
        return self.product_flops / self.bytes_per_second

    def seconds(self, part: str, work: Work) -> float:
        """Return the least seconds of a part."""
        return max(self._needs(part, work).values())

    def bound(self, part: str, work: Work) -> str:
        """Return what a part waits for: ``compute``, ``memory`` or ``links``."""
        needs = self._needs(part, work)
        return max(needs, key=lambda what: needs[what])

    def _needs(self, part: str, work: Work) -> dict[str, float]:
        rate = self.attention_flops if part == "attention" else self.product_flops
        return {
            "memory": work.num_bytes / self.bytes_per_second,
            "compute": work.flops / rate,
            "links": work.sent / self.sent_per_second,
        }


def ceilings_of(cluster: Cluster, bytes_per_value: int = 2, tp: int = 1, achieved: bool = False) -> Ceilings:
    """Return the ceilings of a cluster's GPUs.

    Args:
        cluster: the preset or file.
        bytes_per_value: 2 for bf16, 4 for fp32, which has a peak of its own.
        tp: the ranks that share every matrix; beyond a machine they send over its network.
        achieved: whether to take the best that kernels have been seen to reach (`product_share`,
            `attention_forward_share`, `hbm_share`, `intra_share`, `inter_share`) in the place of the data sheet's.
            Latencies are in neither.
    """
    peak = 1e12 * (cluster.peak_fp32_tflops if bytes_per_value == 4 else cluster.peak_tflops)
    shares = {name: getattr(cluster, name) if achieved else 1.0 for name in ("product_share", "hbm_share")}
    attention, intra, inter = (
        getattr(cluster, f"{name}_share") if achieved else 1.0 for name in ("attention_forward", "intra", "inter")
    )
    within, between = 1e9 * cluster.intra_gb_per_s * intra, 1e9 * cluster.inter_gb_per_s * inter
    gpus = cluster.gpus_per_node
    return Ceilings(
        cluster.name,
        "best rates that kernels reach" if achieved else "data sheet",
        peak * shares["product_share"],
        peak * attention,
        1e9 * cluster.hbm_gb_per_s * shares["hbm_share"],
        within if tp <= gpus else min(within, between * gpus),
        cluster.allocatable_bytes,
    )


def pass_work(
    model: ModelConfig, phase: Phase, batch: int, context: int, tp: int = 1, bytes_per_value: int = 2
) -> dict[str, Work]:
    """Count what one rank multiplies and moves in a pass of all layers.

    The operations are those that plans count (`parallel.plan.work`), without a loss; attention in decoding and the head
    on one token of each sequence are counted here.

    Args:
        model: the shape.
        phase: a prefill of ``context`` tokens, or a step with that many in the caches already.
        batch: the number of sequences.
        context: the tokens of each.
        tp: the ranks that share every matrix. Where there are fewer key/value heads than ranks, several hold the same.
        bytes_per_value: of weights, activations and cache.

    Returns:
        The work by part, in the order of `PARTS`.
    """
    found = dict.fromkeys(PARTS, Work())
    tokens = context if phase is Phase.prefill else 1
    for window, blocks in Counter(model.windows).items():
        rank = _rank(model, batch, tokens, tp, bytes_per_value, window)
        for one in rank.block().forward:
            if isinstance(one, Attention):
                of = _prefill_attention(one, rank) if phase is Phase.prefill else _decode_attention(rank, context)
                found["attention"] += of.times(blocks)
            else:
                part, work = _counted(one)
                found[part] += work.times(blocks)
    rank = _rank(model, batch, tokens, tp, bytes_per_value, None)
    norms = (2 * model.n_layers + 1) * model.d_model * bytes_per_value
    found["between"] += Work(weights=norms)
    for one in rank.embedding().forward:
        part, work = _counted(one)
        found[part] += work
    found["head"] += _head(_rank(model, batch, 1, tp, bytes_per_value, None))
    if tp > 1:
        found["messages"] += _sent(4 * batch * model.vocab_size, (tp - 1) / tp)  # each rank gets all logits, fp32
    return found


def _rank(model: ModelConfig, batch: int, tokens: int, tp: int, bytes_per_value: int, window: int | None) -> RankLayers:
    dimensions = (model.d_model, model.n_heads, model.n_kv_heads, model.d_head, model.d_ff, model.vocab_size)
    return RankLayers(Shape(dimensions, tp, False, batch, tokens, bytes_per_value, Recompute.none, 1, window))


def _counted(one: Operation) -> tuple[str, Work]:
    """Count an operation that is no attention; return its part as well."""
    if isinstance(one, Product):
        moved = one.batch * (one.m * one.k + one.m * one.n) * one.bytes_per_value
        weights = one.batch * one.k * one.n * one.bytes_per_value
        return "products", Work(one.flops, weights=weights, activations=moved)
    if isinstance(one, Traffic):
        return "between", Work(activations=one.num_bytes)
    assert isinstance(one, Message) and one.operation == "all_reduce", one  # a token cannot be cut along the sequence
    return "messages", _sent(one.num_bytes, 2 * (one.ranks - 1) / one.ranks)


def _sent(num_bytes: float, share: float) -> Work:
    return Work(sent=num_bytes * share)


def _prefill_attention(one: Attention, rank: RankLayers) -> Work:
    """Count flash attention over whole prompts, and the copy of their keys and values into an empty cache."""
    sequences, b = one.batch, rank.b
    kept = sequences * 2 * rank.kv * min(one.length, one.window or one.length) * b
    moved = rank.tokens * (2 * rank.q + 2 * rank.kv) * b
    return Work(one.flops, cache=kept, activations=moved + kept)


def _decode_attention(rank: RankLayers, context: int) -> Work:
    """Count the attention of a new token of each sequence to the cache, which it is added to first."""
    sequences, b, window = rank.shape.micro_batch, rank.b, rank.shape.window
    seen = min(context + 1, window or context + 1)
    flops = 4.0 * sequences * rank.q * seen
    # A query and a result of q values; a key and a value, read from the products' outputs and written to the cache.
    return Work(
        flops,
        cache=sequences * 2 * rank.kv * (seen + 1) * b,
        activations=sequences * (2 * rank.q + 2 * rank.kv) * b,
    )


def _head(rank: RankLayers) -> Work:
    """Count the choice of a token of each sequence, its norm, its logits, and their cast to fp32."""
    _, projected = _counted(rank.product(rank.tokens, rank.d, rank.v))
    cast = (rank.b + 4) * rank.tokens * rank.v if rank.b != 4 else 0
    return projected + Work(activations=4 * rank.tokens * rank.d * rank.b + cast)


def weight_bytes(model: ModelConfig, tp: int = 1, bytes_per_value: int = 2) -> int:
    """Return the bytes of the weights that a rank of `tp` holds, the embedding included."""
    rank = _rank(model, 1, 1, tp, bytes_per_value, None)
    parameters = rank.embedding().parameters + model.n_layers * rank.block().parameters + rank.head().parameters
    return parameters * bytes_per_value


def cache_bytes(model: ModelConfig, context: int, tp: int = 1, bytes_per_value: int = 2) -> int:
    """Return the bytes of a sequence's keys and values that a rank of `tp` holds."""
    own = max(model.n_kv_heads // tp, 1)
    return replace(model, n_kv_heads=own).kv_cache_bytes(context, bytes_per_value)
