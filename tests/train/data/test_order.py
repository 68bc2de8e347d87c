from collections import Counter

import numpy as np
import pytest

from train.data.order import SampleOrder


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1000, 4097])
def test_each_epoch_is_a_permutation(n):
    order = SampleOrder(n, seed=3)
    epochs = [tuple(order.take(range(e * n, (e + 1) * n)).tolist()) for e in range(5)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len(set(epochs)) == 5


def test_golden():
    """From an implementation in Python's unbounded integers; a change would send running experiments elsewhere."""
    order = SampleOrder(1000, 7)
    assert order.take(range(8)).tolist() == [155, 301, 884, 385, 139, 466, 150, 493]
    assert order.take(range(1000, 1008)).tolist() == [101, 306, 905, 539, 884, 616, 472, 618]
    large = SampleOrder(500_000_000, 1)
    samples = [0, 1, 499_999_999, 500_000_000, 10**15]
    assert large.take(samples).tolist() == [351582829, 352859687, 430411462, 490563182, 170262682]
    assert SampleOrder(1 << 62, -3)[12345] == 1914817889990244936


def test_take_agrees_with_single_samples_across_epochs_and_in_any_shape():
    order = SampleOrder(10, 1)
    wanted = np.arange(36)[::-1].reshape(4, 9)
    assert order.take(wanted).tolist() == [[order[int(i)] for i in row] for row in wanted]
    assert order.take([]).tolist() == []
    assert isinstance(order[3], int)


def test_seeds_differ():
    orders = {tuple(SampleOrder(50, seed).take(range(50)).tolist()) for seed in range(-5, 20)}
    assert len(orders) == 25


@pytest.mark.parametrize(("n", "ways"), [(2, 2), (3, 6), (4, 24)])
def test_every_permutation_comes_up_about_as_often(n, ways):
    draws = 2400
    seen = Counter(
        tuple(SampleOrder(n, seed).take(range(e * n, e * n + n)).tolist()) for seed in range(40) for e in range(60)
    )
    expected = draws / ways
    chi2 = sum((count - expected) ** 2 / expected for count in seen.values())
    assert len(seen) == ways and chi2 < ways - 1 + 5 * (2 * (ways - 1)) ** 0.5


def test_order_is_well_mixed():
    n = 4097
    order = SampleOrder(n, 5).take(range(n)).astype(float)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.06
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    # How far neighbours lie apart: a third of the range in a random permutation.
    assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 0.02
    following = SampleOrder(n, 5).take(range(n, 2 * n)).astype(float)
    assert abs(np.corrcoef(order, following)[0, 1]) < 0.06


def test_memory_does_not_grow_with_the_number_of_sequences():
    order = SampleOrder(1 << 62, 0)
    found = order.take(range(1000))
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 1 << 62
    assert len(vars(order)) == 4 and not any(isinstance(value, np.ndarray) for value in vars(order).values())


def test_out_of_range():
    for n in (0, -1, (1 << 62) + 1):
        with pytest.raises(ValueError, match="from 1 to"):
            SampleOrder(n, 0)
    with pytest.raises(ValueError, match="counted from 0"):
        SampleOrder(5, 0)[-1]
