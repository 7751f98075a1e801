"""The judge of the emoji pipeline: a classifier that learnt from real emoji and never saw the pipeline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fdu.subjects.emoji.objects import ALL_THINGS, STYLES
from fdu.subjects.from_scratch import convolutions


class EmojiClassifier(nn.Module):
    """A convolutional network for objects, and a smaller one for styles, on images at half their size."""

    def __init__(self) -> None:
        super().__init__()
        self.thing = nn.Sequential(
            *convolutions((3, 32, 64, 96, 128)), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 4, len(ALL_THINGS))
        )
        self.style = nn.Sequential(
            *convolutions((3, 24, 48, 64, 64)), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4, len(STYLES))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over objects [N, 205] and over styles [N, 4] of images [N, 3, 64, 64] in [0, 1]."""
        halved = F.avg_pool2d(images, 2)
        return self.thing(halved), self.style(halved)
