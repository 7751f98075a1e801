"""The bootstrap against scipy, the exact binomial bound, and sums written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fdu.evaluation.intervals import Bootstrap, interval, share_interval, wilson


def test_a_mean_against_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=80)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = interval(Bootstrap([80], resamples=20000).means({0: values}))
    assert found == pytest.approx((expected.low, expected.high), abs=0.02 * (expected.high - expected.low))


def test_a_difference_of_pairs_against_scipy() -> None:
    """Pairs that rise and fall together leave a narrow interval of their difference; resampled apart, a wide one."""
    generator = np.random.default_rng(2)
    before = generator.normal(size=60)
    after = before + 0.1 * generator.normal(size=60)
    bootstrap = Bootstrap([60], resamples=20000)
    found = interval(bootstrap.means({0: after}) - bootstrap.means({0: before}))
    expected = stats.bootstrap(
        (before, after),
        lambda x, y, axis: np.mean(y - x, axis=axis),
        paired=True,
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.02 * (expected.high - expected.low))
    assert found[1] - found[0] < 0.2 * np.diff(interval(bootstrap.means({0: before}))).item()


def test_a_mean_over_classes_keeps_each_at_its_number_of_images() -> None:
    """All of one class right and none of the other: no resample mixes them, and the mean is a half in each."""
    bootstrap = Bootstrap([10, 30], resamples=50)
    assert [weights.sum(1).tolist() for weights in bootstrap.weights] == [[10.0] * 50, [30.0] * 50]
    np.testing.assert_allclose(bootstrap.means({0: np.ones(10), 1: np.zeros(30)}), 0.5)


def test_means_over_pairs_leave_out_an_image_with_itself() -> None:
    generator = np.random.default_rng(4)
    matrix = generator.normal(size=(7, 7))
    matrix = matrix + matrix.T
    np.fill_diagonal(matrix, 0)
    noise = [0, 1, 2, 0, 1, 2, 3]  # of the images of two probes
    bootstrap = Bootstrap([3, 4], resamples=6)
    of_all, resampled = bootstrap.pair_means(matrix, [0, 1])
    weights = [np.ones(7), *np.concatenate(bootstrap.weights, axis=1)]
    for found, row in zip((of_all, *resampled), weights, strict=True):
        held = np.repeat(np.arange(7), row.astype(int))
        pairs = [matrix[i, j] for i in held for j in held if noise[i] != noise[j]]
        assert found == pytest.approx(np.mean(pairs))


def test_means_over_pairs_leave_out_images_of_one_noise() -> None:
    """Two classes whose images of one seed are the same images: the mean over pairs does not count them as alike."""
    values = np.random.default_rng(7).normal(size=30)
    twice = np.concatenate([values, values])
    of_all, _ = Bootstrap([30, 30], resamples=2).pair_means(np.outer(twice, twice), [0, 1])
    once = (values.sum() ** 2 - (values**2).sum()) / (30 * 29)
    assert of_all == pytest.approx(once)


@pytest.mark.parametrize(("right", "images"), [(0, 32), (32, 32), (0, 5)])
def test_where_all_agree_the_exact_bound_is_taken(right: int, images: int) -> None:
    hits = np.full(images, float(right == images))
    found = share_interval(hits.mean(), Bootstrap([images]).means({0: hits}), images)
    exact = stats.binomtest(right, images).proportion_ci(0.95, method="exact")
    assert found == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_a_difference_of_shares_may_lie_below_zero() -> None:
    low, high = share_interval(0.0, np.zeros(100), 32, lowest=-1)
    assert low == -high and high == pytest.approx(1 - 0.025 ** (1 / 32))


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    truth, held = np.array([0.9, 0.6, 0.8]), 0
    for seed in range(300):
        hits = {place: (generator.random(40) < share).astype(float) for place, share in enumerate(truth)}
        bootstrap = Bootstrap([40] * 3, resamples=400, seed=seed)
        low, high = share_interval(np.mean([one.mean() for one in hits.values()]), bootstrap.means(hits), 120)
        held += low <= truth.mean() <= high
    assert 0.91 < held / 300 < 0.98


def test_images_of_one_noise_vary_together() -> None:
    """Classes whose image i depends on noise i: resampled apart, their mean would seem to vary by half as much."""
    generator, held = np.random.default_rng(8), 0
    for seed in range(300):
        noise = generator.normal(size=40)
        values = {place: noise + 0.5 * generator.normal(size=40) for place in range(6)}
        low, high = interval(Bootstrap([40] * 6, resamples=400, seed=seed).means(values))
        held += low <= 0 <= high
    assert held / 300 > 0.91


def test_the_same_seed_gives_the_same_interval() -> None:
    values = {0: np.random.default_rng(6).random(20)}
    first, again, other = (interval(Bootstrap([20], seed=seed).means(values)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("count", "images"), [(0, 32), (1, 32), (17, 32), (31, 32), (32, 32), (1, 1)])
def test_the_interval_of_one_share_against_scipy(count: int, images: int) -> None:
    expected = stats.binomtest(count, images).proportion_ci(0.95, method="wilson")
    assert wilson(count / images, images) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_resample_without_pairs_does_not_count() -> None:
    """Of two images half of the resamples hold one of them twice, which is no pair; the only pair is at 1."""
    matrix = np.array([[0.0, 1.0], [1.0, 0.0]])
    bootstrap = Bootstrap([2], resamples=200)
    _, found = bootstrap.pair_means(matrix, [0])
    twice = bootstrap.weights[0].max(1) == 2
    assert twice.any() and np.isnan(found[twice]).all() and (found[~twice] == 1).all()
    assert interval(found) == (1.0, 1.0)


def test_intervals_need_two_images_of_each_class() -> None:
    bootstrap = Bootstrap([1, 2, 3])
    assert not bootstrap.tells([0]) and not bootstrap.tells([0, 2]) and bootstrap.tells([1]) and bootstrap.tells([1, 2])
    assert not bootstrap.tells([1], images=3) and bootstrap.tells([2], images=3) and bootstrap.tells([1, 2], images=3)
