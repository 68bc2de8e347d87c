"""What one rank of a check measures together with the others: a matrix product, memory, and its links.

All ranks compute at the same time, and all groups of a kind send at the same time, as they do in a step. Everything is
measured in several rounds, of which the best counts: what is slow in one round alone was disturbed, and what is slow in
all of them is slow.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from launch.bench.common import copy_bytes, device_name, product_flops, seconds_of, synchronised
from parallel.groups import Ranks, make_ranks
from parallel.layout import Layout
from parallel.schedules import Placement

ROUNDS = 3
REPEATS, SMALL_REPEATS = 5, 25
"""Messages of the largest and of the other sizes in a round, of which the median counts."""
GPU_SIZES, CPU_SIZES = (2**12, 2**20, 2**26), (2**12, 2**18, 2**22)
"""Bytes of the messages: the smallest shows the latency, the largest the bandwidth."""


@dataclass(frozen=True)
class Request:
    """What is to be checked: a layout, and in which precision.

    Attributes:
        layout: the rank grid.
        placement: the placement of the stages on the ranks of a pipeline, whose links are those of the schedule.
        kv_copies: the number of neighbouring tensor-parallel ranks that hold the same key/value head.
        bf16: whether products are in bf16, else in fp32; None goes by each rank's device, as a run does.
    """

    layout: Layout
    placement: Placement
    kv_copies: int = 1
    bf16: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """Turn it into what JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "Request":
        """Read what `as_json` made."""
        layout, placement = Layout(**found["layout"]), Placement(**found["placement"])
        return Request(layout, placement, found["kv_copies"], found["bf16"])


@dataclass(frozen=True)
class LinkTime:
    """The time of a message, as one of its ranks saw it.

    Attributes:
        kind: ``pp``, ``tp`` or ``dp``, by which the ranks are of one group.
        operation: ``send`` (there and back, halved), ``all_gather``, ``reduce_scatter`` or ``all_reduce``.
        ranks: the global ranks that it goes between.
        num_bytes: of the whole tensor.
        seconds: of one message.
    """

    kind: str
    operation: str
    ranks: tuple[int, ...]
    num_bytes: int
    seconds: float

    @property
    def bus_bytes(self) -> float:
        """The bytes that the slowest link of a ring carries: what nccl-tests calls the bus bandwidth, times seconds."""
        steps = 2.0 if self.operation == "all_reduce" else 1.0
        share = 1.0 if self.operation == "send" else (len(self.ranks) - 1) / len(self.ranks)
        return steps * share * self.num_bytes


@dataclass(frozen=True)
class RankFindings:
    """What a rank has measured.

    Attributes:
        rank: the global rank.
        host: the name of its machine.
        device: the name of its device.
        product_flops: FLOP/s of a large matrix product.
        copy_bytes: bytes per second that a copy reads and writes.
        links: the times of messages.
        cores: of the machine, where they compute; None with a GPU.
    """

    rank: int
    host: str
    device: str
    product_flops: float
    copy_bytes: float
    links: list[LinkTime]
    cores: int | None = None

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "RankFindings":
        """Read what `dataclasses.asdict` made."""
        links = [LinkTime(**{**link, "ranks": tuple(link["ranks"])}) for link in found["links"]]
        return RankFindings(**{**found, "links": links})


def measure(request: Request, device: torch.device, group: Any) -> RankFindings:
    """Measure this rank and its links. All ranks call it together.

    Args:
        request: the layout.
        device: of this rank.
        group: of all ranks, over the CPU, by which they begin each measurement together.
    """
    ranks = make_ranks(request.layout, request.placement, request.kv_copies)
    bf16 = device.type == "cuda" if request.bf16 is None else request.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    products, copies = [], []
    for _ in range(ROUNDS):
        dist.barrier(group)
        products.append(product_flops(device, dtype))
        dist.barrier(group)
        copies.append(copy_bytes(device))
    links = link_times(ranks, device, group)
    cores = len(os.sched_getaffinity(0)) if device.type == "cpu" else None
    place = ranks.rank, socket.gethostname(), device_name(device)
    return RankFindings(*place, max(products), max(copies), links, cores)


