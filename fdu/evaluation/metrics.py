"""Metrics on features: agreement of images with text, and the distance of two sets of images, or of two images.

Everything is computed in float64. Sets of images come in pairs, one before and one after, of one prompt and one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fdu.evaluation.figures import Figures

CLIP_SCORE_SCALE = 2.5
"""w of Hessel et al. 2021, which spreads cosines of images and captions over [0, 1]."""
KID_DEGREE = 3
"""Of the polynomial kernel of Binkowski et al. 2018."""
CMMD_BANDWIDTH = 10.0
"""sigma of the Gaussian kernel of Jayasumana et al. 2024, for features of norm 1."""
CMMD_SCALE = 1000.0
"""The factor of that paper, for readable numbers."""


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """CLIPScore w max(cos, 0) of image features [N, D] with text features [N, D] or [1, D] -> [N] in [0, 2.5].

    Source: Hessel et al. 2021, arXiv 2104.08718, equation 1.
    """
    cosine = torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=-1)
    return CLIP_SCORE_SCALE * cosine.clamp_min(0)


def kid_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x y / D + 1)^3 of features [N, D] and [M, D] -> [N, M]. Source: Binkowski et al. 2018, arXiv 1801.01401."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** KID_DEGREE


def cmmd_kernel(x: Tensor, y: Tensor) -> Tensor:
    """1000 exp(-d^2 / (2 sigma^2)), d the distance of the normalised features [N, D] and [M, D] -> [N, M].

    Source: Jayasumana et al. 2024, arXiv 2401.09603.
    """
    x, y = (torch.nn.functional.normalize(features.double(), dim=-1) for features in (x, y))
    squared = (2 - 2 * x @ y.T).clamp_min(0)
    return CMMD_SCALE * torch.exp(-squared / (2 * CMMD_BANDWIDTH**2))


Kernel = Callable[[Tensor, Tensor], Tensor]
KERNELS: dict[str, Kernel] = {"kid": kid_kernel, "cmmd": cmmd_kernel}
"""The distances of two sets that are squared maximum mean discrepancies, by name."""


def discrepancies(kernel: Kernel, before: Tensor, after: Tensor) -> Tensor:
    """What each two pairs contribute to the squared maximum mean discrepancy: [N, N], zero on the diagonal.

    The mean over its off-diagonal entries is the unbiased estimate from pairs (Gretton et al. 2012, lemma 6): no image
    is compared with itself, nor with its own counterpart. So images that depend on one another through prompt and seed
    do not bias it, it is exactly 0 where nothing changed, and like all unbiased estimates it can fall below 0. Of
    several classes drawn with the same seeds, :meth:`fdu.evaluation.intervals.Bootstrap.pair_means` leaves out the
    pairs of one seed, too.
    """
    matrix = kernel(before, before) + kernel(after, after)
    across = kernel(before, after)
    return (matrix - across - across.T).fill_diagonal_(0)


def discrepancy(kernel: Kernel, before: Tensor, after: Tensor) -> float:
    """The estimate of :func:`discrepancies`, of two or more pairs of features [N, D].

    Raises:
        ValueError: fewer than two pairs, or features that are not of one shape.
    """
    if before.shape != after.shape or len(before) < 2:
        raise ValueError(f"before and after must hold two or more pairs, got {[*before.shape]} and {[*after.shape]}")
    return discrepancies(kernel, before, after).sum().item() / (len(before) * (len(before) - 1))


def kid(before: Tensor, after: Tensor) -> float:
    """Kernel distance of two sets of features [N, D], image by image of one prompt and seed; KID with any features."""
    return discrepancy(kid_kernel, before, after)


def cmmd(before: Tensor, after: Tensor) -> float:
    """CLIP maximum mean discrepancy of two sets of features [N, D], image by image of one prompt and seed."""
    return discrepancy(cmmd_kernel, before, after)


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


def unlearn_canvas(after: Figures) -> dict[str, float]:
    """The accuracies of UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846), each the better the higher.

    UA, unlearning accuracy: the share of the target's images in which the judge does not see it. IRA and CRA, retain
    accuracy in the target's domain (its near neighbours) and across domains (concepts of another kind).
    """
    found = {"UA": 1 - after.target_accuracy}
    if "near" in after.retained_by_group:
        found["IRA"] = after.retained_by_group["near"]
    if after.cross_domain_accuracy is not None:
        found["CRA"] = after.cross_domain_accuracy
    return found
