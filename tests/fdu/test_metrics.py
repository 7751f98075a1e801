"""Intervals and metrics against scikit-learn, scipy and sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cosine
from sklearn.metrics.pairwise import cosine_similarity, polynomial_kernel, rbf_kernel
from torch import Tensor

from fdu.evaluation.intervals import (
    Average,
    Share,
    difference_interval,
    lowest_interval,
    mean_interval,
    reach_unseen,
    share_interval,
    size_interval,
    student,
    uncertainty,
    wilson,
)
from fdu.evaluation.metrics.clip_score import clip_score
from fdu.evaluation.metrics.cmmd import CMMD
from fdu.evaluation.metrics.kid import KID
from fdu.evaluation.metrics.metric import SetMetric
from fdu.evaluation.metrics.perceptual import perceptual_distance
from fdu.evaluation.metrics.unlearn_canvas import CRA, IRA, UA


@pytest.mark.parametrize("degrees", [1, 2, 3.5, 7, 31, 1000, math.inf])
def test_students_t_against_scipy(degrees: float) -> None:
    assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-5)


def test_a_mean_of_values_without_skewness_against_scipy() -> None:
    values = np.random.default_rng(0).normal(size=40)
    values = np.concatenate([values, 0.2 - values])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(Average.of_means([values])) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert mean_interval(Average.of_means([np.full(8, 0.1)])) == (0.1, 0.1)


@pytest.mark.parametrize("images", [2, 3, 8, 80])
def test_the_skewness_of_a_mean_is_removed_by_halls_polynomial(images: int) -> None:
    """At both ends the polynomial of t, written out, is a quantile of Student's t."""
    values = np.random.default_rng(1).exponential(size=images)
    a = stats.skew(values) / images**0.5
    for end, wanted in zip(mean_interval(Average.of_means([values])), (1, -1), strict=True):
        t = (values.mean() - end) / stats.sem(values)
        found = t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6
        assert found == pytest.approx(wanted * stats.t.ppf(0.975, images - 1), rel=1e-5)


def test_shifts_are_how_the_figure_moves_if_a_noise_counts_more() -> None:
    generator = np.random.default_rng(2)
    values, counts = ([generator.random(size) for size in (3, 4)] for _ in range(2))
    counts[0][1] = counts[1][1] = values[0][1] = values[1][1] = 0.0  # nothing of the second noise counts
    matrix = generator.normal(size=(7, 7))
    matrix += matrix.T
    noise = np.array([0, 1, 2, 0, 1, 2, 3])

    def means(weights: np.ndarray) -> float:
        return float(np.mean([np.average(one, weights=weights[: len(one)]) for one in values]))

    def ratio(weights: np.ndarray) -> float:
        sums = (sum(weights[: len(one)] @ one for one in of) for of in (values, counts))
        return float(next(sums) / next(sums))

    def pairs(weights: np.ndarray) -> float:
        apart = np.outer(weights[noise], weights[noise]) * (noise[:, None] != noise)
        return float((matrix * apart).sum() / apart.sum())

    for figure, average, noises in (
        (means, Average.of_means(values), range(4)),
        (ratio, Average.of_ratio(values, counts), (0, 2, 3)),
        (pairs, Average.of_pairs(matrix, [3, 4]), range(4)),
    ):
        assert average.value == pytest.approx(figure(np.ones(4)))
        assert average.shifts.sum() == pytest.approx(0, abs=1e-12)
        moved = [(figure(1 + step) - figure(1 - step)) / 2e-5 for step in 1e-5 * np.eye(4)[list(noises)]]
        np.testing.assert_allclose(average.shifts, moved, atol=1e-8)
        apart = average - average
        assert (apart.value, apart.shifts.any(), apart.images) == (0, False, average.images)
    assert [Average.of_means(values).images, Average.of_ratio(values, counts).images] == [7, 5]


def test_means_over_pairs_leave_out_images_of_one_noise() -> None:
    """Two classes whose images of one seed are the same images: the mean over pairs does not count them as alike."""
    values = np.random.default_rng(7).normal(size=30)
    twice = np.concatenate([values, values])
    once = (values.sum() ** 2 - (values**2).sum()) / (30 * 29)
    assert Average.of_pairs(np.outer(twice, twice), [30, 30]).value == pytest.approx(once)
    assert math.isnan(Average.of_pairs(np.ones((2, 2)), [1, 1]).value)


def test_the_interval_of_a_distance_follows_the_jackknife() -> None:
    """Without skewness, as far as the first-order expansion holds."""
    x = np.random.default_rng(3).normal(size=(200, 1)) + 3
    matrix = x @ x.T
    sums = matrix.sum(1) - matrix.diagonal()
    without = (sums.sum() - 2 * sums) / (199 * 198)
    error = (199 / 200 * ((without - without.mean()) ** 2).sum()) ** 0.5
    low, high = mean_interval(Average.of_pairs(matrix, [200]))
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 199) * error, rel=0.02)


