"""Which steps are spikes, by figures that a test makes up, and what is said of those that were skipped."""

import math
import statistics

import numpy as np
import pytest

from parallel.engine import Limits, StepResult
from train.spikes import LEAST, SKIPPED, WINDOW, SkippedStep, SkippedSteps, SpikeWindow, stretches

KIND = [8, 32, {"files": "1"}]


def result(loss, norm, limits=None):
    limits = limits or Limits()
    sound = math.isfinite(loss) and math.isfinite(norm) and loss <= limits.loss and norm <= limits.grad_norm
    return StepResult(loss, norm, not sound, 0.0, [], 0.0)


def taken(window, steps, kind=KIND):
    """The results of steps with these losses and norms, each judged by the window of those before."""
    found = []
    for loss, norm in steps:
        limits = window.limits(kind)
        found.append(result(loss, norm, limits))
        window.add(found[-1], limits)
    return found


def noise(count, seed=0):
    draws = np.random.default_rng(seed).normal(size=(count, 2))
    return [(2.0 + 0.1 * loss, 1.0 + 0.2 * norm) for loss, norm in draws.tolist()]


def test_the_limits_are_of_the_last_steps_alone():
    window, steps = SpikeWindow(6.0), noise(300)
    taken(window, steps)
    last = steps[-WINDOW:]
    for column, limit in enumerate((window.limits(KIND).loss, window.limits(KIND).grad_norm)):
        values = [step[column] for step in last]
        assert limit == pytest.approx(statistics.mean(values) + 6 * statistics.stdev(values), rel=1e-12)


@pytest.mark.parametrize("spike", [(3.5, 1.0), (2.0, 4.0)])
def test_a_spike_is_skipped_once_there_is_something_to_judge_it_by(spike):
    for before, skipped in ((LEAST - 1, False), (LEAST, True), (200, True)):
        *calm, last = taken(SpikeWindow(6.0), [*noise(before), spike])
        assert last.skipped is skipped and not any(one.skipped for one in calm)
    assert not taken(SpikeWindow(None), [*noise(200), spike])[-1].skipped
    assert not taken(SpikeWindow(60.0), [*noise(200), spike])[-1].skipped


def test_a_spike_hides_no_other_and_a_level_that_stays_is_followed():
    window = SpikeWindow(6.0)
    found = taken(window, [*noise(150), (2.0, 1e30), *noise(5, seed=1), (2.0, 4.0), (math.nan, math.inf)])
    assert [i for i, one in enumerate(found) if one.skipped] == [150, 156, 157]
    assert math.isfinite(window.limits(KIND).grad_norm)
    risen = taken(SpikeWindow(6.0), [*noise(150), *[(loss + 1.2, norm) for loss, norm in noise(40, seed=2)]])
    skipped = [one.skipped for one in risen[150:]]
    assert skipped[0] and 2 <= sum(skipped) < 10 and not any(skipped[10:])


def test_steps_of_another_batch_length_or_mixture_are_judged_anew():
    window = SpikeWindow(6.0)
    taken(window, noise(150))
    assert window.limits([*KIND]) != Limits()
    assert window.limits([8, 64, {"files": "1"}]) == Limits() and len(window) == 0


def test_a_window_that_was_kept_decides_as_the_one_it_was_kept_of():
    steps = noise(200, seed=3)
    whole = SpikeWindow(6.0)
    taken(whole, steps[:150])
    kept = SpikeWindow(6.0, whole.as_json())
    for loss, norm in steps[150:]:
        limits = whole.limits(KIND)
        assert kept.limits(KIND) == limits  # to the last bit
        whole.add(result(loss, norm, limits), limits)
        kept.add(result(loss, norm, limits), limits)


def described(loss=math.nan, norm=math.inf, limits=None, step=3):
    limits = limits or Limits()
    numbers, names = np.array([6, 7, 9, 10]), ["web", "code", "web", "web"]
    places, sequences = np.array([5, 1, 6, 8]), np.array([70, 3, 12, 44])
    return SkippedStep.of(step, result(loss, norm, limits), limits, numbers, 32, names, places, sequences)


def test_a_skipped_step_names_its_samples_by_source():
    found = described()
    assert found.samples == [[6, 7], [9, 10]] and found.places == {"web": [[5, 6], [8, 8]], "code": [[1, 1]]}
    assert found.sequences == {"web": [70, 12, 44], "code": [3]} and found.figures == {"skipped": "not finite"}
    assert stretches([]) == [] and stretches([4, 3, 5]) == [[3, 5]]


def test_what_was_too_high_is_said():
    loss = described(9.0, 1.0, Limits(3.0, 2.0))
    assert loss.reason == "loss" and "its loss of 9 is above 3, train.spike_sigmas" in loss.why
    assert loss.figures == {"skipped": "loss", "loss_limit": 3.0, "grad_norm_limit": 2.0}
    norm = described(2.0, 7.5, Limits(3.0, 2.0))
    assert norm.reason == "grad_norm" and "its gradient norm of 7.5 is above 2," in norm.why
    both = described(9.0, 7.5, Limits(3.0, 2.0))
    assert "its loss of 9 is above 3 and its gradient norm of 7.5 is above 2," in both.why


def test_the_first_skipped_step_is_said_and_then_at_most_one_a_minute(tmp_path):
    now = [500.0]
    skipped = SkippedSteps(tmp_path, lambda: now[0])
    assert not (tmp_path / SKIPPED).exists()
    said = []
    for step in range(1, 100, 2):
        now[0] += 3.0
        said.append(skipped.add(described(step=step)))
    told = [text for text in said if text]
    assert len(told) == 3 and skipped.total == 50
    assert told[0].startswith("step 1 was skipped: its loss or gradients are not finite (loss nan, norm inf), and the")
    assert "samples 6 to 7, 9 to 10 of the order (web, code; skipped.jsonl has the sequences)" in told[0]
    assert told[0].endswith("skipped so far: 1") and told[1].endswith("skipped so far: 21")
    assert len((tmp_path / SKIPPED).read_text().splitlines()) == 50
    skipped.total = 10  # as a resumed run has it
    now[0] += 100
    spike = skipped.add(described(9.0, 1.0, Limits(3.0, 2.0), step=200))
    assert (
        "goes on, train.skip_steps=[200] and resume=… of an earlier checkpoint would help; " in spike
        and spike.endswith("skipped so far: 11")
    )
