"""Which ranks are slow, by seconds that a test makes up."""

import pytest

from parallel.layout import Layout
from parallel.schedules import Action, Pass
from parallel.simulation import Span
from train.stragglers import Slow, Stragglers, typical_seconds

HOSTS = ["a", "a", "b", "b", "c", "c"]


def judge(layout, percent=20.0, steps=3, rank=0, **more):
    return Stragglers(layout, rank, percent, steps, HOSTS, **more)


def spans(*seconds, what=Pass.F, stage=0):
    """Passes of these lengths, one after another."""
    ends = [sum(seconds[: i + 1]) for i in range(len(seconds))]
    pairs = zip(ends, seconds, strict=True)
    return [Span(Action(what, stage, i), end - length, end) for i, (end, length) in enumerate(pairs)]


def test_one_pass_that_waits_does_not_make_a_step_slow():
    assert typical_seconds(spans(9.0, 1.0, 1.0, 1.0)) == pytest.approx(4.0)
    both = [*spans(9.0, 1.0, 1.0), *spans(2.0, 2.0, 2.0, what=Pass.B), *spans(4.0, 4.0, 4.0, stage=2)]
    assert typical_seconds(both) == pytest.approx(3.0 + 6.0 + 12.0) and typical_seconds([]) == 0


def test_ranks_hand_over_the_median_of_so_many_steps_of_one_kind():
    own = judge(Layout(dp=3, pp=2), rank=4)
    handed = [own.measured(spans(seconds), "kind") for seconds in (1.0, 50.0, 2.0, 7.0, 7.0)]
    assert handed == [[], [], [0.0, 0.0, 0.0, 0.0, 2.0, 0.0], [], []]
    assert own.measured(spans(1.0), "another kind") == []  # which begins anew
    assert [own.measured(spans(1.0), "another kind") for _ in range(2)][1][4] == 1.0
    alone = judge(Layout(dp=1, pp=1), steps=2)  # nobody waits for it
    assert [alone.measured(spans(1.0), "kind") for _ in range(9)] == [[]] * 9
    assert [judge(Layout(dp=2, pp=1), percent=None).measured(spans(1.0), "kind") for _ in range(9)] == [[]] * 9


def test_a_rank_is_compared_with_those_of_its_stage():
    layout = Layout(dp=3, pp=2)  # ranks 0 to 2 have the first stage, whose passes take half as long
    slow = judge(layout).slow([1.0, 1.1, 1.3, 2.0, 2.9, 2.1])
    assert slow == [Slow(4, 2.9, 2.1)]  # 1.3 is 18 % over 1.1
    assert [one.rank for one in judge(layout, percent=15.0).slow([1.0, 1.1, 1.3, 2.0, 2.9, 2.1])] == [4, 2]
    assert judge(Layout(dp=2, pp=1)).slow([1.0, 1.5]) == [Slow(1, 1.5, 1.0)]
    assert judge(layout).slow([1.0] * 3 + [9.0] * 3) == []


def test_where_there_is_one_replica_a_rank_is_compared_with_its_own_past():
    own = judge(Layout(dp=1, pp=3, tp=2))
    assert own.slow([1.0, 1.0, 2.0, 2.0, 3.0, 3.0]) == []
    assert own.slow([0.9, 1.0, 2.0, 2.0, 3.0, 3.0]) == []
    assert own.slow([0.9, 1.1, 2.0, 2.0, 4.5, 3.0]) == [Slow(4, 4.5, 3.0)]
    assert own.slow([1.1, 1.1, 2.0, 2.0, 3.0, 3.0]) == [Slow(0, 1.1, 0.9)]


def test_who_is_slow_is_said_with_its_host_at_once_and_then_now_and_then():
    now = [0.0]
    own = judge(Layout(dp=3, pp=2), clock=lambda: now[0])
    slow = own.slow([1.0, 1.1, 1.0, 2.0, 2.9, 2.0])
    assert own.said([]) is None
    assert own.said(slow) == (
        "slow over the last 3 steps: rank 4 (c, stage 1) takes 45% longer than the median of the 3 ranks of its stage "
        "(2.9 s a step against 2 s)"
    )
    now[0] += 599
    assert own.said(slow) is None
    assert own.said([Slow(1, 3.0, 1.0), *slow]).startswith("slow over the last 3 steps: rank 1 (a, stage 0) takes 200%")
    now[0] += 601
    assert own.said([Slow(1, 3.0, 1.0), *slow]) is not None
    assert own.said([]) == "no rank is slow any more" and own.said([]) is None
    many = [Slow(rank, 2.0, 1.0) for rank in range(6)]
    assert own.said(many).endswith("; 2 more ranks are slow")
    alone = judge(Layout(dp=1, pp=6))
    assert "rank 2 (b, stage 2) takes 50% longer than the fastest that it was (3 s " in alone.said([Slow(2, 3.0, 2.0)])