@pytest.mark.parametrize("right", [0, 1, 5, 8])
def test_the_interval_of_a_share_of_one_class_is_wilsons(right: int) -> None:
    hits = (np.arange(8) < right).astype(float)
    assert share_interval(Average.of_means([hits])) == pytest.approx(wilson(right / 8, 8))


@pytest.mark.parametrize("classes", [1, 2, 10])
def test_classes_that_are_always_right_together_tell_as_much_as_one(classes: int) -> None:
    """By the definition of n_eff, with one degree of freedom less for what is estimated of the covariances."""
    hits = (np.random.default_rng(4).random(30) < 0.7).astype(float)
    average = Average.of_means([hits] * classes)
    degrees = math.inf if classes == 1 else 29 * classes / (classes - 1)
    assert average.degrees == pytest.approx(degrees)
    share, alike = hits.mean(), 30 / (1 + 1 / degrees)
    assert share_interval(average) == pytest.approx(wilson(share, alike, stats.t.ppf(0.975, degrees)), abs=1e-6)


def test_classes_that_are_right_by_themselves_tell_as_much_as_one_of_all_their_images() -> None:
    hits = [(own < 0.7).astype(float) for own in np.random.default_rng(5).random((10, 500))]
    average = Average.of_means(hits)
    assert share_interval(average) == pytest.approx(wilson(average.value, 5000), abs=0.002)


def test_where_the_images_of_each_class_agree_all_count() -> None:
    for shares in ([1, 1], [0, 0], [0, 1]):
        average = Average.of_means([np.full(16, float(share)) for share in shares])
        assert share_interval(average) == wilson(np.mean(shares), 32)


def test_one_noise_cannot_show_how_classes_vary_together() -> None:
    average = Average.of_means([np.array([share]) for share in (1.0, 1.0, 0.0)])
    assert average.degrees == math.inf and share_interval(average) == wilson(2 / 3, 3)


@pytest.mark.parametrize(("lost", "gained"), [(1, 0), (3, 1), (0, 19)])
def test_a_difference_of_shares_is_agrestis_and_mins(lost: int, gained: int) -> None:
    """Half an image more in each of the four cells."""
    before, after = np.zeros(20), np.zeros(20)
    before[:lost] = after[lost : lost + gained] = 1
    found = difference_interval(Average.of_means([after]) - Average.of_means([before]))
    apart = (gained - lost) / 22
    half = 1.959964 * ((lost + gained + 1 - (gained - lost) ** 2 / 22) ** 0.5) / 22
    assert found == pytest.approx((apart - half, min(apart + half, 1)), abs=1e-6)


def test_a_difference_of_classes_that_change_together_is_as_wide_as_that_of_one() -> None:
    generator = np.random.default_rng(6)
    before, after = ((generator.random(200) < share).astype(float) for share in (0.9, 0.6))
    one, ten = (Average.of_means([after] * classes) - Average.of_means([before] * classes) for classes in (1, 10))
    assert difference_interval(ten) == pytest.approx(difference_interval(one), abs=0.01)


def test_where_no_image_changes_the_exact_bound_is_taken() -> None:
    for shares in ([1, 1], [0, 1]):
        average = Average.of_means([np.full(16, float(share)) for share in shares])
        low, high = difference_interval(average - average)
        assert -low == high == reach_unseen(32) == pytest.approx(1 - 0.025 ** (1 / 32))
    lost = Average.of_means([np.zeros(4)]) - Average.of_means([np.ones(4)])
    assert difference_interval(lost) == (-1, pytest.approx(-1 + reach_unseen(4)))


def test_the_lowest_share_against_scipy() -> None:
    def jeffreys(hits: int, images: int, chance: float) -> float:
        return float(stats.beta.ppf(chance, hits + 0.5, images - hits + 0.5))

    expected = jeffreys(3, 8, 0.025), jeffreys(3, 8, 1 - 0.05 / 4)
    assert lowest_interval([7, 3, 8, 5], [8] * 4) == pytest.approx(expected, abs=1e-6)
    # Of one class or two the error of each end is 1 in 40.
    for hits in ([20], [31, 20]):
        expected = jeffreys(20, 32, 0.025), jeffreys(20, 32, 0.975)
        assert lowest_interval(hits, [32] * len(hits)) == pytest.approx(expected, abs=1e-6)
    # The lower end may be that of a class of few images, the upper one that of another.
    low, high = lowest_interval([2, 80], [3, 100])
    assert low == pytest.approx(jeffreys(2, 3, 0.025), abs=1e-6)
    assert high == pytest.approx(jeffreys(80, 100, 0.975), abs=1e-6)
    assert lowest_interval([0, 8], [8, 8])[0] == 0 and lowest_interval([8, 8], [8, 8])[1] == 1


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


def test_images_of_one_noise_tell_nothing_of_a_difference_over_classes() -> None:
    fell = [np.array([-1.0])] * 7 + [np.array([0.0])] * 93
    assert difference_interval(Average.of_means(fell)) == (-1.0, 1.0)


def test_a_size_is_never_negative() -> None:
    average = Average.of_means([np.array([0.1, 0.3])])
    assert mean_interval(average)[0] < 0 and size_interval(average) == (0.0, mean_interval(average)[1])
