"""Intervals and metrics against scikit-learn, scipy and sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cosine
from sklearn.metrics.pairwise import cosine_similarity, polynomial_kernel, rbf_kernel
from torch import Tensor

from fdu.evaluation.intervals import Bootstrap, Share, interval, reach_unseen, share_interval, uncertainty, wilson
from fdu.evaluation.metrics.clip_score import clip_score
from fdu.evaluation.metrics.cmmd import CMMD
from fdu.evaluation.metrics.kid import KID
from fdu.evaluation.metrics.metric import SetMetric
from fdu.evaluation.metrics.perceptual import perceptual_distance
from fdu.evaluation.metrics.unlearn_canvas import CRA, IRA, UA


def test_a_mean_against_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=80)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = interval(Bootstrap([80], resamples=10000).means({0: values}))
    assert found == pytest.approx((expected.low, expected.high), abs=0.03 * (expected.high - expected.low))


def test_a_difference_of_pairs_against_scipy() -> None:
    """Pairs that rise and fall together leave a narrow interval of their difference; resampled apart, a wide one."""
    generator = np.random.default_rng(2)
    before = generator.normal(size=60)
    after = before + 0.1 * generator.normal(size=60)
    bootstrap = Bootstrap([60], resamples=10000)
    found = interval(bootstrap.means({0: after}) - bootstrap.means({0: before}))
    expected = stats.bootstrap(
        (before, after),
        lambda x, y, axis: np.mean(y - x, axis=axis),
        paired=True,
        n_resamples=10000,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.03 * (expected.high - expected.low))
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
    assert low == -high and high == reach_unseen(32) == pytest.approx(1 - 0.025 ** (1 / 32))
    assert share_interval(0.5, np.array([0.25, 0.75]), 32) == pytest.approx((0.2625, 0.7375))


def test_the_same_seed_gives_the_same_interval() -> None:
    values = {0: np.random.default_rng(6).random(20)}
    first, again, other = (interval(Bootstrap([20], seed=seed).means(values)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("count", "images"), [(0, 32), (1, 32), (17, 32), (31, 32), (32, 32), (1, 1)])
def test_the_interval_of_one_share_against_scipy(count: int, images: int) -> None:
    expected = stats.binomtest(count, images).proportion_ci(0.95, method="wilson")
    share = Share.of(["three"] * count + ["eight"] * (images - count), "three")
    assert (share.value, share.images) == (count / images, images)
    assert share.interval == wilson(count / images, images)
    assert share.interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (share.interval[0] == 0, share.interval[1] == 1) == (count == 0, count == images)


def test_a_share_is_between_0_and_1_and_known_within_ten_points_on_a_hundred_images() -> None:
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"share.*\[0, 1\]"):
            Share(wrong, 32, (0.0, 1.0))
    assert Share(0.0, 32, (0.0, 1.0)).value == 0 and Share(1.0, 32, (0.0, 1.0)).value == 1
    assert uncertainty(100) == pytest.approx(0.098, abs=1e-4)


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


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    truth, held = np.array([0.9, 0.6, 0.8]), 0
    for seed in range(200):
        hits = {place: (generator.random(40) < share).astype(float) for place, share in enumerate(truth)}
        bootstrap = Bootstrap([40] * 3, resamples=200, seed=seed)
        low, high = share_interval(np.mean([one.mean() for one in hits.values()]), bootstrap.means(hits), 120)
        held += low <= truth.mean() <= high
    assert 0.9 < held / 200 < 0.99


def test_images_of_one_noise_vary_together() -> None:
    """Classes whose image i depends on noise i: resampled apart, their mean would seem to vary by half as much."""
    generator, held = np.random.default_rng(8), 0
    for seed in range(200):
        noise = generator.normal(size=40)
        values = {place: noise + 0.5 * generator.normal(size=40) for place in range(6)}
        low, high = interval(Bootstrap([40] * 6, resamples=200, seed=seed).means(values))
        held += low <= 0 <= high
    assert held / 200 > 0.9


def features(seed: int, count: int = 24, width: int = 16) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def distance(metric: SetMetric, x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy."""
    return metric.discrepancies(x, y).sum().item() / (len(x) * (len(x) - 1))


