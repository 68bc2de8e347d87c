"""The order of sources: within a sequence of every share, at every sample, and a function of its number alone."""

import math
from fractions import Fraction

import numpy as np
import pytest

from train.data.mixture import LONGEST_PERIOD, Mixture

N = 100_000


def random_weights(trial):
    """Of up to 50 sources: whole numbers, decimals, orders of magnitude, or one large and many small."""
    random = np.random.default_rng(trial)
    number = 1 + trial * 49 // 39
    kinds = [
        random.integers(1, 100, number),
        np.round(random.random(number) + 0.001, 3),
        10.0 ** -random.integers(0, 4, number),
        np.array([1.0] + [0.001] * (number - 1)),
    ]
    return {f"source{index:02}": float(weight) for index, weight in enumerate(kinds[trial % 4])}


@pytest.mark.parametrize("trial", range(40))
def test_shares_are_kept_to_within_a_sequence_at_every_sample(trial):
    mixture = Mixture(random_weights(trial))
    sources, positions = mixture.take(np.arange(N))
    counts = np.zeros(len(mixture.names), np.int64)
    shares, numbers = mixture.parts / mixture.period, np.arange(1, N + 1)
    for source, share in enumerate(shares):
        so_far = np.cumsum(sources == source)
        # Tijdeman's bound, which is less than 1; the count is exact, the share a float.
        assert np.abs(so_far - numbers * share).max() <= 1 - 1 / max(1, 2 * len(shares) - 2) * (len(shares) > 1) + 1e-6
        assert np.array_equal(positions[sources == source], np.arange(so_far[-1]))
        counts[source] = so_far[-1]
    assert np.array_equal(mixture.counts(N), counts)


@pytest.mark.parametrize("trial", [7, 20, 39])
def test_a_billion_samples_in_it_is_still_so(trial):
    mixture = Mixture(random_weights(trial))
    for start in (10**12, 10**12 + 12_345, 2**61):
        sources, positions = mixture.take(np.arange(start, start + 1000))
        counts = mixture.counts(start)
        for place, (source, position) in enumerate(zip(sources, positions, strict=True)):
            assert position == counts[source]
            counts[source] += 1
            exact = Fraction(int(mixture.parts[source]) * (start + place + 1), mixture.period)
            assert abs(counts[source] - exact) < 1
        for source, position in enumerate(counts):
            after = mixture.index_of(source, int(position))
            assert mixture.counts(after)[source] == position and mixture.take([after])[0][0] == source


def test_weights_are_shares_as_they_are_written_and_their_order_is_no_matter():
    web, code = ("web", 0.7), ("code", 0.1)
    mixture = Mixture(dict([web, code]))
    assert mixture.shares == {"code": Fraction(1, 8), "web": Fraction(7, 8)} and mixture.period == 8
    other = Mixture({"code": 1, "web": 7, "books": 0})
    assert other.names == mixture.names and other.take(range(8))[0].tolist() == mixture.take(range(8))[0].tolist()
    assert Mixture({"all": 3e-7}).take([0, 5, 10**15])[1].tolist() == [0, 5, 10**15]
    assert mixture.rounding() is None


def test_shares_that_are_no_millionths_are_rounded_and_said():
    weights = {"a": math.pi, "b": math.e, "c": 1e-12}
    mixture = Mixture(weights)
    assert mixture.period == LONGEST_PERIOD and mixture.parts.min() == 1
    for part, share in zip(mixture.parts, mixture.shares.values(), strict=True):
        assert abs(part / LONGEST_PERIOD - share) < 2e-6
    assert mixture.rounding().startswith("shares are rounded to millionths, by at most ")


@pytest.mark.parametrize("weights", [{"a": -1, "b": 1}, {"a": 0}, {}, {"a": math.nan}, {"a": math.inf}])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="finite, not negative and not all zero"):
        Mixture(weights)


def test_samples_are_counted_from_zero():
    with pytest.raises(ValueError, match="counted from 0"):
        Mixture({"a": 1}).take([-1])
