"""Lines of a log file, by a clock that is set by hand."""

import pytest

from train.log_lines import StepLines, as_duration


class Clock:
    def __init__(self):
        self.now = 500.0

    def __call__(self):
        return self.now


def lines(steps, every, seconds, first=1, **more):
    """The steps that the log says something of, with what it says."""
    clock, found = Clock(), {}
    log = StepLines(steps, every, clock)
    for step in range(first, steps + 1):
        clock.now += seconds
        record = {"step": step, "loss": 2.5, "lr": 1e-3, "seconds": seconds, "tokens_per_second": 1234.5} | more
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


def test_a_line_has_loss_rate_speed_and_the_time_that_is_left():
    found = lines(1000, 100, 30.0)
    assert found[100] == "step 100/1000  loss 2.5000  lr 1.00e-03  1234 tokens/s  eta 07:30:00"
    assert found[1].endswith("eta 08:19:30")  # by its own seconds
    assert found[1000].endswith("eta 00:00:00")


def test_what_evaluation_and_saves_take_counts_in_the_time_that_is_left():
    clock = Clock()
    log = StepLines(21, 10, clock)
    record = {"loss": 1.0, "lr": 1.0, "seconds": 1.0, "tokens_per_second": 1.0}
    log.line({"step": 1, **record})
    clock.now += 90.0  # nine steps of a second, and nine of something else
    assert log.line({"step": 10, **record}).endswith("eta 00:01:50")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "00:00:00"), (59.6, "00:01:00"), (15_033, "04:10:33"), (86_399, "23:59:59"), (274_233, "3 d 04:10")],
)
def test_durations(seconds, said):
    assert as_duration(seconds) == said