def unit(x: Tensor) -> np.ndarray:
    return (x / x.norm(dim=1, keepdim=True)).double().numpy()


def from_pairs(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    """The mean over i != j of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i), one by one."""
    count = len(xx)
    terms = [xx[i, j] + yy[i, j] - xy[i, j] - xy[j, i] for i in range(count) for j in range(count) if i != j]
    return sum(terms) / len(terms)


def test_kid_against_scikit_learn() -> None:
    x, y = features(0), features(1) + 0.3

    def kernel(a: Tensor, b: Tensor) -> np.ndarray:
        return polynomial_kernel(a.double().numpy(), b.double().numpy(), degree=3, gamma=1 / 16, coef0=1)

    np.testing.assert_allclose(KID.kernel(x, y), kernel(x, y), rtol=1e-6)
    assert distance(KID, x, y) == pytest.approx(from_pairs(kernel(x, x), kernel(y, y), kernel(x, y)), rel=1e-6)


def test_cmmd_against_scikit_learn() -> None:
    x, y = features(2), features(3) + 0.3

    def kernel(a: Tensor, b: Tensor) -> np.ndarray:
        return 1000 * rbf_kernel(unit(a.double()), unit(b.double()), gamma=1 / (2 * 10**2))

    np.testing.assert_allclose(CMMD.kernel(x, y), kernel(x, y), rtol=1e-6)
    assert distance(CMMD, x, y) == pytest.approx(from_pairs(kernel(x, x), kernel(y, y), kernel(x, y)), rel=1e-6)


def test_without_the_counterparts_the_estimate_is_the_usual_one() -> None:
    """With independent sets, leaving out n of the n^2 pairs across changes nothing but the noise."""
    x, y = features(4, 800), features(5, 800) + 0.5
    xx, yy, xy = KID.kernel(x, x), KID.kernel(y, y), KID.kernel(x, y)
    usual = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (800 * 799) - 2 * xy.mean()
    assert distance(KID, x, y) == pytest.approx(usual.item(), rel=0.01)


@pytest.mark.parametrize("metric", [KID, CMMD])
def test_equal_images_are_at_distance_zero_and_shifted_ones_are_not(metric: SetMetric) -> None:
    x = features(6)
    assert distance(metric, x, x) == 0.0
    assert distance(metric, x, x + 1) > distance(metric, x, x + 0.5) > 0


def test_clip_score_against_scikit_learn() -> None:
    images, texts = features(7), features(8)
    expected = 2.5 * np.maximum(np.diag(cosine_similarity(images.double(), texts.double())), 0)
    np.testing.assert_allclose(clip_score(images, texts), expected, atol=1e-6)
    assert clip_score(images, -images).max() == 0 and clip_score(images, images).min() == pytest.approx(2.5)
    one = clip_score(images, texts[:1])
    np.testing.assert_allclose(one, clip_score(images, texts[:1].expand(24, -1)), atol=1e-12)


def test_perceptual_distance_against_scipy() -> None:
    """The squared distance of unit vectors is twice the cosine distance."""
    generator = torch.Generator().manual_seed(9)
    shapes = [(3, 5, 8), (3, 2, 4)]
    before, after = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    expected = [
        np.mean(
            [
                np.mean(
                    [2 * cosine(one[image, place].double(), other[image, place].double()) for place in range(places)]
                )
                for one, other, (_, places, _) in zip(before, after, shapes, strict=True)
            ]
        )
        for image in range(3)
    ]
    np.testing.assert_allclose(perceptual_distance(before, after), expected, atol=1e-6)
    assert perceptual_distance(before, before).abs().max() == 0


def test_unlearn_canvas() -> None:
    assert UA.of(0.1, (0.05, 0.2)) == (pytest.approx(0.9), (pytest.approx(0.8), pytest.approx(0.95)))
    assert IRA.of(0.6, (0.5, 0.7)) == CRA.of(0.6, (0.5, 0.7)) == (0.6, (0.5, 0.7))
