"""Numbers and ranges, as settings have them."""

import pytest

from conf.ranges import below, minus, ranges_of, said
from conf.validate import Machine, validate
from tests.shapes import preset


@pytest.mark.parametrize(
    ("entries", "ranges", "written"),
    [
        ([], [], "[]"),
        (["812"], [range(812, 813)], "[812]"),
        (["830-840", "812"], [range(812, 813), range(830, 841)], "[812,830-840]"),
        (["3-5", "6", " 4 - 9 "], [range(3, 10)], "[3-9]"),
        (["0-9", "3"], [range(10)], "[0-9]"),
    ],
)
def test_ranges_have_both_ends_and_are_joined_in_order(entries, ranges, written):
    assert ranges_of(entries) == ranges and said(ranges) == written
    assert ranges_of(written[1:-1].split(",") if ranges else []) == ranges


def test_what_is_below_an_end_and_what_is_left_without_others():
    ranges = ranges_of(["3-5", "8-12", "20"])
    assert said(below(ranges, 10)) == "[3-5,8-9]" and below(ranges, 3) == []
    assert said(minus(ranges, ranges_of(["4", "9-30"]))) == "[3,5,8]"
    assert minus(ranges, ranges) == [] and minus(ranges, []) == ranges


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "train.skip_steps=[8x]",
            "train.skip_steps=['8x']: 8x is neither a number nor a range; [812,830-",
        ),
        ("train.skip_steps=[9-3]", "train.skip_steps=['9-3']: 9-3 ends before it begins; 3-9 would work"),
        ("train.skip_steps=[0-3]", "train.skip_steps=['0-3']: steps count from 1"),
        ("train.skip_samples_at=[-1]", "train.skip_samples_at=['-1']: -1 is neither a number nor a range; "),
        ("train.spike_sigmas=0", "train.spike_sigmas=0.0: must be above 0 and finite, or null to skip no spike"),
        ("train.straggler_percent=-5", "train.straggler_percent=-5.0: must be above 0 and finite, or null to measure"),
        ("train.straggler_steps=1", "train.straggler_steps=1: must be at least 2, such as 50"),
    ],
)
def test_what_cannot_be_is_said(override, problem):
    _, problems = validate(preset("tiny", override), Machine(gpus=0))
    assert len(problems) == 1 and problems[0].startswith(problem)


def test_none_of_it_makes_a_run_another_but_another_guard_does():
    def name(*overrides):
        return preset("tiny", "name='${run_name:}'", *overrides).name

    plain = name()
    assert name("train.skip_steps=[3]", "train.skip_samples_at=[1-2]", "train.straggler_steps=9") == plain
    assert name("train.spike_sigmas=6") == plain != name("train.spike_sigmas=null")
