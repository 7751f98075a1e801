"""The independent judge: which digit, in which medium. It learnt from real images only."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from fdu.subjects.digits.handwriting import strength
from fdu.subjects.digits.vocabulary import DIGITS, MEDIA

LAYERS = ("digit.3", "digit.7", "digit.11", "medium.3", "medium.7")
"""Submodules of the classifier: the outputs of its convolutional blocks."""
FEATURES = ("digit.12", "medium.9")
"""What its last layers read: the flattened output of the blocks."""


def _convolutions(channels: tuple[int, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return layers


class DigitClassifier(nn.Module):
    """Two small convolutional networks: one reads the shape of the ink, colour removed, the other the colours."""

    def __init__(self) -> None:
        super().__init__()
        self.digit = nn.Sequential(
            *_convolutions((1, 24, 48, 64)), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, len(DIGITS))
        )
        self.medium = nn.Sequential(
            *_convolutions((3, 12, 24)), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, len(MEDIA))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over digits [N, 10] and over media [N, 5] of images [N, 3, 32, 32] in [0, 1]."""
        return self.digit(strength(images)), self.medium(images)
