import json
import math

import pytest

from train.strict_json import dumps, dumps_flagged, with_nan


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_and_flagged(number):
    record = {"step": 3, "loss": number, "wait_seconds": [1.0, number], "of": {"x": number, "y": (2.0,)}, "lr": 1e-3}
    assert strictly(dumps_flagged(record)) == {
        "step": 3,
        "loss": None,
        "wait_seconds": [1.0, None],
        "of": {"x": None, "y": [2.0]},
        "lr": 1e-3,
        "nonfinite": ["loss", "wait_seconds.1", "of.x"],
    }
    assert strictly(dumps([number, 1])) == [None, 1]


def test_what_is_finite_has_no_flag():
    record = {"step": 3, "loss": 1.5, "text": "NaN", "val_loss": None, "complete": True}
    assert strictly(dumps_flagged(record)) == record == with_nan(record)


def test_a_flagged_record_is_read_back_as_it_was():
    back = with_nan(strictly(dumps_flagged({"step": 3, "loss": math.inf, "val_loss": None})))
    assert math.isnan(back.pop("loss")) and back == {"step": 3, "val_loss": None}
