import itertools
import math

import pytest

from conf.train_settings import Decay, ScheduleConfig
from tests.shapes import preset
from train.learning_rate import length_of, rate_share


def curve(num_steps, **settings):
    schedule = ScheduleConfig(**settings)
    return [rate_share(step, num_steps, schedule) for step in range(1, num_steps + 1)]


def test_multi_step_is_the_papers():
    rates = curve(1000, warmup_steps=100)
    assert rates[:100] == [step / 100 for step in range(1, 101)]
    assert rates[100:800] == [1.0] * 700
    assert rates[800:900] == [0.316] * 100  # from 80 % of the tokens
    assert rates[900:] == [0.1] * 100  # from 90 %


def test_cosine_falls_from_the_end_of_warmup_to_its_final_share():
    rates = curve(1000, decay=Decay.cosine, warmup_steps=100, final=0.2)
    assert rates[99] == 1.0
    assert rates[550] == pytest.approx(0.6, abs=1e-3)  # halfway between the two
    assert rates[-1] == pytest.approx(0.2, abs=1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))


def test_wsd_is_flat_until_its_decay():
    rates = curve(1000, decay=Decay.wsd, warmup_steps=10, final=0.0, decay_share=0.2)
    assert rates[9:801] == [1.0] * 792
    assert rates[900] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.005)


@pytest.mark.parametrize("decay", list(Decay))
def test_any_schedule_survives_a_run_shorter_than_its_warmup_and_none_at_all(decay):
    assert curve(5, decay=decay, warmup_steps=2000) == [step / 2000 for step in range(1, 6)]
    assert all(0 < rate <= 1 for rate in curve(5, decay=decay, warmup_steps=0))


def test_length_follows_from_tokens_and_a_trial_keeps_the_schedule():
    length = length_of(preset("tiny", "train.total_tokens=10001", "train.global_batch=2", "train.seq_len=100"))
    assert (length.tokens_per_step, length.schedule_steps, length.steps) == (200, math.ceil(10001 / 200), 51)
    trial = length_of(
        preset("tiny", "train.total_tokens=10001", "train.global_batch=2", "train.seq_len=100", "train.max_steps=7")
    )
    assert (trial.schedule_steps, trial.steps) == (51, 7)
    assert length_of(preset("7b")).schedule_steps == math.ceil(2e12 / (2304 * 4096))
