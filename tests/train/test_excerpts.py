"""What is drawn of steps with many micro-batches, and what is said of the rest, on simulated steps."""

from dataclasses import replace

import pytest

from parallel.schedules import Schedule, orders, placement_of
from parallel.simulation import Costs, simulate
from train.excerpts import LEGIBLE, excerpts

HUNDREDS = 400
"""Micro-batches: of 67B's default global batch over few replicas there are up to 1,152."""


def step_of(name, ranks, micro_batches, slower=1.0):
    """The spans of a step of even stages, in units of a forward pass."""
    place = placement_of(Schedule[name], ranks, None)
    each = [slower] * place.num_stages
    return simulate(orders(Schedule[name], place, micro_batches), place, Costs(each, each, each)).spans


def test_a_step_of_few_passes_is_drawn_whole():
    rows = step_of("1f1b", 4, LEGIBLE // 2)
    assert len(rows[0]) == LEGIBLE
    (one,) = excerpts([rows])
    assert one.stretches == [(0.0, rows[0][-1].end)] and one.left_out is None
    (one,) = excerpts([step_of("1f1b", 4, LEGIBLE // 2 + 1)])
    assert len(one.stretches) == 2


def test_a_step_without_a_middle_is_drawn_whole():
    (one,) = excerpts([step_of("1f1b", 4, 16)], legible=4)
    assert len(one.stretches) == 1 and one.left_out is None


def test_1f1b_is_cut_where_micro_batch_2p_begins_and_where_that_before_the_last_2p_ends():
    """A step of p ranks takes (m + p - 1)(F + B), F = 1 and B = 2 here, and rank 0 does each micro-batch in 3."""
    rows = step_of("1f1b", 4, 200)
    (one,) = excerpts([rows])
    whole = 3 * (200 + 4 - 1)
    # Rank 0 gets its first gradient after p F and p - 1 B, and then does B and F by turns: before F of micro-batch 8
    # those of 4 to 7, and B of 0 to 4.
    first = 4 * 1 + 3 * 2 + 4 * 3 + 2
    # Micro-batch 191 is the eighth before the last; from the end of its backward pass on rank 0 eight more come.
    (start, cut), (again, end) = one.stretches
    assert (start, cut, end) == (0.0, first, whole)
    assert again == whole - 8 * 3
    left = one.left_out
    assert left.length == again - cut and left.share == pytest.approx((again - cut) / whole)
    assert left.waiting == pytest.approx(0, abs=1e-9)
    drawn = {s.action.micro_batch for row in rows for s in row if s.start < cut or s.end > again}
    assert left.micro_batches == 200 - len(drawn)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"])
def test_what_is_left_out_is_the_steady_state(name, ranks):
    """There even stages never wait, whatever the schedule, so that nothing of the bubble is lost to a reader."""
    rows = step_of(name, ranks, HUNDREDS)
    (one,) = excerpts([rows])
    (start, cut), (again, end) = one.stretches
    assert start == 0 and end == max(row[-1].end for row in rows)
    assert one.left_out.waiting == pytest.approx(0, abs=0.001)
    assert one.left_out.share > 1 - 6 * ranks / HUNDREDS
    waited = end * len(rows) - sum(span.end - span.start for row in rows for span in row)
    assert waited > 0
    for row in rows:
        assert row[0].end <= cut and row[-1].start >= again, "each rank is seen to begin and to end"


def test_steps_under_each_other_have_beginnings_and_ends_of_the_same_length():
    slow, fast = step_of("zbv", 2, HUNDREDS, 1.1), step_of("zbv", 2, HUNDREDS)
    one, other = excerpts([slow, fast])
    assert one.stretches[0] == other.stretches[0] == excerpts([slow])[0].stretches[0]
    lengths = [[end - start for start, end in found.stretches] for found in (one, other)]
    assert lengths[0] == pytest.approx(lengths[1])
    for found, rows in ((one, slow), (other, fast)):
        assert found.stretches[1][1] == max(row[-1].end for row in rows)
    assert one.left_out.length == pytest.approx(1.1 * other.left_out.length, rel=0.05)


def test_waiting_in_what_is_left_out_is_measured():
    """A rank that has waited for 30 in the middle of a step of two is said to."""
    rows = step_of("1f1b", 2, HUNDREDS)
    late = [[span if span.start < 600 else replace(span, start=span.start + 30, end=span.end + 30) for span in row]
            for row in rows]  # fmt: skip
    left = excerpts([late])[0].left_out
    assert left.waiting * left.length == pytest.approx(30, abs=2)
    assert left.said(1000, "ms") == (
        f"left out: {1000 * left.length:,.0f} ms, {left.share:.1%} of the step, with {left.micro_batches:,} whole "
        f"micro-batches; ranks wait {left.waiting:.1%} of it"
    )
    assert left.said(0.01, "units").startswith(f"left out: {left.length / 100:.1f} units")
