"""Real handwritten digits in four inks and pencil: the training images of the digits pipeline and of its judge.

Source: scikit-learn's ``load_digits`` (1,797 digits of 8x8 pixels; E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998, CC BY 4.0).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fdu.subjects.digits.vocabulary import MEDIA

IMAGE_SIZE = 32
GLYPH_SIZE = 26

INK_RGB = {
    "black": (0.05, 0.05, 0.08),
    "red": (0.86, 0.10, 0.12),
    "green": (0.06, 0.60, 0.20),
    "blue": (0.12, 0.22, 0.86),
    "pencil": (0.58, 0.58, 0.60),
}


def load_glyphs(test: bool) -> tuple[Tensor, Tensor]:
    """The digits as glyphs [N, 1, 32, 32] in [0, 1] (1 = full ink) and their labels [N] (0 to 9).

    A fifth of the digits, chosen by a fixed permutation, is the test part; the rest trains.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    cut = len(order) // 5
    chosen = order[:cut] if test else order[cut:]
    small = torch.tensor(digits.images, dtype=torch.float32)[chosen, None] / 16.0
    glyphs = F.interpolate(small, size=GLYPH_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    margin = (IMAGE_SIZE - GLYPH_SIZE) // 2
    return F.pad(glyphs, (margin,) * 4), torch.tensor(digits.target)[chosen]


def jitter(
    glyphs: Tensor, generator: torch.Generator, degrees: float = 8, scale: float = 0.08, shift: float = 0.04
) -> Tensor:
    """A random rotation, zoom and shift of each glyph [N, 1, 32, 32]; limits in degrees and in shares of the image."""
    uniform = torch.rand(4, len(glyphs), generator=generator) * 2 - 1
    angle = uniform[0] * math.radians(degrees)
    zoom = 1 + uniform[1] * scale
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = [torch.stack([cos, -sin, uniform[2] * 2 * shift], -1), torch.stack([sin, cos, uniform[3] * 2 * shift], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(glyphs.shape), align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False)


def draw(glyphs: Tensor, media: Tensor) -> Tensor:
    """Glyphs [N, 1, H, W] drawn on white in the media [N] (indices into MEDIA): images [N, 3, H, W] in [0, 1]."""
    colours = torch.tensor([INK_RGB[medium] for medium in MEDIA])[media][:, :, None, None]
    return 1 - glyphs * (1 - colours)


def strength(images: Tensor) -> Tensor:
    """The ink of images [N, 3, H, W] in [0, 1] as glyphs [N, 1, H, W]: 1 - min over RGB, scaled to a maximum of 1."""
    ink = 1 - images.amin(dim=1, keepdim=True)
    return ink / ink.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)
