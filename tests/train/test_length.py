"""Which step has how many sequences of how many tokens, for one batch, ramp-ups, stages and changes in between."""

import json
import math

import pytest

from tests.shapes import preset
from train.length import Consumed, Steps, StepSize, length_of


def planned(*overrides, begun=None):
    return length_of(preset("tiny", "train.seq_len=100", *overrides), begun)


def test_a_run_of_one_batch_is_as_long_as_its_tokens():
    length = planned("train.total_tokens=10001", "train.global_batch=2")
    assert (length.schedule_steps, length.steps, length.tokens) == (math.ceil(10001 / 200), 51, 10200)
    assert length.at(1) == StepSize(0, 0, 2, 100, 0) and length.at(51) == StepSize(100, 10_000, 2, 100, 0)
    assert length.at(60).samples_before == 118  # what is read ahead of the end
    assert (length.samples_after(7), length.tokens_after(7), length.tokens_after(0)) == (14, 1400, 0)
    assert not length.varies
    trial = planned("train.total_tokens=10001", "train.global_batch=2", "train.max_steps=7")
    assert (trial.schedule_steps, trial.steps) == (51, 7)
    assert length_of(preset("7b")).schedule_steps == math.ceil(2e12 / (2304 * 4096))


@pytest.mark.parametrize("steps", [1, 3, 1000, 212_000])
def test_progress_is_the_share_of_steps_to_the_last_bit(steps):
    length = planned(f"train.total_tokens={steps * 200}", "train.global_batch=2")
    for step in {1, 2, steps // 3 + 1, steps}:
        assert length.progress(step) == (step - 1) / steps


def sizes(length):
    return [(s.global_batch, s.seq_len, s.stage) for s in map(length.at, range(1, length.schedule_steps + 1))]


def walked(length):
    """Step by step, what the functions say at once."""
    samples = tokens = 0
    for step in range(1, length.schedule_steps + 1):
        size = length.at(step)
        assert (size.samples_before, size.tokens_before) == (samples, tokens)
        samples, tokens = samples + size.global_batch, tokens + size.global_batch * size.seq_len
        assert (length.samples_after(step), length.tokens_after(step)) == (samples, tokens)
        assert length.step_of(tokens) == step and length.step_of(tokens - 1) == step - 1
        assert sum(one.count for one in length.taken(step)) == step
        assert Consumed(length.taken(step)).tokens == tokens and Consumed(length.taken(step)).samples == samples
    return samples, tokens


def test_a_batch_grows_with_the_first_step_that_begins_with_its_tokens():
    length = planned("train.total_tokens=3000", "train.global_batch='0:2 500:4 1.3e3:8'")
    # 0, 200, 400 and 600 tokens before; 600 is the first of 500 or more
    assert sizes(length) == [(2, 100, 0)] * 3 + [(4, 100, 0)] * 2 + [(8, 100, 0)] * 2
    assert walked(length) == (30, 3000)
    assert length.varies and length.progress(4) == 600 / 3000
    # A rung that a single step passes over is never used.
    assert sizes(planned("train.total_tokens=900", "train.global_batch='0:4 100:2 300:5'")) == [
        (4, 100, 0),
        (5, 100, 0),
    ]


def test_stages_have_their_own_length_and_begin_with_a_step():
    stages = "data.stages=[{until: 700}, {until: 1000, seq_len: 50}, {until: 2000}]"
    length = planned("train.total_tokens=2000", "train.global_batch='0:2 900:4'", stages)
    assert sizes(length) == [(2, 100, 0)] * 4 + [(2, 50, 1)] + [(4, 50, 1)] + [(4, 100, 2)] * 3
    assert walked(length) == (8 + 2 + 4 + 12, 800 + 100 + 200 + 1200)
    assert [step for step in range(1, 10) if length.at(step).seq_len == 50] == [5, 6]


def test_what_was_trained_on_stays_and_the_settings_decide_the_rest():
    begun = Consumed((Steps(3, 2, 100), Steps(1, 5, 40)), {100: {"a": 6}}, 0, {"a": 600})
    assert (begun.step, begun.samples, begun.tokens) == (4, 11, 800)
    length = planned("train.total_tokens=2000", "train.global_batch='0:2 1200:4'", begun=begun)
    assert sizes(length) == [(2, 100, 0)] * 3 + [(5, 40, 0)] + [(2, 100, 0)] * 2 + [(4, 100, 0)] * 2
    walked(length)
    assert length.first_planned == 5 and [span.step for span in length.planned()] == [5, 7]
    assert length.taken(6) == (Steps(3, 2, 100), Steps(1, 5, 40), Steps(2, 2, 100))
    unchanged = planned("train.total_tokens=2000", "train.global_batch=2", begun=Consumed((Steps(3, 2, 100),)))
    assert unchanged.taken(5) == (Steps(5, 2, 100),)  # a run that is resumed often has a short history
    assert Consumed.from_json(json.loads(json.dumps(begun.as_json()))) == begun


def test_a_run_whose_tokens_are_trained_on_has_no_steps_left():
    begun = Consumed((Steps(10, 2, 100),))
    length = planned("train.total_tokens=1500", "train.global_batch=2", begun=begun)
    assert length.steps == length.schedule_steps == 10 and not [*length.planned()]
