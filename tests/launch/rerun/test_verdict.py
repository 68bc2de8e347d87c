"""What follows from checksums that a test makes up."""

import math

import pytest
import torch

from launch.rerun.notes import checksum
from launch.rerun.verdict import Attempt, first_difference, judge

NAMES = ["weights of bucket 0", "tokens", "layer 0", "received gradient of layer 0", "gradients of bucket 0"]
TOLERANCE = (1e-5, 1e-3)


def attempt(rank, device, wrong=(), loss=2.0, norm=1.0):
    """An attempt whose checksums are other than right from those names on that are wrong."""
    first = min((NAMES.index(name) for name in wrong), default=len(NAMES))
    return Attempt(rank, f"gpu {device}", loss, norm, {n: i * 10 + (i >= first) for i, n in enumerate(NAMES)})


def verdict(*attempts, recorded=(2.0, 1.0)):
    found = judge(attempts, recorded, TOLERANCE)
    (line,) = found.lines
    return found.hardware, found.devices, line


def test_all_alike_is_data_as_far_as_the_record_tells():
    alike = [attempt(rank, rank + shift) for rank in (0, 1) for shift in (0, 1, 2)]
    assert verdict(*alike)[:2] == (False, [])
    agree = "all 6 attempts agree to the last bit, on 4 devices"
    assert verdict(*alike, recorded=None)[2].startswith(f"{agree}; the run has no record of the step")
    assert verdict(*alike, recorded=(2.00001, 1.0005))[2].startswith(f"{agree}, and but for rounding with the run")
    assert verdict(*alike, recorded=(2.1, 1.0))[0] and verdict(*alike, recorded=(math.nan, 1.0))[0]
    lost = [attempt(0, device, loss=math.nan, norm=math.inf) for device in (0, 1)]
    assert not verdict(*lost, recorded=(math.nan, math.inf))[0]


def test_the_device_that_most_others_outvote_is_named_in_whatever_part():
    parts = [attempt(0, 0), attempt(0, 1, ["layer 0"]), attempt(0, 2)]
    parts += [attempt(1, 1, ["tokens"]), attempt(1, 2), attempt(1, 3)]
    hardware, devices, line = verdict(*parts)
    assert hardware and devices == ["gpu 1"]
    assert line == (
        "hardware is at fault: gpu 1 computes otherwise than all others (the part of rank 0, from layer 0 on; the part "
        "of rank 1, from tokens on)"
    )


def test_what_a_rank_receives_is_not_its_fault():
    sound = [attempt(1, device, ["received gradient of layer 0"] if device == 2 else ()) for device in (1, 2, 3)]
    parts = [attempt(0, 0), attempt(0, 1, ["layer 0"]), attempt(0, 2), *sound]
    assert verdict(*parts)[1] == ["gpu 1"]
    hardware, devices, line = verdict(*sound)
    assert hardware and devices == ["gpu 1", "gpu 2", "gpu 3"] and "a link between" in line


def test_a_device_that_wavers_is_named_though_there_are_only_two():
    hardware, devices, line = verdict(attempt(0, 0), attempt(0, 0, ["layer 0"]), attempt(0, 0), attempt(1, 1))
    assert hardware and devices == ["gpu 0"] and "computes not alike each time" in line


def test_of_two_that_always_differ_both_are_named():
    hardware, devices, line = verdict(attempt(0, 0, ["layer 0"]), attempt(0, 1))
    assert hardware and devices == ["gpu 0", "gpu 1"] and line.endswith("; a third device would tell which")
    three = [attempt(0, 0), attempt(0, 1, ["layer 0"]), attempt(1, 1, ["layer 0"]), attempt(1, 2)]
    hardware, devices, line = verdict(*three)  # of three devices in pairs, the one that is in both
    assert devices == ["gpu 1"] and "is part of every difference" in line


def test_the_first_step_on_which_replays_differ():
    same = [(3, 2.0, 1.0), (4, math.nan, 1.0), (5, 2.0, 1.0)]
    assert first_difference([same, same]) is None and first_difference([[], []]) is None
    assert first_difference([same, same, [*same[:2], (5, 2.0, 1.1)]]) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_one_bit_changes_a_checksum_and_the_order_of_computing_does_not(dtype):
    values = torch.arange(24).reshape(4, 6).to(dtype)
    assert checksum(values) == checksum(values.t()) == checksum(values.clone())
    other = values.clone()
    other.view(torch.int16)[0, 3] ^= 1
    assert checksum(other) != checksum(values)
