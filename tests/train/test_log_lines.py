"""Lines of a log file, by a clock that is set by hand."""

import pytest

from train.log_lines import Cost, Pace, StepLines, as_count, as_duration, on_bar


class Clock:
    def __init__(self):
        self.now = 500.0

    def __call__(self):
        return self.now


RECORD = {"loss": 2.5, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 1234.5}


def lines(steps, every, seconds, first=1, cost=None, **more):
    """The steps that the log says something of, with what it says."""
    clock, found = Clock(), {}
    pace = Pace(steps, cost, clock)
    log = StepLines(pace, every, clock)
    for step in range(first, steps + 1):
        clock.now += seconds
        record = {**RECORD, "step": step, "tokens": step * 1000, "seconds": seconds} | more
        pace.step(record)
        if line := log.line(record):
            found[step] = line
    return found


def test_by_itself_a_log_has_a_line_a_minute_and_of_the_first_and_last_step():
    assert list(lines(50, None, 7.0)) == [1, 10, 19, 28, 37, 46, 50]
    assert list(lines(5, None, 90.0)) == [1, 2, 3, 4, 5]
    assert list(lines(100_000, None, 1 / 1024)) == [1, 61_441, 100_000]


def test_a_line_says_the_share_of_the_predicted_speed_where_a_plan_has_one():
    assert "  1234 tokens/s (90% of what is predicted)  eta" in lines(1, 1, 2.0, predicted_seconds=1.8)[1]
    assert "predicted" not in lines(1, 1, 2.0)[1]


def test_a_number_of_steps_goes_by_steps_alone():
    assert list(lines(25, 10, 300.0)) == [1, 10, 20, 25]
    assert list(lines(25, 10, 1.0, first=17)) == [17, 20, 25]  # of a run that was resumed


def test_a_line_has_loss_norm_rate_speed_time_that_is_left_and_tokens_a_day():
    found = lines(1000, 100, 30.0)
    said = "step 100/1000  loss 2.5000  norm 0.500  lr 1.00e-03  1234 tokens/s  eta 07:30:00  2.88 million tokens/day"
    assert found[100] == said
    assert found[1].endswith("eta 08:19:30")  # by its own seconds
    assert "  eta 00:00:00  " in found[1000]
    assert "1234 tokens/s  MFU 45.7%  eta" in lines(1000, 100, 30.0, mfu=0.4567)[100]


def test_a_line_says_what_a_run_has_cost_and_will_have_cost_where_there_is_a_price():
    found = lines(1000, 100, 30.0, cost=Cost(36.0))
    assert found[100].endswith("  cost 30.00, at the end 300.00")
    assert found[1].endswith("  cost 0.30, at the end 300.00")
    assert lines(1000, 100, 30.0, cost=Cost(36.0, 1000.0))[100].endswith("cost 40.00, at the end 310.00")


def test_the_end_says_what_a_run_has_cost_with_the_time_that_was_no_step():
    clock = Clock()
    pace = Pace(2, Cost(36.0, 3600.0), clock)
    clock.now += 1800.0
    assert pace.spent() == "54.00: 00:30:00 since this start, and 01:00:00 of steps before, at 36.00 an hour"
    assert Pace(2, None, clock).spent() is None


def test_what_evaluation_and_saves_take_counts_in_the_time_that_is_left_and_in_tokens_a_day():
    clock = Clock()
    pace = Pace(21, None, clock)
    pace.step({"step": 1, "tokens": 10, "seconds": 1.0})
    assert (pace.seconds_left, pace.tokens_per_day) == (20.0, None)
    clock.now += 90.0  # nine steps of a second, and nine of something else
    pace.step({"step": 10, "tokens": 100, "seconds": 1.0})
    assert (pace.seconds_left, pace.tokens_per_day) == (110.0, 86_400.0)


def test_a_bar_has_loss_norm_and_mfu():
    assert on_bar({**RECORD, "mfu": 0.5}) == "loss 2.5000  norm 0.500  MFU 50.0%"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (950.4, "950"),
        (999_499, "999,499"),
        (999_500, "1.00 million"),
        (1_234_567, "1.23 million"),
        (45_678e6, "45.7 billion"),
        (456.7e12, "457 trillion"),
    ],
)
def test_counts(number, said):
    assert as_count(number) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "00:00:00"), (59.6, "00:01:00"), (15_033, "04:10:33"), (86_399, "23:59:59"), (274_233, "3 d 04:10")],
)
def test_durations(seconds, said):
    assert as_duration(seconds) == said
