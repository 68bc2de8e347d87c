"""What a check has found: a table by host and rank, who is slower than its like, and the links of the cluster."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from launch.check.measure import LinkTime, RankFindings
from launch.tables import rendered

_NAMES = {"all_gather": "gather", "reduce_scatter": "scatter", "all_reduce": "reduce", "send": "send"}


@dataclass(frozen=True)
class Verdict:
    """Who is slow, and what could not be judged.

    Attributes:
        odd: a sentence for each rank or group that is slower than the median of its like.
        alone: what there is only one of, so that it has no like.
        shared: machines without GPUs whose ranks share cores, and so disturb each other's measurements.
    """

    odd: list[str]
    alone: list[str]
    shared: list[str]


def judge(found: Sequence[RankFindings], percent: float) -> Verdict:
    """Compare each rank with all others of the same device, and each group with those of its kind.

    Links inside a machine are compared with links inside machines, and those between machines with each other.

    Args:
        found: of all ranks, in order.
        percent: how much slower than the median something is that is named.
    """
    hosts = {one.rank: one.host for one in found}
    odd, alone = [], []
    for name, rates in (
        ("matrix product", {one.rank: one.product_flops for one in found}),
        ("memory", {one.rank: one.copy_bytes for one in found}),
    ):
        for device in dict.fromkeys(one.device for one in found):
            of_device = {one.rank: rates[one.rank] for one in found if one.device == device}
            if len(of_device) == 1:
                alone.append(f"the {name} of rank {next(iter(of_device))} ({device})")
            odd += [
                f"rank {rank} on {hosts[rank]}: its {name} is {slower:.0f} % slower than the median of {len(of_device)}"
                for rank, slower in _slower(of_device, percent)
            ]
    slow_groups: dict[tuple[int, ...], None] = {}
    for what, like in _like_links(found, hosts).items():
        if len(like) == 1:
            alone.append(f"{what} of ranks {_listed(next(iter(like)))}")
        for ranks, slower in _slower(like, percent):
            where = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
            odd.append(
                f"ranks {_listed(ranks)} on {where}: {what} is {slower:.0f} % slower than the median of {len(like)}"
            )
            slow_groups[ranks] = None
    if len(slow_groups) > 1 and (common := set.intersection(*map(set, slow_groups))):
        odd += [f"rank {rank} on {hosts[rank]} is in all of the slow groups" for rank in sorted(common)]
    return Verdict(odd, alone, _sharing_cores(found))


def _sharing_cores(found: Sequence[RankFindings]) -> list[str]:
    said = []
    for host in dict.fromkeys(one.host for one in found):
        own = [one for one in found if one.host == host]
        cores = own[0].cores
        if cores is not None and len(own) > cores:
            said.append(f"{len(own)} ranks on {host} share {cores} cores, and some were slower for the others' work")
    return said


def _slower(rates: dict, percent: float) -> Iterable[tuple]:
    """Yield the keys of rates that are lower than the median by so many percent, and by how many, slowest first.

    Of two, each is compared with the faster one.
    """
    if len(rates) < 2:
        return
    median = statistics.median_high(rates.values())
    for key, rate in sorted(rates.items(), key=lambda item: item[1]):
        if rate < median * (1 - percent / 100):
            yield key, 100 * (1 - rate / median)


def _like_links(found: Sequence[RankFindings], hosts: dict[int, str]) -> dict[str, dict[tuple[int, ...], float]]:
    """Return the rate of each group with the smallest and the largest message, by what is alike.

    A group is as fast as the slowest of its ranks says.
    """
    seconds: dict[tuple[str, str, int, tuple[int, ...]], float] = defaultdict(float)
    for link in (link for one in found for link in one.links):
        key = link.kind, link.operation, link.num_bytes, link.ranks
        seconds[key] = max(seconds[key], link.seconds)
    sizes = {size for _, _, size, _ in seconds}
    like: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
    for (kind, operation, size, ranks), taken in sorted(seconds.items()):
        if size not in (min(sizes), max(sizes)):
            continue
        place = "in a machine" if len({hosts[rank] for rank in ranks}) == 1 else "between machines"
        like[f"{kind} {_NAMES[operation]} of {_size(size)} {place}"][ranks] = 1 / taken
    return dict(like)


def table(found: Sequence[RankFindings]) -> str:
    """Render the rates of all ranks as text, by host and rank.

    Bandwidths are those of a group's slowest link with the largest message, latencies the seconds of the smallest.
    """
    kinds = list(dict.fromkeys(link.kind for one in found for link in one.links))
    operations = {
        kind: list(dict.fromkeys(link.operation for one in found for link in one.links if link.kind == kind))
        for kind in kinds
    }
    columns = [f"{kind} {'/'.join(_NAMES[operation] for operation in operations[kind])}" for kind in kinds]
    rows = Table("host", "rank", "TFLOP/s", "memory GB/s", *(part for of in columns for part in (f"{of}, GB/s", "us")))
    before = None
    for one in found:
        cells = [cell for kind in kinds for cell in _cells(one.links, kind, operations[kind])]
        host = one.host if one.host != before else ""
        rows.add_row(host, str(one.rank), f"{one.product_flops / 1e12:.3g}", f"{one.copy_bytes / 1e9:.4g}", *cells)
        before = one.host
    return rendered(rows)


def _cells(links: Sequence[LinkTime], kind: str, operations: Sequence[str]) -> tuple[str, str]:
    """Write bandwidths and latencies of a rank's groups of a kind, a line each: both neighbours in a pipeline."""
    own = [link for link in links if link.kind == kind]
    rates, latencies = [], []
    for ranks in dict.fromkeys(link.ranks for link in own):
        of_group = [link for link in own if link.ranks == ranks]
        by_operation = [
            sorted((link for link in of_group if link.operation == operation), key=lambda link: link.num_bytes)
            for operation in operations
        ]
        rates.append("/".join(f"{one[-1].bus_bytes / one[-1].seconds / 1e9:.3g}" for one in by_operation))
        latencies.append("/".join(f"{1e6 * one[0].seconds:.0f}" for one in by_operation))
    return "\n".join(rates), "\n".join(latencies)


def _listed(ranks: Sequence[int]) -> str:
    """List ranks, those of a long group by its ends."""
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, … {ranks[-1]}"


def _size(num_bytes: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:g} {unit}"
    return f"{num_bytes} bytes"
