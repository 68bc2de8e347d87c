import numpy as np

from launch.report.thinning import borders, extremes, smoothed


def test_a_spike_of_one_step_among_a_million_stays_and_so_do_the_ends():
    values = 2 + np.exp(-np.arange(1_000_000) / 1e5)
    values[[123_456, 777_777]] = 50.0, -50.0
    places = extremes(values)
    assert {0, 123_456, 777_777, 999_999} <= set(places.tolist()) and len(places) < 2500
    assert np.all(np.diff(places) > 0)


def test_each_bucket_keeps_its_lowest_and_highest():
    values = np.random.default_rng(1).normal(size=20_000)
    drawn = values[extremes(values)]
    begins = borders(len(values))
    for begin, end in zip(begins, [*begins[1:], len(values)], strict=True):
        assert {values[begin:end].min(), values[begin:end].max()} <= set(drawn)


def test_the_beginning_is_finer_for_a_logarithmic_axis():
    begins = borders(1_000_000)
    assert np.sum(begins < 1000) > 100 and len(begins) < 1200
    assert np.diff(begins).max() <= 1_000_000 / 700 + 1


def test_few_points_all_stay_and_what_is_not_finite_goes():
    values = np.array([3.0, np.nan, 1.0, 2.0])
    assert extremes(values).tolist() == [0, 2, 3]
    assert extremes(np.full(3, np.nan)).tolist() == [] and smoothed(np.full(3, np.nan))[0].tolist() == []


def test_a_line_stays_a_line_when_it_is_smoothed_and_noise_is_averaged():
    line = np.linspace(8, 3, 5000)
    places, means, window = smoothed(line)
    assert window == 51
    np.testing.assert_allclose(means, line[places], rtol=1e-12)
    noisy = line + np.where(np.arange(5000) % 2, 0.5, -0.5)
    places, means, _ = smoothed(noisy)
    inner = (places > 25) & (places < 4974)
    assert np.abs(means - line[places])[inner].max() < 0.5 / 50