def link_times(
    ranks: Ranks, device: torch.device, group: Any, before: Callable[[], object] | None = None
) -> list[LinkTime]:
    """Measure this rank's links in several rounds. All ranks call it together.

    Args:
        ranks: this process in the rank grid, and its groups.
        device: of this rank.
        group: as for `measure`.
        before: what a rank computes before each collective, as in a step: the time of a collective is then that from
            the end of it, the waiting for ranks that are at it longer included, and the mean over all.
    """
    seconds: dict[tuple[str, str, tuple[int, ...], int], float] = {}
    for _ in range(ROUNDS):
        for key, found in _round(ranks, device, group, before):
            seconds[key] = min(found, seconds.get(key, found))
    return [LinkTime(*what, found) for what, found in seconds.items()]


def _round(
    ranks: Ranks, device: torch.device, group: Any, before: Callable[[], object] | None
) -> Iterator[tuple[tuple[str, str, tuple[int, ...], int], float]]:
    """Yield the key and the seconds of each message of a round, in an order that is the same on all ranks."""
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    for pair in sorted({(min(link), max(link)) for link in ranks.placement.links}):
        for size in sizes:
            dist.barrier(group)
            if ranks.pp_rank in pair:
                members = tuple(ranks.pipeline[end] for end in pair)
                run = _there_and_back(ranks, pair, size, device)
                yield (
                    ("pp", "send", members, size),
                    seconds_of(run, device, _repeats(size, sizes)) / 2,
                )
    layout, rank = ranks.layout, ranks.rank
    first = rank - layout.tp_rank(rank)
    replica_0 = rank - layout.replica(rank) * layout.tp
    members_of = {
        "tp": tuple(range(first, first + layout.tp)),
        "dp": tuple(range(replica_0, replica_0 + layout.dp * layout.tp, layout.tp)),
    }
    for kind, of_kind in (("tp", ranks.tp), ("dp", ranks.dp)):
        if of_kind is None:
            continue
        for operation in ("all_gather", "reduce_scatter", "all_reduce"):
            for size in sizes:
                dist.barrier(group)
                run = _collective(operation, len(members_of[kind]), size, of_kind, device)
                times = _repeats(size, sizes)
                taken = _mean_after(before, run, device, times) if before else seconds_of(run, device, times)
                yield (kind, operation, members_of[kind], size), taken


def _mean_after(before: Callable[[], object], run: Callable[[], object], device: torch.device, times: int) -> float:
    taken = 0.0
    for number in range(times + 1):
        before()
        begin = synchronised(device)
        run()
        taken += synchronised(device) - begin if number else 0.0  # the first opens connections
    return taken / times


def _collective(operation: str, size: int, num_bytes: int, group: Any, device: torch.device) -> Callable[[], Any]:
    """Return a function that runs a collective over a tensor of about so many bytes, fp32."""
    part = torch.zeros(max(num_bytes // 4 // size, 1), device=device)
    whole = torch.zeros(part.numel() * size, device=device)
    if operation == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if operation == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    return lambda: dist.all_reduce(whole, group=group)


def _repeats(size: int, sizes: Sequence[int]) -> int:
    return REPEATS if size == sizes[-1] else SMALL_REPEATS


def _there_and_back(ranks: Ranks, pair: tuple[int, int], num_bytes: int, device: torch.device) -> Callable[[], None]:
    """Return a function that sends a message to another rank of the pipeline and back again, from both of them."""
    tensor = torch.zeros(num_bytes // 4, device=device)
    low, high = pair
    there, back = ranks.links.get((low, high)), ranks.links.get((high, low))
    there, back = there or back, back or there  # a link that is used in one direction only

    def run() -> None:
        if ranks.pp_rank == low:
            dist.send(tensor, ranks.pipeline[high], group=there)
            dist.recv(tensor, ranks.pipeline[high], group=back)
        else:
            dist.recv(tensor, ranks.pipeline[low], group=there)
            dist.send(tensor, ranks.pipeline[low], group=back)

    return run
