"""The links of a cluster from measured messages, and its slowest device from measured products."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np

from launch.bench.calibration import rounded
from launch.check.measure import LinkTime, RankFindings


def steps_of(operation: str, ranks: int) -> int:
    """Count the steps of a ring, one after another: a message has one, and an all-reduce passes the ring twice."""
    return {"send": 1, "all_reduce": 2 * (ranks - 1)}.get(operation, ranks - 1)


def links_of(found: Sequence[RankFindings]) -> dict[str, Any]:
    """Fit the keys of a `Cluster` about its links to measured messages, each as slow as its slowest rank says.

    Inside a machine a message takes base + steps x step + bytes / bandwidth, between machines steps x step + bytes /
    bandwidth; bytes are those that a ring's slowest link carries. All messages weigh alike, in relative error. There is
    then one way to send a message, in place of NCCL's several; where only one kind of link was measured, a step of the
    other kind is taken to be as long.

    Gathers and scatters, which training sends most of, decide the bandwidth where there are any, and with all-reduces
    the latency: over Gloo a message between two ranks, which no computation waits for, is several times as fast.

    Args:
        found: of all ranks.

    Returns:
        The values by key; no key for links that there are none of.
    """
    hosts = {one.rank: one.host for one in found}
    slowest: dict[Any, LinkTime] = {}
    for link in (link for one in found for link in one.links):
        key = link.operation, link.ranks, link.num_bytes
        if key not in slowest or slowest[key].seconds < link.seconds:
            slowest[key] = link
    inside = _in_bulk([link for link in slowest.values() if len({hosts[rank] for rank in link.ranks}) == 1])
    between = _in_bulk([link for link in slowest.values() if len({hosts[rank] for rank in link.ranks}) > 1])
    values: dict[str, Any] = {}
    base = within = across = 0.0
    if inside:
        base, within, per_byte = _fit(inside, with_base=True)
        values |= {"intra_gb_per_s": rounded(1e-9 / per_byte), "intra_share": 1.0}
    if between:
        _, across, per_byte = _fit(between, with_base=False)
        values |= {"inter_gb_per_s": rounded(1e-9 / per_byte), "inter_share": 1.0}
    if values:
        values["protocols"] = [[1.0, *(rounded(1e6 * seconds) for seconds in (base, within, across or within))]]
    return values


def slowest_of(found: Sequence[RankFindings]) -> dict[str, Any]:
    """Return how much slower than usual the slowest GPU computes a matrix product; nothing where there are cores.

    Args:
        found: of all ranks.
    """
    rates = [one.product_flops for one in found if one.cores is None]
    return {"slowest_share": rounded(min(rates) / median(rates))} if len(rates) > 1 else {}


def _in_bulk(links: list[LinkTime]) -> list[LinkTime]:
    """Return those by which the links are judged; see `links_of`."""
    collectives = [link for link in links if link.operation != "send"]
    smallest = min((link.num_bytes for link in collectives), default=0)
    return [link for link in collectives if link.operation != "all_reduce" or link.num_bytes == smallest] or links


def _fit(links: Iterable[LinkTime], with_base: bool) -> tuple[float, float, float]:
    """Return base, seconds of a step and seconds of a byte, none below zero, by least squares of relative errors."""
    rows = np.array([[float(with_base), steps_of(link.operation, len(link.ranks)), link.bus_bytes] for link in links])
    seconds = np.array([link.seconds for link in links])
    scale = np.array([1.0, 1.0, 1e-9])  # columns of one size
    scaled = rows * scale / seconds[:, None]
    kept = [column for column in range(3) if with_base or column]
    while True:
        found = np.zeros(3)
        found[kept] = np.linalg.lstsq(scaled[:, kept], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept.remove(int(np.argmin(found)))  # what would be negative is no part of it
    base, step, per_byte = found * scale
    return float(base), float(step), max(float(per_byte), 1e-15)
