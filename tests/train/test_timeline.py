"""What is said of a step's time, from steps written out by hand."""

import json

import pytest

from parallel.schedules import Action, Pass, Placement, Schedule, orders, placement_of
from parallel.simulation import Costs, Span, simulate
from train.timeline import MeasuredStep, as_record, draw, expected, read, seconds_of, write, written


def row(*spans):
    return [Span(Action(Pass[text[0]], int(text[1]), int(text[2])), start, end) for text, start, end in spans]


def record_of(rows, seconds):
    passes = [[seconds_of(what, row) for row in rows] for what in Pass]
    return as_record(*passes, [row[-1].end for row in rows], seconds)


# Two ranks, one micro-batch each way; the message takes half a second.
ROWS = [row(("F00", 0.0, 1.0), ("B00", 6.0, 8.0)), row(("F10", 1.5, 2.5), ("B10", 2.5, 5.5))]


def test_a_record_has_each_rank_s_seconds_and_the_bubble():
    record = record_of(ROWS, 8.5)
    assert record["forward_seconds"] == [1, 1] and record["backward_seconds"] == [2, 3]
    assert "weight_seconds" not in record
    assert record["wait_seconds"] == [5, 4]
    assert record["bubble"] == pytest.approx(9 / 16) and record["optimizer_seconds"] == 0.5


def test_a_file_of_an_earlier_version_is_read():
    """Written by the version before spans had their name."""
    text = (
        '{"step": 7, "schedule": "1f1b", "micro_batches": 1, "place": {"num_ranks": 2, "virtual": 1, '
        '"there_and_back": false}, "bubble": 0.5625, "blocks": [[["F", 0, 0, 0.0, 1.0], ["B", 0, 0, 6.0, 8.0]], '
        '[["F", 1, 0, 1.5, 2.5], ["B", 1, 0, 2.5, 5.5]]]}'
    )
    found = MeasuredStep.from_json(json.loads(text))
    assert found == MeasuredStep(7, Schedule["1f1b"], Placement(2), 1, ROWS)
    assert json.loads(text) == found.as_json()  # and the other way round


def test_weight_gradients_are_told_apart():
    record = record_of([row(("F00", 0.0, 1.0), ("B00", 1.0, 2.0), ("W00", 3.0, 5.0))], 5.0)
    assert record["weight_seconds"] == [2] and record["wait_seconds"] == [1]


def test_a_measured_step_survives_its_file_and_knows_what_it_should_have_been(tmp_path):
    measured = MeasuredStep(7, Schedule["1f1b"], Placement(2), 1, ROWS)
    picture = write(measured, tmp_path)
    (path,) = written(tmp_path).values()
    assert picture == path.with_suffix(".png") and picture.exists()
    again = read(path)
    assert again == measured
    assert again.bubble == pytest.approx(9 / 16)
    ideal = again.ideal()
    assert [[(b.start, b.end) for b in rank] for rank in ideal.spans] == [[(0, 1), (5, 7)], [(1, 2), (2, 5)]]
    draw(again, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_whole_backward_passes_are_no_measure_of_split_ones():
    """DualPipeV has both: the ideal's B is the mean of those that leave their weights, and a whole one is B and W."""
    place = placement_of(Schedule["dualpipev"], 2, None)
    each = [1.0] * 4
    timeline = simulate(orders(Schedule["dualpipev"], place, 4), place, Costs(each, each, each))
    measured = MeasuredStep(1, Schedule["dualpipev"], place, 4, timeline.spans)
    assert measured.ideal().seconds == pytest.approx(timeline.seconds)
    assert measured.bubble == pytest.approx(timeline.bubble)


@pytest.mark.parametrize(("name", "bubble"), [("1f1b", 3 / 19), ("zero_bubble", 3 / 51), ("zbv", 3 / 99)])
def test_the_expected_bubble_is_the_closed_form_where_stages_are_even(name, bubble):
    place = placement_of(Schedule[name], 4, None)
    assert expected(Schedule[name], place, 16, [0.1] * place.num_stages).bubble == pytest.approx(bubble)


def test_a_dear_stage_makes_the_others_wait():
    place = placement_of(Schedule["1f1b"], 2, None)
    assert expected(Schedule["1f1b"], place, 8, [1.0, 2.0]).bubble > 0.25
