"""Confidence intervals: percentile bootstrap over images, paired before and after; Wilson's for a single share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]
"""Lower and upper end."""
LEVEL = 0.95
"""The share of repeated evaluations whose interval holds the true value."""
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Standard deviations on either side of the mean that hold this share of a normal distribution."""
RESAMPLES = 2000
FEWEST = 2
"""Images of a class below which resamples cannot tell how a measured value scatters."""


class Bootstrap:
    """Resamples of the images of several probes; each probe keeps its number of images.

    A resample counts how often it holds each image, so that figures before and after and their differences are
    resampled in the same way. Image i of every probe begins as the same noise, so images i vary together. A resample
    therefore draws the noises: it holds image i as often in one probe as in another. Resampling each class by itself
    would make the interval of their mean too narrow.

    Args:
        counts: images of each probe. Probes with the same number of images share their resamples.
        resamples: number of resamples.
        seed: random seed.
    """

    def __init__(self, counts: Sequence[int], resamples: int = RESAMPLES, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        drawn = {
            count: generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
            for count in dict.fromkeys(counts)
        }
        self.weights = [drawn[count] for count in counts]
        """For each probe [resamples, images], how often each image is in each resample."""

    def means(self, values: Mapping[int, np.ndarray]) -> np.ndarray:
        """The mean over probes of the mean over their images, in each resample.

        Args:
            values: one value per image, by the index of the probe.
        """
        return np.mean([self.weights[place] @ one / len(one) for place, one in values.items()], axis=0)

    def ratios(self, values: Mapping[int, np.ndarray], counts: Mapping[int, np.ndarray]) -> np.ndarray:
        """The sum of values over all images of these probes divided by the sum of counts, in each resample.

        NaN where a resample counts nothing.

        Args:
            values, counts: one number per image, by the index of the probe.
        """
        sums, totals = (sum(self.weights[place] @ of for place, of in one.items()) for one in (values, counts))
        return np.divide(sums, totals, out=np.full_like(totals, np.nan), where=totals > 0)

    def pair_means(self, matrix: np.ndarray, places: Sequence[int]) -> tuple[float, np.ndarray]:
        """The mean of a matrix over all pairs of images that began as different noise, in all images and per resample.

        Pairs of one noise depend on each other: image i of two probes, and an image with itself in a resample. NaN
        where there are no other pairs.

        Args:
            matrix: [N, N] over the images of all ``places`` in their order.
            places: indices of the probes.
        """
        resampled = [self.weights[place] for place in places]
        weights = np.concatenate(resampled, axis=1)
        weights = np.concatenate([np.ones_like(weights[:1]), weights])
        noise = np.concatenate([np.arange(one.shape[1]) for one in resampled])
        apart = (noise[:, None] != noise[None, :]).astype(np.float64)
        sums = np.einsum("ri,ri->r", weights @ (matrix * apart), weights)
        pairs = np.einsum("ri,ri->r", weights @ apart, weights)
        means = np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0)
        return float(means[0]), means[1:]

    def tells(self, places: Sequence[int], images: int = FEWEST) -> bool:
        """Whether each of these probes has enough images for an interval, and one of them at least ``images``."""
        counts = [self.weights[place].shape[1] for place in places]
        return min(counts) >= FEWEST and max(counts) >= images


def interval(resampled: np.ndarray) -> Interval:
    """The percentile interval of a figure from its values in the resamples; NaN does not count."""
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson(share: float, images: int) -> Interval:
    """The interval of one share counted on ``images`` images (Wilson 1927), which also holds near 0 and 1."""
    weight = Z * Z / images
    middle = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / images + weight / (4 * images)) / (1 + weight)
    # Rounding would miss the exact bounds 0 and 1.
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)


@dataclasses.dataclass(frozen=True)
class Share:
    """A share counted on a number of images."""

    value: float
    """The share, in [0, 1]."""
    images: int
    """Number of judged images."""
    interval: Interval
    """The 95 % interval of Wilson (1927), which also holds near 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(f"a share must be in [0, 1], got {self.value!r}")

    @classmethod
    def of(cls, seen: Sequence[str], name: str) -> Share:
        """The share of ``name`` in a judge's answers, at least one."""
        value = sum(one == name for one in seen) / len(seen)
        return cls(value, len(seen), wilson(value, len(seen)))


def uncertainty(images: int) -> float:
    """Half the width of a share's 95 % interval on ``images`` images, at its widest (a share of 1/2)."""
    return Z * math.sqrt(0.25 / images)


def reach_unseen(images: int) -> float:
    """The largest share that 0 of n images cannot rule out: 1 - (alpha/2)^(1/n), exact (Clopper and Pearson 1934)."""
    return 1 - ((1 - LEVEL) / 2) ** (1 / images)


def share_interval(share: float, resampled: np.ndarray, images: int, lowest: float = 0.0) -> Interval:
    """The interval of a mean of shares, or of a difference of two, counted on ``images`` images in all.

    Where all images of each class agree, every resample does too, and the interval would be a point, which is too
    narrow: 0 of 32 images may well mean 5 %. There the interval reaches :func:`reach_unseen` to either side, within
    ``lowest`` and 1.
    """
    low, high = interval(resampled)
    if low == high:
        reach = reach_unseen(images)
        low, high = max(share - reach, lowest), min(share + reach, 1.0)
    return low, high
