"""What sections say by rule, from numbers made up so that claims hold with all seeds, with some and with none."""

import copy

import pytest

from launch.study import tradeoff, uptrained, warm_starts, windows
from launch.study.findings import as_text, tables
from launch.study.pictures import draw
from launch.study.seeds import beyond_spread, difference, line_of, ordering, said, spread

SHIFTS = (-0.01, 0.0, 0.01)
"""Of all losses with a seed, so that figures spread and orderings do not change."""
SHARES = ["0", "0.05", "0.1", "0.2"]


def over_seeds(value, *own):
    """A loss with three seeds; `own` are further shifts."""
    return spread([value + shift + more for shift, more in zip(SHIFTS, own or (0, 0, 0), strict=True)])


def losses(*values):
    """Those above 0.05 are of the first seed."""
    of_all = {share: over_seeds(value) for share, value in zip(SHARES[:2], values[:2], strict=True)}
    return of_all | {share: spread([value + SHIFTS[0]]) for share, value in zip(SHARES[2:], values[2:], strict=True)}


@pytest.fixture
def uptraining():
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
    models = [
        {"attention": "MHA", "kv_heads": 8, "val_loss": {"original": losses(3.0, 2.99, 2.94, 2.89)}},
        {"attention": "GQA-4", "kv_heads": 4, "val_loss": four},
        {"attention": "MQA", "kv_heads": 1, "val_loss": one},
    ]
    models = [{"parameters": 10, **model} for model in models]
    return {"alpha": "0.05", "seeds": [1, 2, 3], "models": models}


def held(found):
    return [ordering["held"] for ordering in uptrained.orderings(found)]


def set_loss(found, model, method, share, seed, value):
    figure = found["models"][model]["val_loss"][method][share]
    values = list(figure["values"])
    values[seed] = value
    found["models"][model]["val_loss"][method][share] = spread(values)


def test_all_hold(uptraining):
    assert held(uptraining) == [True] * 5
    assert [one["seeds"] for one in uptrained.orderings(uptraining)] == [3, 3, 3, 3, 1]


@pytest.mark.parametrize(
    ("model", "method", "share", "loss", "fails"),
    [
        (1, "first", "0", 3.05, 0),  # first head better than mean
        (2, "random", "0.05", 3.15, 1),  # random better than first
        (1, "mean", "0", 3.7, 2),  # GQA worse than MQA; and worse than its own first head
        (1, "mean", "0.05", 3.02, 3),  # 1.3 % above MHA
        (2, "mean", "0.2", 2.88, 4),  # the gap of 0.06 at 0.1 closes
    ],
)
def test_each_can_fail_with_one_seed(model, method, share, loss, fails, uptraining):
    set_loss(uptraining, model, method, share, 0, loss)
    assert held(uptraining)[fails] is False
    assert sum(one is False for one in held(uptraining)) == (2 if fails == 2 else 1)
    judged = uptrained.orderings(uptraining)[fails]
    name = "MQA" if fails == 2 else uptraining["models"][model]["attention"]
    assert judged["held_for"][name] == judged["seeds"] - 1
    assert not line_of(judged).startswith(("reproduced with each of 3 seeds:", "reproduced with the one seed:"))


def test_what_was_not_measured_is_not_judged(uptraining):
    alone = copy.deepcopy(uptraining)
    for model in alone["models"][1:]:
        model["val_loss"] = {"mean": model["val_loss"]["mean"]}
    del alone["models"][2]
    for model in alone["models"]:
        for of_method in model["val_loss"].values():
            del of_method["0.1"]
    assert held(alone) == [None, None, None, True, None]
    alone["models"] = alone["models"][:1] + uptraining["models"][2:]
    assert held(alone)[2:4] == [None, None]


def test_differences_are_taken_seed_by_seed():
    one, other = spread([3.0, 3.5, 4.0]), spread([2.9, 3.4, 3.9])
    above = difference(one, other)
    assert above["values"] == pytest.approx([0.1] * 3) and above["sd"] == pytest.approx(0.0, abs=1e-9)
    assert ordering(above) == "higher by 0.1000 ± 0.0000 with each of 3 seeds" and beyond_spread(above)
    assert said(spread([1.0, 2.0, 3.0]), ".1f") == "2.0 ± 1.0" and said(spread([1.0]), ".1f") == "1.0"
    mixed = spread([-0.3, -0.2, 0.1])
    assert ordering(mixed) == "in no order (lower with 2 of 3 seeds, -0.1333 ± 0.2082)" and not beyond_spread(mixed)
    assert not beyond_spread(spread([-0.1, -0.2, -0.9])) and not beyond_spread(spread([-0.1]))
    assert ordering(spread([-0.25])) == "lower by 0.2500 with the one seed"
    assert ordering(spread([0.0, 0.0])).startswith("in no order (lower with 0 of 2")


