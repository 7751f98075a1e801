"""Pictures of drawn images: strips, PNG data URIs, and the before-and-after picture."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

    from fdu.evaluation import Draws, Evaluation, Probe

CELL, GAP, LABEL_WIDTH, HEADER = 64, 4, 118, 34
"""Sizes of the before-and-after picture, in pixels."""
COLUMNS = 5
"""Images per class on each side; the picture is 876 pixels wide."""
NEIGHBOURS, OTHERS = 3, 2
"""Retained classes and classes of another kind in it."""
NAME_WIDTH, APART = 236, 16
"""Least width of the names in a gallery, and least gap before the images of other classes, in pixels."""
PAPER, INK, MUTED = "#ffffff", "#1f1e1c", "#76736c"


def to_pil(image: Tensor) -> Image.Image:
    """One image [3, H, W] in [0, 1] as an RGB picture."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(array.numpy(), "RGB")


def strip(images: Tensor, gap: int = 2, height: int = 128) -> Image.Image:
    """Images [N, 3, H, W] side by side with transparent gaps, in RGBA; taller ones are reduced to ``height``."""
    pictures = [_fit(to_pil(image), min(height, image.shape[1])) for image in images]
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    joined = Image.new("RGBA", (width, pictures[0].height), (0, 0, 0, 0))
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width + gap
    return joined


def data_uri(picture: Image.Image) -> str:
    """A picture as a PNG data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def before_after(before: Draws, after: Draws, probes: Sequence[Probe], evaluation: Evaluation) -> Image.Image:
    """The picture for a README: one class per row, the same seeds on the left (before) and on the right (after).

    It shows the target, its unseen phrasings, retained classes including the worst one, and classes of another kind.
    """
    chosen = _chosen(probes, evaluation)
    side = COLUMNS * (CELL + GAP) - GAP
    left, right = LABEL_WIDTH, LABEL_WIDTH + side + 6 * GAP
    picture = Image.new("RGB", (right + side + 2 * GAP, HEADER + len(chosen) * (CELL + GAP) + GAP), PAPER)
    canvas = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    canvas.text((left, 10), "before", INK, font)
    canvas.text((right, 10), "after", INK, font)
    told = {"target": "to erase", "unseen": "unseen phrasings", "retained": "to retain", "cross_domain": "another kind"}
    for row, index in enumerate(chosen):
        top = HEADER + row * (CELL + GAP)
        canvas.text((10, top + 14), probes[index].name, INK, font)
        canvas.text((10, top + 34), told[probes[index].role], MUTED, small)
        for start, draws in ((left, before), (right, after)):
            for column, image in enumerate(draws.images[index][:COLUMNS]):
                picture.paste(_fit(to_pil(image), CELL), (start + column * (CELL + GAP), top))
    return picture


def gallery(rows: Sequence[tuple[str, str, Sequence[Image.Image]]], heads: Sequence[str]) -> Image.Image:
    """Rows of pictures, each with a name and a line in small print on its left, under heads. Long names make room.

    Args:
        rows: name, small print and pictures of each row.
        heads: the class of each column; one head spans columns of one class, and a gap separates classes.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    names = [width for name, line, _ in rows for width in (_width(name, font), _width(line, small))]
    starts, left, ends = [], max(NAME_WIDTH, *(10 + width + APART for width in names)), 0
    for place, head in enumerate(heads):
        if not place or head != heads[place - 1]:
            left = max(left + (APART if place else 0), ends)
            ends = left + _width(head, font) + APART
        starts.append(left)
        left += CELL + GAP
    size = max(left + 2 * GAP, ends), HEADER + len(rows) * (CELL + GAP) + GAP
    picture = Image.new("RGB", size, PAPER)
    canvas = ImageDraw.Draw(picture)
    for place, (start, head) in enumerate(zip(starts, heads, strict=True)):
        if not place or head != heads[place - 1]:
            canvas.text((start, 10), head, INK, font)
    for row, (name, line, images) in enumerate(rows):
        top = HEADER + row * (CELL + GAP)
        canvas.text((10, top + 14), name, INK, font)
        canvas.text((10, top + 34), line, MUTED, small)
        for start, image in zip(starts, images, strict=False):
            picture.paste(_fit(image, CELL), (start, top))
    return picture


def _width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """The width of one line, in whole pixels."""
    return math.ceil(font.getlength(text))


def _chosen(probes: Sequence[Probe], evaluation: Evaluation) -> list[int]:
    """Indices of the probes to show, in the probes' order."""

    def of(role: str) -> list[int]:
        return [index for index, probe in enumerate(probes) if probe.role == role]

    worst = evaluation.after.worst_retained_class
    neighbours = sorted(of("retained"), key=lambda index: probes[index].name != worst)[:NEIGHBOURS]
    return [*of("target"), *of("unseen"), *sorted(neighbours), *of("cross_domain")[:OTHERS]]


def _fit(picture: Image.Image, height: int) -> Image.Image:
    """Scaled to ``height``: nearest neighbour when enlarged, Lanczos when reduced."""
    if picture.height == height:
        return picture
    width = round(picture.width * height / picture.height)
    grows = height > picture.height
    return picture.resize((width, height), Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)
