"""When a run has diverged, by losses and gradients that a test makes up."""

import math

import pytest
import torch

from parallel.engine import StepResult
from train.health import Health, all_finite

FINE, SKIPPED, NAN = (2.0, 1.0), (2.0, math.nan), (math.nan, math.nan)


def judged(steps, max_skipped=3, finite=True, val_loss=2.0, last_val=None, length=99):
    """What is said after each step, and the judge; `finite` is what a look at the weights finds."""
    looks = []
    health = Health(0, max_skipped, lambda: looks.append(1) or finite, lambda: val_loss)
    said = []
    for step, (loss, norm) in enumerate(steps, 1):
        result = StepResult(loss, norm, not math.isfinite(norm), 0.0, [], 0.0)
        last = step == length
        said.append(health.diverged(step, result, last_val if last else None, last))
    return said, health, len(looks)


def test_a_row_of_skipped_steps_is_a_divergence_and_single_ones_are_none():
    said, health, looks = judged([FINE, SKIPPED, NAN, FINE, SKIPPED, SKIPPED, SKIPPED])
    assert said[:-1] == [None] * 6 and said[-1].startswith("3 steps in a row")
    assert health.last_sound == 4 and looks == 2  # one for each row of them
    assert judged([SKIPPED] * 50, max_skipped=None)[0] == [None] * 50


def test_weights_that_are_not_finite_end_a_run_at_once():
    assert judged([FINE, NAN], finite=False)[0] == [None, "the weights are not finite"]
    assert judged([FINE, (math.inf, 1.0)], finite=False)[0][-1] == "the weights are not finite"
    assert judged([FINE, FINE], finite=False, length=2)[0][-1] == "the weights are not finite"  # no loss will tell


@pytest.mark.parametrize(
    ("last", "val_loss", "said"),
    [
        (FINE, 2.0, None),
        (FINE, None, None),
        (FINE, math.nan, "the validation loss after the last step is nan"),
        (SKIPPED, None, None),
        (NAN, 2.0, None),  # the batch was to blame
        (NAN, None, "the loss of the last step is nan"),
        (NAN, math.inf, "the loss of the last step is nan"),
    ],
)
def test_complete_means_trained(last, val_loss, said):
    assert judged([FINE, last], last_val=val_loss, length=2)[0] == [None, said]


@pytest.mark.parametrize(
    ("row", "val_loss", "lost"),
    [(NAN, math.nan, True), (NAN, None, True), (NAN, 2.0, False), (SKIPPED, math.nan, False)],
)
def test_weights_are_lost_where_no_loss_since_is_finite(row, val_loss, lost):
    assert judged([FINE, row, row, row], val_loss=val_loss)[1].weights_are_lost() is lost


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_among_many_is_found(number):
    tensors = [torch.randn(1000), torch.randn(4, 500).t(), torch.empty(0)]
    assert all_finite(tensors) and all_finite([])
    tensors[1][300, 2] = number
    assert not all_finite(tensors)