def decode(seconds, small_seconds=0.016, of_four=(0, 0, 0)):
    def model(name, layers, cache, loss, longest):
        times = [{"batch": 1, "context": c, "seconds": s} for c, s in ((10, 0.02), (20, longest))]
        shape = {"kv_heads": 8, "layers": layers, "parameters": 100 * layers, "kv_cache_bytes_per_token": cache}
        return {"name": name, **shape, "val_loss": loss, "decode": times}

    models = [
        model("MHA", 6, 64, over_seeds(2.99), seconds[0]),
        model("GQA-4", 6, 32, over_seeds(3.01, *of_four), seconds[1]),
        model("MQA", 6, 8, over_seeds(2.98), seconds[2]),
        model("MHA, 3 layers", 3, 32, over_seeds(3.05), small_seconds),
    ]
    found = {"alpha": "0.05", "device": "cpu, float32", "models": models}
    return {**found, "efficiency_gain": tradeoff.efficiency(found)}


def test_efficiency_is_time_saved_over_quality_lost():
    four, one, _ = decode((0.04, 0.03, 0.015))["efficiency_gain"]
    assert four["seconds_per_nat"] == pytest.approx((0.04 - 0.03) / (3.01 - 2.99))
    assert one["seconds_saved"] == pytest.approx(0.025) and one["seconds_per_nat"] is None


@pytest.mark.parametrize(
    ("of_four", "said"),
    [
        ((0.0, 0.0, -0.03), "(0.0100 ± 0.0173 nats) = not told apart from none: not every seed lost quality"),
        ((0.1, 0.0, -0.02), "= not told apart from none: not every seed lost quality"),
        ((-0.03, -0.03, -0.03), "= no quality was lost"),
    ],
)
def test_an_efficiency_is_that_of_a_loss_with_every_seed(of_four, said):
    found = decode((0.04, 0.03, 0.015), of_four=of_four)
    assert found["efficiency_gain"][0]["seconds_per_nat"] is None
    (line,) = (line for line in tradeoff.DECODE.text(found, {}).splitlines() if line.startswith("GQA-4: efficiency"))
    assert line.endswith(said), line


class Asked:
    """What the section of the smaller model asks of results."""

    class study:
        class settings:
            alpha = 0.05


def test_the_smaller_model_is_judged_by_time_and_by_all_seeds():
    found = decode((0.04, 0.03, 0.016))
    smaller = tradeoff.SMALLER.findings(Asked, {"decode": found})
    text = tradeoff.SMALLER.text(smaller, {})
    four, mqa = (line for line in text.splitlines() if "against MHA, 3 layers" in line)
    assert "lower by 0.0400 ± 0.0000 with each of 3 seeds, at 1.88 times its time of a token: neither is better" in four
    assert "at 1.00 times its time of a token: fewer heads are the better trade here." in mqa
    found["models"][2]["val_loss"] = over_seeds(3.0, 0.0, 0.0, 0.2)
    text = tradeoff.SMALLER.text(tradeoff.SMALLER.findings(Asked, {"decode": found}), {})
    (mqa,) = (line for line in text.splitlines() if line.startswith("MQA against MHA, 3 layers"))
    assert "loss in no order (lower with 2 of 3 seeds" in mqa and mqa.endswith("neither is better at the other's cost.")
    found["models"][2]["val_loss"] = over_seeds(3.2)
    text = tradeoff.SMALLER.text(tradeoff.SMALLER.findings(Asked, {"decode": found}), {})
    assert "higher by 0.1500 ± 0.0000 with each of 3 seeds, at 1.00 times its time of a token: fewer layers" in text


def windowed(*losses_of_full_and_half):
    """MHA and MQA of a context of 32 tokens without a window and with one of 4."""
    models = []
    for heads, name, (full, half) in zip((8, 1), ("MHA", "MQA"), losses_of_full_and_half, strict=True):
        for window, loss in ((None, full), (4, half)):
            shape = {"attention": name, "kv_heads": heads, "window": window, "pattern": None}
            cache = heads * (window or 32)
            above = difference(loss, full)
            models.append({**shape, "cache_bytes": cache, "val_loss": loss, "above_without": above})
    return {"alpha": "0.05", "context": 32, "models": models}


def test_windows_are_judged_against_fewer_heads_of_no_less_cache():
    found = windowed((over_seeds(3.0), over_seeds(3.1)), (over_seeds(3.2), over_seeds(3.4)))
    best = [(one["attention"], one["window"]) for one in windows.best_trades(found["models"])]
    assert best == [("MHA", None), ("MHA", 4), ("MQA", 4)]
    text = windows.PART.text(found, {})
    assert "MHA with window 4, no more cache than MQA without: loss lower by 0.1000 ± 0.0000 with each of 3" in text
    found = windowed((over_seeds(3.0), over_seeds(3.1, 0.2, 0, 0)), (over_seeds(3.2), over_seeds(3.15)))
    assert [(one["attention"], one["window"]) for one in windows.best_trades(found["models"])][1:] == [("MQA", 4)]
    assert "MQA without: loss in no order (lower with 2 of 3 seeds" in windows.PART.text(found, {})


