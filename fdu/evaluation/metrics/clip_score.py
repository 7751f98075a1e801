"""CLIPScore: how well images fit a text."""

from __future__ import annotations

import torch
from torch import Tensor

from fdu.evaluation.metrics.metric import ScoreMetric


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """CLIPScore 2.5 max(cos, 0) of image features [N, D] with text features [N, D] or [1, D] -> [N] in [0, 2.5].

    Source: Hessel et al. 2021, arXiv 2104.08718, equation 1; 2.5 spreads the cosines of captions over [0, 1].
    """
    return 2.5 * torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=-1).clamp_min(0)


CLIP_SCORE = ScoreMetric(
    "clip_score", "CLIP score", "How well images match the name of the requested class, from 0 to 2.5.", clip_score
)
