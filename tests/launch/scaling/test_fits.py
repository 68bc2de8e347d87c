"""Fits find the laws that losses were made by, within what they say of themselves."""

import numpy as np
import pytest

from launch import describe
from launch.scaling import laws
from launch.scaling.fits import IsoFlop, PowerLaw, bootstrap, isoflop, loss_law, near_optimal, power_law
from tests.shapes import preset

COMPUTE = np.geomspace(1e13, 1e16, 7)
LAW = PowerLaw(0.3, 0.45)


def test_a_power_law_is_found_and_noise_lies_within_its_interval():
    exact = power_law(COMPUTE, [LAW.at(c) for c in COMPUTE])
    assert (exact.coefficient, exact.exponent) == pytest.approx((0.3, 0.45))
    covered = 0
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(0, 0.1, (4, len(COMPUTE)))
        rows = [(c, LAW.at(c) * np.exp(e)) for of_run in noise for c, e in zip(COMPUTE, of_run, strict=True)]

        def fit(drawn):
            law = power_law(*zip(*drawn, strict=True))
            return law.coefficient, law.exponent

        ((low, high), (least, most)), without = bootstrap(rows, fit, 200, seed)
        covered += least <= 0.45 <= most
        assert without == 0 and low < high and most - least < 0.1
    assert 33 <= covered <= 40  # of 95 %


def test_the_least_loss_of_a_compute_is_found_where_it_lies():
    best, m = 3e6, np.geomspace(3e5, 3e7, 7)
    losses = 2.5 + 0.04 * np.log(m / best) ** 2
    found = isoflop(1e14, m, losses)
    assert (found.m, found.loss, found.tokens) == pytest.approx((3e6, 2.5, 1e14 / 3e6)) and found.measured
    assert found.at(1e6) == pytest.approx(2.5 + 0.04 * np.log(3) ** 2)
    assert not isoflop(1e14, m[4:], losses[4:]).measured  # an extrapolation, from larger models alone
    losses[0] = np.nan  # it diverged
    assert isoflop(1e14, m, losses).m == pytest.approx(3e6)
    with pytest.raises(ValueError, match="no minimum"):
        isoflop(1e14, m[1:], -losses[1:])
    with pytest.raises(ValueError, match="2 sizes have a loss"):
        isoflop(1e14, m[:3], losses[:3])


def test_model_and_data_share_compute_by_exponents_that_add_up_to_one():
    parabolas = [IsoFlop(c, LAW.at(c), 2.0, True, 0.1) for c in COMPUTE]
    m, d = (power_law(COMPUTE, [getattr(one, key) for one in parabolas]) for key in ("m", "tokens"))
    assert m.exponent + d.exponent == pytest.approx(1) and m.coefficient * d.coefficient == pytest.approx(1)


def test_a_loss_law_predicts_a_larger_run():
    losses = 1.7 + 40 * COMPUTE**-0.11
    law = loss_law(COMPUTE[:-1], losses[:-1])
    assert law.at(COMPUTE[-1]) == pytest.approx(losses[-1], rel=1e-4)
    assert (law.floor, law.exponent) == pytest.approx((1.7, 0.11), rel=0.02)
    with pytest.raises(ValueError, match="three computes"):
        loss_law(COMPUTE[:2], losses[:2])


def test_settings_near_the_best_are_those_within_a_quarter_of_a_percent():
    assert near_optimal([2.0, 2.004, 2.006, np.nan, np.inf]).tolist() == [True, True, False, False, False]
    assert not near_optimal([np.nan]).any()


def test_draws_that_allow_no_fit_are_counted():
    rows = [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)]
    (interval,), without = bootstrap(rows, lambda drawn: [power_law(*zip(*drawn, strict=True)).exponent], 500)
    assert interval == pytest.approx((1.0, 1.0)) and 30 < without < 90  # 3 of 27 draws are one row three times
    with pytest.raises(ValueError, match="more runs"):
        bootstrap(rows[:1], lambda drawn: [power_law(*zip(*drawn, strict=True)).exponent], 20)


def test_the_laws_give_what_the_paper_took_for_its_own_models():
    for name, lr, batch in (("7b", 4.2e-4, 2304), ("67b", 3.2e-4, 4608)):
        found = laws.advice(preset(name))
        assert found.lr == pytest.approx(lr, rel=0.03) and found.lr_set == lr
        assert found.batch_tokens / 4096 == pytest.approx(batch, rel=0.1)
        assert found.batch_tokens_set == batch * 4096 and found.compute == found.m * 2e12
        assert found.m_opt * found.d_opt == pytest.approx(found.compute, rel=0.01)
        text = laws.as_text(found, 4096)
        assert f"(set: {lr:.2e})" in text and "extrapolated here" in text
    within = laws.as_text(laws.advice(preset("7b", "train.total_tokens=1e9")), 4096)
    assert "extrapolated" not in within
    # A ramp's last batch is the one that the law is about.
    grown = laws.advice(preset("tiny", "train.global_batch='0:8 2e5:16'"))
    assert grown.batch_tokens_set == 16 * 256
    staged = ["train.seq_len=128", "data.stages=[{until: 2e5}, {until: 5e5, seq_len: 256}]"]
    text = describe.as_text(preset("tiny", *staged))
    assert "(set: 2,048 or 8)" in text  # sequences of the last stage
