"""What a rank does in a pass, operation by operation: the language that dry runs record and costs are counted in.

A compute stream runs `Product`, `Attention` and `Traffic` one after another; a `Message` that is not awaited at once
runs beside it until its `Wait`.
"""

from dataclasses import dataclass
from enum import Enum

from model.config import seen_pairs


class GroupKind(Enum):
    """The ranks that a message goes between."""

    tp = "tp"
    """Those that share every matrix."""
    sharing = "sharing"
    """Those of them that hold the same key/value head."""
    dp = "dp"
    """Those that hold the same part of the model."""
    pp = "pp"
    """Two neighbours in a pipeline, or all of it."""
    world = "world"
    """All of them."""


@dataclass(frozen=True)
class Product:
    """A matrix product (batch, m, k) x (batch, k, n).

    Attributes:
        m, k, n: its sizes.
        batch: the number of products of this size, run by one kernel.
        bytes_per_value: of its inputs and its output.
    """

    m: int
    k: int
    n: int
    batch: int = 1
    bytes_per_value: int = 2

    @property
    def flops(self) -> float:
        """Its multiplications and additions."""
        return 2.0 * self.batch * self.m * self.k * self.n


@dataclass(frozen=True)
class Attention:
    """Causal attention of a micro-batch, by a flash kernel.

    Attributes:
        batch, length: sequences and their tokens.
        heads, kv_heads, d_head: of this rank.
        backward: whether it is the gradient.
        bytes_per_value: of queries, keys and values.
        window: the tokens that a query sees, itself included; None for all before it.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    d_head: int
    backward: bool = False
    bytes_per_value: int = 2
    window: int | None = None

    @property
    def flops(self) -> float:
        """Those of the pairs that are seen: two products forward, and five backward, where scores are recomputed."""
        product = 2.0 * self.batch * self.heads * self.d_head * seen_pairs(self.length, self.window)
        return (5 if self.backward else 2) * product


@dataclass(frozen=True)
class Traffic:
    """A kernel that is bound by memory: norms, rotary positions, additions, casts, Adam.

    Attributes:
        num_bytes: read and written.
        name: what it is.
    """

    num_bytes: int
    name: str = ""


@dataclass(frozen=True)
class Message:
    """A collective or a message between two ranks.

    Attributes:
        operation: all_reduce, all_gather, reduce_scatter, broadcast, barrier, send or receive.
        kind: the ranks that it goes between.
        ranks: how many they are.
        num_bytes: of the whole tensor: what an all-gather ends with and a reduce-scatter begins with.
        index: by which its `Wait` names it, unique in a rank's step; -1 where the compute stream waits at once.
    """

    operation: str
    kind: GroupKind
    ranks: int
    num_bytes: int
    index: int = -1


@dataclass(frozen=True)
class Wait:
    """The compute stream waits for a message.

    Attributes:
        index: of the message.
    """

    index: int


Operation = Product | Attention | Traffic | Message | Wait
