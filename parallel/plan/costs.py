"""The seconds of operations on a cluster, and of passes that consist of them.

- A matrix product is cut into tiles that run in waves over the multiprocessors, and the last wave is seldom full; it
  takes no less than its bytes take in memory. Where shapes have been measured, the nearest gives the rate.
- Attention reaches its best rate with long sequences: n / (n + half_length) of it with n tokens. Within a window n is
  the sequence whose queries see as many keys on average, which nothing has been measured for.
- A kernel that is bound by memory takes its bytes over the bandwidth.
- A message is a ring over the ranks of its group: its steps have a latency, within or between machines, and its bytes
  cross the slowest link, which between machines is the network of all ranks of the group in a machine. NCCL chooses
  among its protocols by the same formula (`src/graph/tuning.cc`), from which the latencies are.
- A message beside computation takes some multiprocessors from it.
- Kernels follow each other at some microseconds, and a host needs more of them to queue an operation: a pass takes at
  least as long as its host.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import log

from model.config import seen_pairs
from parallel.layout import Layout
from parallel.plan.cluster import Cluster
from parallel.plan.operations import Attention, GroupKind, Message, Operation, Product, Traffic, Wait

_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.93), (128, 64, 0.8), (64, 128, 0.8), (64, 64, 0.6))
"""Rows and columns of the tiles that a library chooses from, and the share of the best rate that each reaches where
all multiprocessors are busy: small tiles load their inputs more often."""
_PROLOGUE = 64
"""The inner width that a product loses to the start and the end of each tile."""
_HEAD_WIDTH = 128
"""The width of a head for which attention's shares are given; a narrower one has less to multiply a value by."""


