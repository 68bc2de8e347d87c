"""What is said of a step's time, from steps written out by hand."""

import json

import pytest

from parallel.schedules import Action, Pass, Placement, Schedule, Span, placement
from train.timeline import Measured, as_record, draw, expected, seconds_by_rank


def row(*blocks):
    return [Span(Action(Pass[text[0]], int(text[1]), int(text[2])), start, end) for text, start, end in blocks]


# Two ranks, one micro-batch each way; the message takes half a second.
BLOCKS = [row(("F00", 0.0, 1.0), ("B00", 6.0, 8.0)), row(("F10", 1.5, 2.5), ("B10", 2.5, 5.5))]


def test_a_record_has_each_rank_s_seconds_and_the_bubble():
    by_rank = [seconds_by_rank(blocks, rank, 2) for rank, blocks in enumerate(BLOCKS)]
    record = as_record([max(values) for values in zip(*by_rank, strict=True)], 2, 8.5)
    assert record["forward_seconds"] == [1, 1] and record["backward_seconds"] == [2, 3]
    assert "weight_seconds" not in record
    assert record["wait_seconds"] == [5, 4]
    assert record["bubble"] == pytest.approx(9 / 16) and record["optimizer_seconds"] == 0.5


def test_weight_gradients_are_told_apart():
    blocks = row(("F00", 0.0, 1.0), ("B00", 1.0, 2.0), ("W00", 3.0, 5.0))
    record = as_record(seconds_by_rank(blocks, 0, 1), 1, 5.0)
    assert record["weight_seconds"] == [2] and record["wait_seconds"] == [1]


def test_a_measured_step_survives_its_file_and_knows_what_it_should_have_been(tmp_path):
    measured = Measured(7, Schedule["1f1b"], Placement(2), 1, BLOCKS)
    again = Measured.from_json(json.loads(json.dumps(measured.as_json())))
    assert again == measured
    assert again.bubble == pytest.approx(9 / 16)
    ideal = again.ideal()
    assert [[(b.start, b.end) for b in rank] for rank in ideal.blocks] == [[(0, 1), (5, 7)], [(1, 2), (2, 5)]]
    draw(again, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_whole_backward_passes_are_no_measure_of_split_ones():
    """DualPipeV has both: the ideal's B is the mean of those that leave their weights, and a whole one is B and W."""
    place = placement(Schedule["dualpipev"], 2, None)
    from parallel.schedules import Costs, orders, simulate

    each = [1.0] * 4
    timeline = simulate(orders(Schedule["dualpipev"], place, 4), place, Costs(each, each, each))
    measured = Measured(1, Schedule["dualpipev"], place, 4, timeline.blocks)
    assert measured.ideal().seconds == pytest.approx(timeline.seconds)
    assert measured.bubble == pytest.approx(timeline.bubble)


@pytest.mark.parametrize(("name", "bubble"), [("1f1b", 3 / 19), ("zero_bubble", 3 / 51), ("zbv", 3 / 99)])
def test_the_expected_bubble_is_the_closed_form_where_stages_are_even(name, bubble):
    place = placement(Schedule[name], 4, None)
    assert expected(Schedule[name], place, 16, [0.1] * place.num_stages).bubble == pytest.approx(bubble)


def test_a_dear_stage_makes_the_others_wait():
    place = placement(Schedule["1f1b"], 2, None)
    assert expected(Schedule["1f1b"], place, 8, [1.0, 2.0]).bubble > 0.25
