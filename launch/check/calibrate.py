"""The links of a cluster from measured messages, and its slowest device from measured products."""

from collections import Counter
from collections.abc import Sequence
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

    They are those by which `parallel.plan.costs.Prices.message` has the seconds of a message: a base, its steps within
    a machine and those between machines, and the bytes that a ring's slowest link carries over the bandwidth; between
    machines the ranks that a group has in one share its bytes. All messages weigh alike, in relative error. There is
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
        rows = [(1.0, steps_of(link.operation, len(link.ranks)), link.bus_bytes) for link in inside]
        base, within, per_byte = _fit(rows, [0.0] * len(inside), inside)
        values |= {"intra_gb_per_s": rounded(1e-9 / per_byte), "intra_share": 1.0}
    if between:
        rows, known = [], []
        for link in between:
            on_host = Counter(hosts[rank] for rank in link.ranks)
            steps = steps_of(link.operation, len(link.ranks))
            crossed = steps_of(link.operation, len(on_host)) if inside else steps
            rows.append((0.0, crossed, link.bus_bytes / max(on_host.values())))
            known.append(base + (steps - crossed) * within)
        if all(of >= link.seconds for of, link in zip(known, between, strict=True)):
            known = [0.0] * len(between)  # what the links inside would take of these is more than all
        _, across, per_byte = _fit(rows, known, between)
        values |= {"inter_gb_per_s": rounded(1e-9 / per_byte), "inter_share": 1.0}
    if values:
        of_steps = within if inside else across, across if between else within
        values["protocols"] = [[1.0, *(rounded(1e6 * seconds) for seconds in (base, *of_steps))]]
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


def _fit(
    rows: Sequence[tuple[float, float, float]], known: Sequence[float], links: Sequence[LinkTime]
) -> tuple[float, float, float]:
    """Return base, seconds of a step and seconds of a byte, none below zero, by least squares of relative errors.

    Args:
        rows: for each message, how often it has the base, its steps, and its bytes.
        known: the seconds of each that are accounted for already.
        links: the messages.
    """
    taken = np.array([link.seconds for link in links])
    left = np.maximum(taken - np.array(known), 0.0) / taken
    scale = np.array([1.0, 1.0, 1e-9])  # columns of one size
    scaled = np.array(rows, float) * scale / taken[:, None]
    kept = [column for column in range(3) if scaled[:, column].any()]
    while True:
        found = np.zeros(3)
        found[kept] = np.linalg.lstsq(scaled[:, kept], left, rcond=None)[0]
        if (found >= 0).all():
            break
        kept.remove(int(np.argmin(found)))  # what would be negative is no part of it
    base, step, per_byte = found * scale
    return float(base), float(step), max(float(per_byte), 1e-15)
