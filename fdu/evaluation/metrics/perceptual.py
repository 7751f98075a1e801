"""The perceptual distance of an image from its counterpart, in the layers of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdu.evaluation.features import Features
from fdu.evaluation.metrics.metric import PairMetric


def perceptual_distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """How far two images lie apart in the intermediate features of a network -> [N] in [0, 4].

    Args:
        before, after: a tensor a layer, [N, places, channels].

    LPIPS (Zhang et al. 2018, arXiv 1801.03924, equation 1) with weights of one: in every layer and place the squared
    distance of the channels' unit vectors; the mean over places, then over layers.
    """
    layers = []
    for one, other in zip(before, after, strict=True):
        unit, other_unit = (torch.nn.functional.normalize(features.double(), dim=-1) for features in (one, other))
        layers.append((unit - other_unit).square().sum(-1).mean(-1))
    return torch.stack(layers).mean(0)


def image_distance(before: Tensor, after: Tensor, features: Features) -> Tensor:
    """The same of images [N, 3, H, W] in [0, 1] -> [N]."""
    return torch.cat([perceptual_distance(*layers) for layers in features.layers_of_pairs(before, after)])


PERCEPTUAL = PairMetric(
    "distances.perceptual",
    "perceptual",
    "Distance between an image and its counterpart in a network's layers (LPIPS with weights of one), from 0 to 4.",
    image_distance,
)
