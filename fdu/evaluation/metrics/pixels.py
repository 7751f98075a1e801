"""Pixels: the mean absolute difference of an image from its counterpart."""

from __future__ import annotations

from torch import Tensor

from fdu.evaluation.features import Features
from fdu.evaluation.metrics.metric import PairMetric


def pixel_distance(before: Tensor, after: Tensor, features: Features | None = None) -> Tensor:
    """The mean absolute difference of images [N, 3, H, W] in [0, 1] -> [N] in [0, 1]."""
    return (before - after).abs().flatten(1).double().mean(1)


PIXELS = PairMetric(
    "change",
    "pixels",
    "Mean absolute difference between an image and its counterpart, from 0 to 1.",
    pixel_distance,
    needs_features=False,
)
