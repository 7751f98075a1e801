"""Confidence intervals from formulas: of shares, of differences of shares, of measured means, and of a lowest share.

Image i of every probe begins as the same noise, so images i vary together, before and after too. A figure that averages
over probes is therefore a sum over noises, and its variance is that between noises.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]
"""Lower and upper end."""
LEVEL = 0.95
"""The share of repeated evaluations whose interval holds the true value."""
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Standard deviations on either side of the mean that hold this share of a normal distribution."""
FEWEST = 2
"""Noises below which nothing tells how a measured value scatters."""
CELLS = 10_000
"""Of numerical integrals."""
ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Average:
    """An average over images, and how much each noise contributes to its deviation from the true value."""

    value: float
    shifts: np.ndarray
    """One number per noise; their sum is 0. The sum of their squares estimates the variance."""
    images: int

    @classmethod
    def of_means(cls, values: Sequence[np.ndarray]) -> Average:
        """The mean over probes of the mean over their images.

        Args:
            values: one value per image, by probe.
        """
        shares = [(one - one.mean()) / (len(one) * len(values)) for one in values]
        return cls(float(np.mean([one.mean() for one in values])), _by_noise(shares), sum(map(len, values)))

    @classmethod
    def of_ratio(cls, values: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> Average:
        """The sum of values over all images divided by the sum of counts, which is not 0; by first-order expansion.

        Args:
            values, counts: one number per image, by probe. An image with the count 0 does not count.
        """
        total = float(sum(one.sum() for one in counts))
        ratio = float(sum(one.sum() for one in values)) / total
        shifts = _by_noise([(one - ratio * asked) / total for one, asked in zip(values, counts, strict=True)])
        images = sum(int(np.count_nonzero(one)) for one in counts)
        return cls(ratio, shifts[_by_noise(counts) > 0], images)

    @classmethod
    def of_pairs(cls, matrix: np.ndarray, counts: Sequence[int]) -> Average:
        """The mean of a matrix over all pairs of images that began as different noise; NaN if there are none.

        Pairs of one noise depend on each other. The shifts are of first order (Hoeffding, A class of statistics with
        asymptotically normal distribution, 1948).

        Args:
            matrix: [N, N], symmetric, over the images of all probes in their order.
            counts: images of each probe.
        """
        noise = np.concatenate([np.arange(count) for count in counts])
        apart = noise[:, None] != noise[None, :]
        sums, pairs = (np.bincount(noise, one.sum(1)) for one in (matrix * apart, apart))
        mean = float(sums.sum() / pairs.sum()) if apart.any() else math.nan
        return cls(mean, 2 * (sums - mean * pairs) / max(pairs.sum(), 1), len(noise))

    def __sub__(self, other: Average) -> Average:
        return Average(self.value - other.value, self.shifts - other.shifts, self.images)

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the variance of an average of answers that are yes or no; infinite if none share noise.

        With k images per noise, only a share (k - 1) / k of the variance, the covariances, is not known from the mean.
        """
        noises = len(self.shifts)
        return (noises - 1) * self.images / (self.images - noises) if 1 < noises < self.images else math.inf

    @property
    def variance(self) -> float:
        """The estimated variance of a mean of answers that are yes or no; 0 if the noises agree, as where all do."""
        squares = float(self.shifts @ self.shifts)
        return squares * (1 + 1 / self.degrees) if squares > ROUNDING**2 else 0.0


def _by_noise(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum over probes, by noise."""
    total = np.zeros(max(map(len, parts)))
    for one in parts:
        total[: len(one)] += one
    return total


def share_interval(average: Average) -> Interval:
    """The interval of a mean of shares: Wilson's, at the number of independent images with the same variance, n_eff.

    The variance is that between noises (Korn and Graubard, Confidence intervals for proportions with small expected
    number of positive counts estimated from survey data, 1998), and Student's t replaces the normal distribution. Of
    images that share no noise n_eff is their number, and the interval is :func:`wilson`'s. n_eff has no upper limit: at
    most the number of images would cover 97 to 99 %.
    """
    share, variance = average.value, average.variance
    if not variance:
        return wilson(share, average.images)
    return wilson(share, share * (1 - share) / variance, student(average.degrees))


def difference_interval(average: Average) -> Interval:
    """The interval of a difference of two shares, or of means of shares, that were counted on the same noises.

    It is that of Agresti and Min (Simple improved confidence intervals for comparing matched proportions, 2005), which
    adds two images, of which one changes, half in either direction; the variance is that between noises. Where the
    images of each class all change alike, mostly not at all, that would exclude changes of 2 in n + 2, which n images
    often miss. There the interval reaches :func:`reach_unseen` to either side.
    """
    images, value = average.images, average.value
    if len(average.shifts) < FEWEST <= images:
        return -1.0, 1.0  # images of one noise may all change together
    if not average.variance:
        reach = reach_unseen(images)
        return max(value - reach, -1.0), min(value + reach, 1.0)
    middle = value * images / (images + 2)
    squares = images**2 * average.variance + 1 + 2 * value * middle
    half = student(average.degrees) * math.sqrt(squares) / (images + 2)
    return max(middle - half, -1.0), min(middle + half, 1.0)


def size_interval(average: Average) -> Interval:
    """As :func:`mean_interval`, of values that are never negative."""
    low, high = mean_interval(average)
    return max(low, 0.0), high


def mean_interval(average: Average) -> Interval:
    """The interval of a mean of measured values, over two noises or more: Student's t, corrected for skewness.

    The values of few images can be skewed, so a monotone cubic polynomial takes the skewness out of t (Hall, On the
    removal of skewness by transformation, 1992).
    """
    count, shifts = len(average.shifts), average.shifts
    squares = float(shifts @ shifts)
    if squares <= ROUNDING**2:
        return average.value, average.value
    error, t = math.sqrt(squares * count / (count - 1)), student(count - 1)
    skewness = float(np.mean(shifts**3)) / (squares / count) ** 1.5 / math.sqrt(count)

    def straight(end: float) -> float:
        bent = float(np.cbrt(1 + skewness * (end - skewness / 6)))
        # 3 (bent - 1) / skewness, which is 0 / 0 without skewness
        return 3 * (end - skewness / 6) / (bent * bent + bent + 1)

    return average.value - error * straight(t), average.value - error * straight(-t)


def lowest_interval(hits: Sequence[int], images: Sequence[int]) -> Interval:
    """The interval of the lowest of several classes' shares, which counts that the class was chosen for being lowest.

    Its ends are the lowest lower end and the lowest upper end of any class. A lower end misses only if it is that of
    the truly lowest class, in 1 of 40 cases. An upper end may miss for any class that is about as low, so the classes
    share an error of 1 in 20 (Bonferroni): with one lowest class the two add up to at most 1 in 20, with several the
    first hardly ever happens. The ends are those of Jeffreys' interval (Brown, Cai and DasGupta, Interval estimation
    for a binomial proportion, 2001); Wilson's are too narrow for errors this small.

    Args:
        hits: by class.
        images: by class.
    """
    tail = (1 - LEVEL) / max(len(hits), 2)
    counted = set(zip(hits, images, strict=True))
    low = min(_jeffreys(hit, count, (1 - LEVEL) / 2) if hit else 0.0 for hit, count in counted)
    return low, min(_jeffreys(hit, count, 1 - tail) if hit < count else 1.0 for hit, count in counted)


def _jeffreys(hits: int, images: int, chance: float) -> float:
    """A quantile of the beta distribution with the parameters hits + 1/2 and misses + 1/2, that of sin^2(angle)."""
    return math.sin(_angle(chance, 2 * hits, 2 * (images - hits))) ** 2


def student(degrees: float) -> float:
    """How many standard errors hold Student's t on either side, with this many degrees of freedom."""
    # sqrt(degrees) tan(angle) is t if the density of the angle is proportional to cos^(degrees - 1).
    return Z if math.isinf(degrees) else math.sqrt(degrees) * math.tan(_angle(LEVEL, 0, degrees - 1))


@functools.cache
def _angle(chance: float, sines: float, cosines: float) -> float:
    """The quantile of an angle in (0, pi/2) whose density is proportional to sin^sines cos^cosines."""
    edges = np.linspace(0, math.pi / 2, CELLS + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    density = sines * np.log(np.sin(middle)) + cosines * np.log(np.cos(middle))
    below = np.append(0, np.cumsum(np.exp(density - density.max())))
    return float(np.interp(chance * below[-1], below, edges))


def wilson(share: float, images: float, deviations: float = Z) -> Interval:
    """The interval of one share counted on ``images`` images (Wilson 1927), which also holds near 0 and 1.

    Args:
        share: in [0, 1].
        images: > 0.
        deviations: its reach, in standard deviations.
    """
    weight = deviations**2 / images
    middle = (share + weight / 2) / (1 + weight)
    half = deviations * math.sqrt(share * (1 - share) / images + weight / (4 * images)) / (1 + weight)
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
