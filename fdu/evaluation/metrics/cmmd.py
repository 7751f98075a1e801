"""CMMD, the maximum mean discrepancy of CLIP's features."""

from __future__ import annotations

import torch
from torch import Tensor

from fdu.evaluation.metrics.metric import SetMetric

CMMD_BANDWIDTH = 10.0
"""sigma of the Gaussian kernel of Jayasumana et al. 2024, for features of norm 1."""
CMMD_SCALE = 1000.0
"""The factor of that paper, for readable numbers."""


def cmmd_kernel(x: Tensor, y: Tensor) -> Tensor:
    """1000 exp(-d^2 / (2 sigma^2)), d the distance of the normalised features [N, D] and [M, D] -> [N, M].

    Source: Jayasumana et al. 2024, arXiv 2401.09603.
    """
    x, y = (torch.nn.functional.normalize(features.double(), dim=-1) for features in (x, y))
    squared = (2 - 2 * x @ y.T).clamp_min(0)
    return CMMD_SCALE * torch.exp(-squared / (2 * CMMD_BANDWIDTH**2))


CMMD = SetMetric(
    "distances.cmmd",
    "CMMD",
    "Distance between the images before and after as two sets of unit vectors; 0 if nothing moved.",
    cmmd_kernel,
)
