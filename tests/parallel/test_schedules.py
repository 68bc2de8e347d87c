"""The order of passes: sound for every size, and as long as the papers' closed forms say."""

from itertools import product
from types import SimpleNamespace

import pytest

from parallel import schedules
from parallel.schedules import (
    Action,
    Pass,
    Placement,
    Schedule,
    batch_problems,
    forward_orders,
    orders,
    placement_of,
    problems,
    splits_backward,
)
from parallel.simulation import Costs, programs, simulate
from tests.ranks import ROOT

KINDS = [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("interleaved", 4), ("zero_bubble", 1)]
KINDS += [("zero_bubble", 2), ("zero_bubble", 3), ("zbv", 2), ("dualpipev", 2)]
EVERY = [
    (name, p, v, m)
    for (name, v), p, m in product(KINDS, (2, 3, 4, 5, 8), (1, 2, 3, 4, 7, 8, 9, 16, 24, 40))
    if not batch_problems(Schedule[name], p, m, 1)
]


def made(name, p, v, m):
    place = placement_of(Schedule[name], p, v)
    return orders(Schedule[name], place, m), place


def check(made, place, micro_batches):
    """Every pass of every stage and micro-batch once, on the rank that holds the stage, W after B after F."""
    seen = set()
    for rank, order in enumerate(made):
        for action in order:
            assert place.rank_of(action.stage) == rank and action not in seen, action
            earlier = {Pass.F: None, Pass.B: Pass.F, Pass.W: Pass.B}[action.what]
            assert earlier is None or Action(earlier, action.stage, action.micro_batch) in seen, action
            seen.add(action)
    whole = {
        Action(what, s, b) for what in (Pass.F, Pass.B) for s in range(place.num_stages) for b in range(micro_batches)
    }
    assert whole <= seen


def even(place, seconds=1.0, link=0.0):
    """The same for all stages, each pass as long as the others; `seconds` for all stages of a rank."""
    each = [seconds / place.virtual] * place.num_stages
    return Costs(each, each, each, link)


def waiting(timeline):
    """The longest that a rank waits between its first pass and its last."""
    spans = [order[-1].end - order[0].start for order in timeline.spans]
    return max(
        span - sum(block.end - block.start for block in order)
        for span, order in zip(spans, timeline.spans, strict=True)
    )


@pytest.mark.parametrize(("name", "p", "v", "m"), EVERY)
def test_every_pass_is_made_once_where_its_stage_is_and_no_rank_waits_forever(name, p, v, m):
    order, place = made(name, p, v, m)
    check(order, place, m)
    # Whatever passes and messages take: a pipeline that stands still would stand still here.
    for costs in (
        even(place, link=0.3),
        Costs([3.0] * place.num_stages, [1.0] * place.num_stages, [0.1] * place.num_stages, 5.0),
        Costs([0.1] * place.num_stages, [1.0, *[2.0] * (place.num_stages - 1)], [4.0] * place.num_stages),
    ):
        simulate(order, place, costs)
    has_weights = any(action.what is Pass.W for rank in order for action in rank)
    assert has_weights == splits_backward(Schedule[name])


def test_there_are_enough_of_them():
    assert len(EVERY) > 200 and {name for name, *_ in EVERY} == {one.value for one in Schedule}


@pytest.mark.parametrize(("p", "v", "m"), product((1, 2, 3, 4, 8), (1, 2, 3), (1, 3, 8, 9)))
@pytest.mark.parametrize("there_and_back", [False, True])
def test_evaluation_passes_each_stage_once(p, v, m, there_and_back):
    place = Placement(p, v, there_and_back)
    order = forward_orders(place, m)
    done = [action for rank in order for action in rank]
    assert sorted((a.stage, a.micro_batch) for a in done) == list(product(range(p * v), range(m)))
    each = [1.0] * place.num_stages
    assert simulate(order, place, Costs(each, each, each)).seconds >= m * v


F, B, W = 1.0, 1.25, 0.75


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 8), (8, 32)])
def test_waiting_is_what_the_papers_say(p, m):
    """arXiv 2401.10241, table 1 and section 2; arXiv 2104.04473, section 2.2."""

    def seconds(name, v, costs=(F, B, W)):
        order, place = made(name, p, v, m)
        each = [[cost / v] * place.num_stages for cost in costs]
        return waiting(simulate(order, place, Costs(*each)))

    assert seconds("1f1b", 1) == pytest.approx((p - 1) * (F + B + W))
    for v in (2, 3, 4):
        assert seconds("interleaved", v) == pytest.approx((p - 1) * (F + B + W) / v)
    assert seconds("zero_bubble", 1, (1, 1, 1)) == pytest.approx(p - 1)
    for v in (2, 3):
        assert seconds("zero_bubble", v, (1, 1, 1)) == pytest.approx((p - 1) / v)
    assert seconds("zero_bubble", 1) == pytest.approx((p - 1) * (F + B - W))
    if m >= 2 * p:  # no bubble but that the last rank cannot begin before something has come to it
        for name in ("zbv", "dualpipev"):
            order, place = made(name, p, 2, m)
            assert simulate(order, place, even(place, 2.0)).seconds == 6 * m + (p - 1)
        assert seconds("zbv", 2, (1, 1, 1)) == pytest.approx(0)


