"""The metrics against scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from sklearn.metrics.pairwise import cosine_similarity, polynomial_kernel, rbf_kernel
from torch import Tensor

from fdu.evaluation.metrics.clip_score import clip_score
from fdu.evaluation.metrics.cmmd import CMMD
from fdu.evaluation.metrics.kid import KID
from fdu.evaluation.metrics.metric import SetMetric
from fdu.evaluation.metrics.perceptual import perceptual_distance
from fdu.evaluation.metrics.unlearn_canvas import CRA, IRA, UA


def features(seed: int, count: int = 24, width: int = 16) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


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
    assert KID.between(x, y) == pytest.approx(from_pairs(kernel(x, x), kernel(y, y), kernel(x, y)), rel=1e-6)


def test_cmmd_against_scikit_learn() -> None:
    x, y = features(2), features(3) + 0.3

    def kernel(a: Tensor, b: Tensor) -> np.ndarray:
        return 1000 * rbf_kernel(unit(a.double()), unit(b.double()), gamma=1 / (2 * 10**2))

    np.testing.assert_allclose(CMMD.kernel(x, y), kernel(x, y), rtol=1e-6)
    assert CMMD.between(x, y) == pytest.approx(from_pairs(kernel(x, x), kernel(y, y), kernel(x, y)), rel=1e-6)


def test_without_the_counterparts_the_estimate_is_the_usual_one() -> None:
    """With independent sets, leaving out n of the n^2 pairs across changes nothing but the noise."""
    x, y = features(4, 800), features(5, 800) + 0.5
    xx, yy, xy = KID.kernel(x, x), KID.kernel(y, y), KID.kernel(x, y)
    usual = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (800 * 799) - 2 * xy.mean()
    assert KID.between(x, y) == pytest.approx(usual.item(), rel=0.01)


@pytest.mark.parametrize("metric", [KID, CMMD])
def test_equal_images_are_at_distance_zero_and_shifted_ones_are_not(metric: SetMetric) -> None:
    x = features(6)
    assert metric.between(x, x) == 0.0
    assert metric.between(x, x + 1) > metric.between(x, x + 0.5) > 0


def test_what_is_no_pair_of_sets_is_refused() -> None:
    with pytest.raises(ValueError, match="two.*more pairs, got"):
        KID.between(features(0, 1), features(1, 1))
    with pytest.raises(ValueError, match="two.*more pairs, got"):
        CMMD.between(features(0, 4), features(1, 5))


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
