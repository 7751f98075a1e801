"""CMMD, the maximum mean discrepancy of CLIP's features."""

from __future__ import annotations

import torch
from torch import Tensor

from fdu.evaluation.metrics.metric import SetMetric


def cmmd_kernel(x: Tensor, y: Tensor) -> Tensor:
    """1000 exp(-d^2 / (2 * 10^2)), d the distance of the normalised features [N, D] and [M, D] -> [N, M].

    Source: Jayasumana et al. 2024, arXiv 2401.09603; the bandwidth 10 and the factor 1000 are those of the paper.
    """
    x, y = (torch.nn.functional.normalize(features.double(), dim=-1) for features in (x, y))
    return 1000 * torch.exp(-(2 - 2 * x @ y.T).clamp_min(0) / (2 * 10**2))


CMMD = SetMetric(
    "distances.cmmd",
    "CMMD",
    "Distance between the images before and after as two sets of unit vectors; 0 if nothing moved.",
    cmmd_kernel,
)