@pytest.mark.parametrize(
    ("name", "v", "at_4", "at_8", "kept"),
    [
        ("1f1b", 1, 3 / 19, 7 / 39, 8),
        ("interleaved", 2, 3 / 35, 7 / 71, 11.5),
        ("interleaved", 4, 3 / 67, 7 / 135, 9.75),
        ("zero_bubble", 1, 3 / 51, 7 / 103, 8),
        ("zero_bubble", 2, 3 / 99, 7 / 199, 8),
        ("zbv", 2, 3 / 99, 7 / 199, 8),
        ("dualpipev", 2, 3 / 99, 7 / 199, 8.5),
    ],
)
def test_bubbles_and_kept_activations_of_4_and_8_ranks(name, v, at_4, at_8, kept):
    """With passes of equal length; 4 ranks and 16 micro-batches, 8 and 32."""
    for p, bubble in ((4, at_4), (8, at_8)):
        order, place = made(name, p, v, 4 * p)
        timeline = simulate(order, place, even(place))
        assert timeline.bubble == pytest.approx(bubble)
    assert max(timeline.activations) == kept


def test_1f1b_is_written_out():
    order, _ = made("1f1b", 2, 1, 3)
    said = [" ".join(f"{a.what.name}{a.micro_batch}" for a in rank) for rank in order]
    assert said == ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]


def test_a_link_costs_what_it_takes():
    """Two ranks, one micro-batch: there and back."""
    order, place = made("1f1b", 2, 1, 1)
    timeline = simulate(order, place, Costs([1, 2], [3, 4], [0, 0], link=0.5))
    assert timeline.seconds == 1 + 0.5 + 2 + 4 + 0.5 + 3
    assert timeline.busy == pytest.approx([4 / 11, 6 / 11])


def test_ranks_that_wait_for_each_other_are_found():
    f0, f1 = Action(Pass.F, 0, 0), Action(Pass.F, 1, 0)
    b0, b1 = Action(Pass.B, 0, 0), Action(Pass.B, 1, 0)
    place = Placement(2)
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([[f0, b0], [b1, f1]], place, even(place))


def test_stages_lie_there_and_back():
    assert [Placement(3, 2, True).stages_of(rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert [Placement(3, 2).stages_of(rank) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert placement_of(Schedule["zbv"], 4, None) == Placement(4, 2, True)
    assert placement_of(Schedule["interleaved"], 4, None) == Placement(4, 2)
    assert placement_of(Schedule["zero_bubble"], 4, None) == placement_of(Schedule["1f1b"], 4, None) == Placement(4)


@pytest.mark.parametrize(
    ("name", "p", "v", "said"),
    [
        ("zbv", 2, 3, "parallel.virtual_stages=3: parallel.schedule=zbv goes there and back; "),
        ("dualpipev", 2, 1, "parallel.virtual_stages=1: parallel.schedule=dualpipev goes there and back"),
        ("1f1b", 2, 2, "parallel.schedule=1f1b has one stage on each rank; parallel.schedule=interleaved has"),
        ("interleaved", 2, 1, "parallel.schedule=interleaved has several stages on each rank; 2 works"),
        ("zero_bubble", 2, 0, "parallel.virtual_stages=0: must be at least 1"),
        ("interleaved", 1, None, "parallel.schedule=interleaved: parallel.pp=1 is no pipeline; "),
        ("1f1b", 1, 3, "parallel.virtual_stages=3: parallel.schedule=1f1b has one stage on each rank"),
    ],
)
def test_what_cannot_be_is_said(name, p, v, said):
    (problem,) = problems(Schedule[name], p, v)
    assert said in problem


def test_a_batch_that_a_schedule_cannot_run_is_said_with_one_that_it_can():
    assert batch_problems(Schedule["interleaved"], 4, 36, 6) == [
        "train.global_batch=36: makes 6 micro-batches of 6, and parallel.schedule=interleaved goes round by "
        "parallel.pp=4; train.global_batch=24 or train.global_batch=48 would work, or parallel.schedule=zero_bubble "
        "with any"
    ]
    assert batch_problems(Schedule["dualpipev"], 4, 14, 2) == [
        "train.global_batch=14: makes 7 micro-batches of 2, and parallel.schedule=dualpipev needs 2 x parallel.pp = 8; "
        "train.global_batch=16 or more would work, or parallel.schedule=zbv with any"
    ]
    assert batch_problems(Schedule["zbv"], 4, 1, 1) == batch_problems(Schedule["interleaved"], 4, 8, 2) == []


@pytest.mark.parametrize(("name", "p", "v"), [("1f1b", 1, None), ("zbv", 4, None), ("zero_bubble", 4, 3)])
def test_what_can_be_is_not(name, p, v):
    assert problems(Schedule[name], p, v) == []


def test_the_schedule_that_the_guide_adds_is_one(monkeypatch):
    """Its row and its function, as they stand there, are all that a schedule takes."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    block = next(part for part in text.split("```python\n")[1:] if "_gpipe" in part).partition("```")[0]
    given = {name: value for name, value in vars(schedules).items() if not name.startswith("__")}
    exec(block.replace("TABLE = {...,", "ROWS = {"), given)
    monkeypatch.setitem(schedules.TABLE, "gpipe", given["ROWS"]["gpipe"])
    gpipe = SimpleNamespace(name="gpipe")
    for p, m in product((2, 4), (1, 3, 8)):
        place = placement_of(gpipe, p, None)
        order = orders(gpipe, place, m)
        check(order, place, m)
        assert waiting(simulate(order, place, even(place))) == pytest.approx((p - 1) * 3)
        assert all(len(one.actions) == 2 * m for one in programs(order, place))
    assert problems(gpipe, 2, 3) == ["parallel.virtual_stages=3: parallel.schedule=gpipe has one stage on each rank"]
