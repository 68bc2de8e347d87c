"""Which orderings came out, from numbers made up so that they do and do not."""

import copy

import pytest

from launch.study.findings import _efficiency, _orderings, as_text
from launch.study.pictures import draw

ALPHAS = ["0.05", "0.1", "0.2"]


def losses(*values):
    return dict(zip(["0", *ALPHAS], values, strict=True))


def decode(*seconds):
    return [{"batch": 1, "context": c, "seconds": s} for c, s in zip((10, 20), seconds, strict=True)]


@pytest.fixture
def found():
    """All orderings hold."""
    four = {
        "mean": losses(3.1, 3.01, 2.95, 2.899),
        "first": losses(3.3, 3.05, 3.0, 2.95),
        "random": losses(5.0, 3.3, 3.1, 3.0),
    }
    one = {
        "mean": losses(3.6, 3.1, 3.0, 2.95),
        "first": losses(3.9, 3.2, 3.1, 3.0),
        "random": losses(6.0, 3.5, 3.2, 3.1),
    }
    original = {"original": losses(3.0, 2.99, 2.94, 2.89)}
    shape = {"parameters": 10, "kv_cache_bytes_per_token": 64}
    models = [
        {"attention": "MHA", "kv_heads": 8, "decode": decode(0.02, 0.04), "val_loss": original},
        {"attention": "GQA-4", "kv_heads": 4, "decode": decode(0.02, 0.03), "val_loss": four},
        {"attention": "MQA", "kv_heads": 1, "decode": decode(0.02, 0.015), "val_loss": one},
    ]  # fmt: skip
    facts = {"shape": "6 layers", "data": "stdlib", "tokens": 100, "rate": "end", "device": "cpu, float32"}
    return {**facts, "alpha": "0.05", "alphas": ALPHAS, "models": [{**shape, **model} for model in models]}


def held(found):
    return [ordering["held"] for ordering in _orderings(found)]


def test_all_hold(found):
    assert held(found) == [True] * 5


@pytest.mark.parametrize(
    ("model", "method", "share", "loss", "fails"),
    [
        (1, "first", "0", 3.05, 0),  # first head better than mean
        (2, "random", "0.05", 3.15, 1),  # random better than first
        (1, "mean", "0", 3.7, 2),  # GQA worse than MQA; and worse than its own first head
        (1, "mean", "0.05", 3.04, 3),  # 1.7 % above MHA
        (2, "mean", "0.2", 2.89, 4),  # the gap of 0.06 at 0.1 closes
    ],
)
def test_each_can_fail(model, method, share, loss, fails, found):
    found["models"][model]["val_loss"][method][share] = loss
    assert held(found)[fails] is False
    assert sum(one is False for one in held(found)) == (2 if fails == 2 else 1)


def test_what_was_not_measured_is_not_judged(found):
    alone = copy.deepcopy(found)
    for model in alone["models"][1:]:
        model["val_loss"] = {"mean": model["val_loss"]["mean"]}
    del alone["models"][2]
    alone["alphas"] = ["0.05"]
    assert held(alone) == [None, None, None, True, None]
    alone["models"] = alone["models"][:1] + found["models"][2:]
    assert held(alone)[2:4] == [None, None]


def test_efficiency_is_time_saved_over_quality_lost(found):
    four, one = _efficiency(found)
    assert four["seconds_per_nat"] == pytest.approx((0.04 - 0.03) / (3.01 - 2.99))
    assert one["seconds_per_nat"] == pytest.approx((0.04 - 0.015) / (3.1 - 2.99))
    found["models"][1]["val_loss"]["mean"]["0.05"] = 2.98
    assert _efficiency(found)[0]["seconds_per_nat"] is None


def test_the_text_states_numbers_and_verdicts(found, tmp_path):
    found["models"][1]["val_loss"]["first"]["0"] = 3.05
    found["models"][2]["val_loss"]["mean"]["0.05"] = 2.95
    found |= {"efficiency_gain": _efficiency(found), "orderings": _orderings(found)}
    text = as_text(found)
    assert "GQA-4: efficiency gain = (40.0 - 30.0 ms) / (3.0100 - 2.9900 nats) = 500 ms per nat" in text
    assert "MQA: efficiency gain = (40.0 - 15.0 ms) / (2.9500 - 2.9900 nats) = no quality was lost" in text
    assert "for MQA only: mean better than first better than random, right after conversion (GQA-4 3.1000" in text
    found["models"][2]["val_loss"]["mean"]["0"] = 4.0
    found["orderings"] = _orderings(found)
    assert "\nNOT reproduced: mean better than first better than random, right after conversion" in as_text(found)
    assert "\nreproduced: MQA worst right after conversion (GQA-4 +0.1000, MQA +0.6000)" in text
    assert [path.name for path in draw(found, tmp_path)] == ["loss.png", "tradeoff.png"]