@dataclass(frozen=True)
class Reach:
    """Where the ranks of a group are.

    Attributes:
        ranks: how many they are.
        in_node: how many of them are in a machine.
    """

    ranks: int
    in_node: int

    @property
    def nodes(self) -> int:
        """The number of machines that they are in."""
        return -(-self.ranks // self.in_node)


def reaches(layout: Layout, gpus_per_node: int) -> dict[GroupKind, Reach]:
    """Return where the groups of a layout are; tp varies fastest over the GPUs, then dp, then pp.

    A message between stages is between machines if any of the neighbours are in different ones.
    """
    tp, dp, pp = layout.tp, layout.dp, layout.pp
    in_node = min(tp, gpus_per_node)
    world = layout.world_size
    return {
        GroupKind.tp: Reach(tp, in_node),
        GroupKind.sharing: Reach(tp, in_node),
        GroupKind.dp: Reach(dp, min(dp, max(gpus_per_node // tp, 1))),
        GroupKind.pp: Reach(2, 2 if world <= gpus_per_node or pp == 1 else 1),
        GroupKind.world: Reach(world, min(world, gpus_per_node)),
    }


class Prices:
    """The seconds of each operation.

    Args:
        cluster: the cluster.
        bytes_per_value: of the products; 4 is fp32, which has a peak of its own.
    """

    def __init__(self, cluster: Cluster, bytes_per_value: int = 2):
        self.cluster = cluster
        self.beside = cluster.has_gpus
        """Whether messages run beside computation; cores that compute are those that send as well."""
        self.launch, self.host = cluster.launch_us * 1e-6, cluster.host_us * 1e-6
        peak = cluster.peak_fp32_tflops if bytes_per_value == 4 else cluster.peak_tflops
        self._peak = 1e12 * peak * cluster.slowest_share
        taken = min(cluster.message_units, cluster.tile_units // 2)
        self.slows = taken / (cluster.tile_units - taken) if taken else 0.0
        """The share by which computation takes longer while a message runs beside it."""
        self._memory = cluster.hbm_gb_per_s * 1e9 * cluster.hbm_share
        self._intra = cluster.intra_gb_per_s * 1e9 * cluster.intra_share
        self._inter = cluster.inter_gb_per_s * 1e9 * cluster.inter_share

    def product(self, one: Product) -> float:
        """Return the seconds of a matrix product."""
        if self.cluster.products:  # what it waits for memory was measured with it
            return one.flops / self._measured_rate(one) + self.launch
        moved = one.batch * (one.m * one.k + one.k * one.n + one.m * one.n) * one.bytes_per_value
        return max(one.flops / self._product_rate(one), moved / self._memory) + self.launch

    def _product_rate(self, one: Product) -> float:
        rate = self._peak * self.cluster.product_share
        if not self.cluster.tile_units:
            return rate
        best = 0.0
        for rows, columns, share in _TILES:
            tiles = one.batch * -(-one.m // rows) * -(-one.n // columns)
            waves = -(-tiles // self.cluster.tile_units)
            filled = one.batch * one.m * one.n / (waves * self.cluster.tile_units * rows * columns)
            best = max(best, share * filled)
        return rate * best * one.k / (one.k + _PROLOGUE)

    def _measured_rate(self, one: Product) -> float:
        """Return the rate of the measured product whose sizes are nearest, by the ratios of m, k and n."""

        def distance(row: list[float]) -> float:
            return sum(log(size / measured) ** 2 for size, measured in zip((one.m, one.k, one.n), row, strict=False))

        return min(self.cluster.products, key=distance)[3] * 1e12 * self.cluster.slowest_share

    def attention(self, one: Attention) -> float:
        """Return the seconds of a flash attention kernel."""
        cluster = self.cluster
        share = cluster.attention_backward_share if one.backward else cluster.attention_forward_share
        length = 2 * seen_pairs(one.length, one.window) / one.length
        share *= length / (length + cluster.attention_half_length)
        share *= min(1.0, one.d_head / _HEAD_WIDTH) ** 0.25
        return one.flops / (self._peak * share) + self.launch

    def traffic(self, num_bytes: float) -> float:
        """Return the seconds of a kernel that is bound by memory."""
        return num_bytes / self._memory + self.launch

    def message(self, operation: str, num_bytes: float, reach: Reach) -> float:
        """Return the seconds of a message.

        Args:
            operation: of `parallel.plan.operations.Message`.
            num_bytes: of the whole tensor.
            reach: where the ranks of the group are.
        """
        n, nodes = reach.ranks, reach.nodes
        if n == 1:
            return 0.0
        bandwidth = self._intra if nodes == 1 else min(self._intra, self._inter * reach.in_node)
        rounds = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "barrier": 2}.get(operation)
        if rounds is None:  # between two ranks
            steps, crossed = 1, nodes - 1
        else:
            steps, crossed = rounds * (n - 1), rounds * (nodes - 1)
            num_bytes = rounds * num_bytes * (n - 1) / n
        return min(
            1e-6 * (base + (steps - crossed) * intra + crossed * inter) + num_bytes / (bandwidth * share)
            for share, base, intra, inter in self.cluster.protocols
        )

    def agreement(self, reach: Reach) -> float:
        """Return the seconds of an all-reduce of a few numbers: a tree, up and down."""
        if reach.ranks == 1:
            return 0.0
        _, base, intra, inter = min(self.cluster.protocols, key=lambda row: row[2])
        up = (reach.in_node - 1) * intra + (reach.nodes - 1).bit_length() * inter
        return 1e-6 * (base + 2 * up)


@dataclass
class PassTime:
    """The seconds of a pass on a rank, and where they go.

    Attributes:
        products, attention, traffic: computation, by kind.
        exposed: messages of tensor parallelism while nothing is computed, and by which they slow what is.
        host: seconds that the device waits for its host.
    """

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    exposed: float = 0.0
    host: float = 0.0
    _host_busy: float = field(default=0.0, repr=False)

    @property
    def seconds(self) -> float:
        """Of the whole pass."""
        return self.products + self.attention + self.traffic + self.exposed + self.host

    def add(self, other: "PassTime", times: float = 1) -> None:
        """Add a layer's pass, so many times."""
        self.products += times * other.products
        self.attention += times * other.attention
        self.traffic += times * other.traffic
        self.exposed += times * other.exposed
        self._host_busy += times * other._host_busy

    def wait_for_host(self) -> "PassTime":
        """Have the pass take no less than its host; return it."""
        self.host = 0.0
        self.host = max(self._host_busy - self.seconds, 0.0)
        return self


def pass_time(operations: Iterable[Operation], prices: Prices, where: Mapping[GroupKind, Reach]) -> PassTime:
    """Return the time of operations that a compute stream runs one after another, and messages beside it.

    The messages of a group run one after another, as on a stream of its own. Where they do not run beside computation
    (`Prices.beside`), each is waited for at once.
    """
    found = PassTime()
    now, streams = 0.0, dict.fromkeys(GroupKind, 0.0)
    begins: dict[int, float] = {}
    ends: dict[int, float] = {}
    for one in operations:
        if not isinstance(one, Wait):
            found._host_busy += prices.host
        if isinstance(one, Product):
            seconds = prices.product(one)
            found.products += seconds
            now += seconds
        elif isinstance(one, Attention):
            seconds = prices.attention(one)
            found.attention += seconds
            now += seconds
        elif isinstance(one, Traffic):
            seconds = prices.traffic(one.num_bytes)
            found.traffic += seconds
            now += seconds
        else:
            if isinstance(one, Message):
                begin = max(now, streams[one.kind])
                end = begin + prices.message(one.operation, one.num_bytes, where[one.kind])
                streams[one.kind] = ends[one.index] = end
                begins[one.index] = now
                if one.index >= 0 and prices.beside:
                    continue
            # The message has taken its multiprocessors from what was computed since it began.
            slowed = max(min(ends[one.index], now) - begins[one.index], 0.0) * prices.slows
            late = max(ends[one.index] - now, slowed)
            found.exposed += late
            now += late
    return found
