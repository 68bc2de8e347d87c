"""Process groups of large jobs: all ranks make the same ones in the same order, in few calls (finding 6).

Where each group was a call of its own, the jobs here made 1,317 (1f1b on 512 ranks, dp4 x pp16 x tp8) to 10,129 calls
(interleaved on 4,096 ranks, dp16 x pp32 x tp8), each a split of all ranks, most of them for a link between two.
"""

from collections import Counter
from itertools import product

import pytest
import torch.distributed as dist

from parallel.groups import make_ranks
from parallel.layout import Layout
from parallel.schedules import Schedule, placement_of
from tests.emulated.scale import JOBS, SHARES
from tests.ranks import run_ranks

HOP, COMMUNICATOR = 50e-6, 0.5
"""Seconds of a message over TCP between two hosts, and to set up a communicator with a few ranks of its own."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By job, what each of some ranks makes."""
    shares = run_ranks("tests.emulated.scale", 2, tmp_path_factory.mktemp("groups"))
    by_job = {number: [] for number in range(len(JOBS))}
    for index, (number, _) in enumerate(SHARES):
        by_job[number].append(shares[index % 2][index // 2])
    return by_job


@pytest.mark.parametrize("number", range(len(JOBS)))
def test_all_ranks_make_the_same_groups_in_the_same_order(made, number):
    """A call that some ranks make and others do not never returns; nor does one with other sets of ranks."""
    first, *others = made[number]
    assert len(others) == 2
    for other in others:
        assert other["calls"] == first["calls"]


@pytest.mark.parametrize("number", range(len(JOBS)))
def test_groups_are_made_in_seconds(made, number):
    """At most 64 calls, and 20 seconds by this estimate.

    With NCCL, every call that makes groups is an ncclCommSplit of the world, whichever ranks are in them: each rank's
    colour and key go around a ring of all N ranks (bootstrapAllGather), which takes N - 1 hops over TCP, and then each
    rank sets up the communicator that it is in, if any. With c calls, g of them for groups that a rank is in, that is
    c N `HOP` + g `COMMUNICATOR`: for eight of each, 4.2 s at 512 ranks and 5.6 s at 4,096. With a call for each group
    it was 38 and 2,079 s.
    """
    world = JOBS[number].layout.world_size
    for one in made[number]:
        calls = len(one["calls"])
        seconds = calls * world * HOP + one["own"] * COMMUNICATOR
        print(f"{world} ranks: {calls} calls, {one['own']} of them for groups of this rank, {seconds:.1f} s")
        assert 4 < calls <= 64 and one["own"] >= 4 and seconds < 20


def color(ranks):
    """By which NCCL tells apart the sets of one call: what PyTorch makes of one (genNcclSplitColor, NCCLUtils.cpp)."""
    mixed, whole = 0, 2**64
    for rank in ranks:
        mixed ^= (rank + 0x9E3779B9 + (mixed << 6) % whole + (mixed >> 2)) % whole
    return abs(mixed - whole * (mixed >= whole // 2)) % (2**31 - 1)


SIZES = [(4, 4, 8), (2, 6, 8), (4, 6, 4), (1, 8, 4), (8, 8, 8), (4, 16, 8), (16, 12, 8), (16, 32, 8)]


@pytest.mark.parametrize(("dp", "pp", "tp"), SIZES)
def test_no_two_sets_of_a_call_have_one_colour(monkeypatch, dp, pp, tp):
    """NCCL would join them in one communicator of four ranks, which PyTorch takes for two of two.

    The colour is a hash of a set's ranks, and sets of ranks at a constant distance often share one: of the links of
    dp4 x pp4 x tp8, {31, 127} and {32, 64}; of dp8 x pp8 x tp8, {69, 133} and {83, 147}. It is what a call for each
    group was free of, and comes with splitting the world into many sets at once (finding 6).
    """
    calls, layout = [], Layout(dp, pp, tp, sequence_parallel=True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: layout.world_size)
    monkeypatch.setattr(dist, "split_group", lambda split_ranks, **how: calls.append(split_ranks))
    assert color([31, 127]) == color([32, 64]) != color([32, 65])
    for schedule, kv_copies in product(("1f1b", "interleaved", "zbv"), (1, 2)):
        make_ranks(layout, placement_of(Schedule[schedule], pp, None), kv_copies)
    assert calls
    for sets in calls:
        of_color = Counter(map(color, sets))
        assert len(of_color) == len(sets), [ranks for ranks in sets if of_color[color(ranks)] > 1]
