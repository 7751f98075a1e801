"""KID, the kernel inception distance, with the features of any network."""

from __future__ import annotations

from torch import Tensor

from fdu.evaluation.metrics.metric import SetMetric


def kid_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x y / D + 1)^3 of features [N, D] and [M, D] -> [N, M]. Source: Binkowski et al. 2018, arXiv 1801.01401."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


KID = SetMetric(
    "distances.kid", "KID", "Distance between the images before and after as two sets; 0 if nothing moved.", kid_kernel
)