def warm(*above):
    base = over_seeds(3.1)
    ways = {}
    for name, of_seeds in zip(("similar", "step by step"), above, strict=True):
        loss = over_seeds(3.1, *of_seeds)
        converted = over_seeds(3.5) if name == "similar" else None
        ways[name] = {"converted": converted, "val_loss": loss, "above": difference(loss, base)}
    model = {"attention": "MQA", "kv_heads": 1, "base": {"converted": over_seeds(3.6), "val_loss": base}, "ways": ways}
    return {"alpha": "0.05", "base": "mean", "models": [model]}


def test_a_warm_start_beats_the_mean_beyond_the_spread_or_it_is_not_said_to():
    *_, last = warm_starts.conclusions(warm((-0.1, -0.11, -0.09), (-0.3, -0.01, -0.02)))
    assert last.startswith("Better than the mean of neighbours beyond the spread") and last.endswith(
        ": similar for MQA."
    )
    judged, last = warm_starts.conclusions(warm((-0.1, 0.01, -0.1), (0.1, 0.11, 0.09)))
    assert last.startswith("None is better than the mean of neighbours beyond the spread")
    assert "similar in no order (lower with 2 of 3 seeds" in judged and "step by step higher by 0.1000" in judged


def test_the_text_has_all_sections_and_what_failed(uptraining, tmp_path):
    set_loss(uptraining, 1, "first", "0", 0, 3.05)
    sections = {
        "uptraining": {**uptraining, "orderings": uptrained.orderings(uptraining)},
        "decode": decode((0.04, 0.03, 0.015)),
        "heads": {"failed": "no rows"},
        "windows": windowed((over_seeds(3.0), over_seeds(3.1)), (over_seeds(3.2), over_seeds(3.4))),
        "warm_starts": warm((-0.1, -0.11, -0.09), (-0.3, -0.01, -0.02)),
    }
    facts = {"shape": "6 layers", "data": "stdlib", "tokens": 100, "rate": "end", "alpha": "0.05", "seeds": [1, 2, 3]}
    found = {**facts, "seeds_of": "pretraining", "sections": sections}
    text = as_text(found)
    assert "3 seeds (1, 2, 3), each a pretraining of its own" in text
    assert "Shares above alpha = 0.05, and times, are of the first seed." in text
    assert "GQA-4: efficiency gain = (40.0 - 30.0 ms) / (0.0200 ± 0.0000 nats) = 500 ms per nat" in text
    assert "MQA: efficiency gain = (40.0 - 15.0 ms) / (-0.0100 ± 0.0000 nats) = no quality was lost" in text
    assert "reproduced with each of 3 seeds for MQA only: mean better than first better than random, right" in text
    assert "reproduced with the one seed: little gain beyond alpha = 0.1" in text
    assert "GQA-4 after alpha = 0.05 against MHA trained on as long: loss higher by 0.0200 ± 0.0000 with each" in text
    assert "\nheads: How many different patterns heads hold\n" in text and "\nfailed: no rows" in text
    names = [path.name for path in draw(found, tmp_path)]
    assert not {path.removesuffix(".png") for path in names} & set(tables(found))  # W&B would keep one of the two
    assert names == ["loss.png", "tradeoff.png", "windows.png", "warm-starts.png"]
    logged = tables(found)
    assert set(logged) == {"val_loss", "orderings", "decode", "windows_loss", "warm_starts"}
    columns, rows = logged["val_loss"]
    of_random = [row for row in rows if row[columns.index("method")] == "random" and row[1] == 4]
    assert [(row[3], row[4]) for row in of_random[:4]] == [(0.0, 1), (0.0, 2), (0.0, 3), (0.05, 1)]


def test_one_seed_has_no_spread_and_states_no_ordering_over_seeds(uptraining):
    for model in uptraining["models"]:
        for of_method in model["val_loss"].values():
            for share, figure in of_method.items():
                of_method[share] = spread(figure["values"][:1])
    alone = {**uptraining, "seeds": [7]}
    facts = {"shape": "6 layers", "data": "stdlib", "tokens": 100, "rate": "end", "alpha": "0.05", "seeds": [7]}
    sections = {"uptraining": {**alone, "orderings": uptrained.orderings(alone)}}
    text = as_text({**facts, "seeds_of": "pretraining", "sections": sections})
    assert "One seed, 7: figures have no spread" in text and "±" not in text and "each of" not in text
