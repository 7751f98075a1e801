"""The kinds of metrics. Everything is computed in float64.

Sets of images come in pairs, one before and one after, of one prompt and one seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fdu.evaluation.intervals import Interval


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of any kind.

    Args:
        name: where it stands in metrics.json: "distances.kid".
        title: how tables call it.
        meaning: what it tells, and its range, for the report.
    """

    name: str
    title: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class PairMetric(Metric):
    """How far each image is from its counterpart. The mean over classes is reported, by role and group."""

    values: Callable[[Tensor, Tensor, Any], Tensor]
    """Images before and after, [N, 3, H, W] in [0, 1], and the :class:`Features` or None -> [N]."""
    needs_features: bool = True
    """Whether it is left out where there is no extractor of features."""


@dataclasses.dataclass(frozen=True)
class SetMetric(Metric):
    """How far two sets of features are from each other: a squared maximum mean discrepancy, by role and group."""

    kernel: Callable[[Tensor, Tensor], Tensor]
    """Features [N, D] and [M, D] -> [N, M]."""

    def discrepancies(self, before: Tensor, after: Tensor) -> Tensor:
        """What any two pairs contribute to the squared maximum mean discrepancy: [N, N], zero on the diagonal.

        The mean over its off-diagonal entries is the unbiased estimate from pairs (Gretton et al. 2012, lemma 6): no
        image is compared with itself or with its counterpart. So images that share prompt and seed do not bias it; it
        is exactly 0 where nothing changed, and it can fall below 0. Of several classes drawn with the same seeds,
        :meth:`fdu.evaluation.intervals.Average.of_pairs` leaves out the pairs of one seed, too.
        """
        matrix = self.kernel(before, before) + self.kernel(after, after)
        across = self.kernel(before, after)
        return (matrix - across - across.T).fill_diagonal_(0)


@dataclasses.dataclass(frozen=True)
class ScoreMetric(Metric):
    """How well images fit the name of what was asked for, before and after; ``name`` is a field of ``Figures``."""

    values: Callable[[Tensor, Tensor], Tensor]
    """Features of images [N, D] and of texts [N, D] or [1, D] -> [N]."""


@dataclasses.dataclass(frozen=True)
class ShareMetric(Metric):
    """A share that the judges counted after the erasure, under the name that a benchmark gives it."""

    figure: str
    """The share's name in :class:`fdu.Figures`: "retained_by_group.near"."""
    complement: bool = False
    """Whether the share of all other images is meant."""

    def of(self, share: float, interval: Interval) -> tuple[float, Interval]:
        """The metric and its interval."""
        return (1 - share, (1 - interval[1], 1 - interval[0])) if self.complement else (share, interval)
