import itertools

import pytest

from conf.train_settings import Decay, ScheduleConfig
from tests.shapes import preset
from train.learning_rate import rate_share, warnings
from train.length import length_by, length_of


def curve(num_steps, global_batch=1, **settings):
    schedule = ScheduleConfig(**settings)
    length = length_by(global_batch, 10, [], 10 * num_steps)
    return [rate_share(step, length, schedule) for step in range(1, length.schedule_steps + 1)]


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


@pytest.mark.parametrize("decay", list(Decay))
def test_a_schedule_is_over_tokens_whatever_the_batch(decay):
    """Ten steps of one sequence, then 990 sequences in steps of three: the rates of the same tokens."""
    even = curve(1000, decay=decay, warmup_steps=10)
    grown = curve(1000, global_batch="0:1 100:3", decay=decay, warmup_steps=10)
    assert grown == [*even[:10], *even[10::3]]


def test_a_warm_up_longer_than_the_run_is_said_with_what_it_reaches():
    config = preset("tiny", "train.global_batch='0:4 1e4:8'", "train.total_tokens=1e5", "schedule.warmup_steps=100")
    steps = length_of(config).steps
    (line,) = warnings(config, length_of(config))
    assert line.startswith(
        f"schedule.warmup_steps=100: longer than the run (train.total_tokens=100000), whose {steps} "
    )
    config.schedule.warmup_steps = steps
    assert warnings(config, length_of(config)) == []
