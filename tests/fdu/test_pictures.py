"""Strips and the before-and-after picture show the images that were drawn."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

import fdu
from fdu.report.pictures import before_after, data_uri, strip, to_pil


def test_pixels_survive() -> None:
    image = torch.tensor([1.0, 0.5, 0.0]).reshape(3, 1, 1).expand(3, 4, 4)
    assert to_pil(image).getpixel((0, 0)) == (255, 128, 0)


def test_strip_has_transparent_gaps_and_shrinks_large_images() -> None:
    picture = strip(torch.ones(3, 3, 256, 256), gap=2, height=128)
    assert picture.size == (3 * 128 + 2 * 2, 128)
    assert picture.getpixel((0, 0)) == (255, 255, 255, 255)
    assert picture.getpixel((128, 5)) == (0, 0, 0, 0)


def test_data_uri_decodes_to_the_same_picture() -> None:
    picture = strip(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    data = data_uri(picture).removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == picture.tobytes()


@pytest.mark.parametrize("count", [1, 5, 9])
def test_before_after_holds_the_worst_class(count: int) -> None:
    def judge(images: torch.Tensor) -> list[str]:
        return ["t" if image.mean() < 0.2 else "z" if image.mean() > 0.8 else "k" for image in images]

    names = [("t", "target"), ("k", "retained"), ("k2", "retained"), ("k3", "retained"), ("z", "retained")]
    probes = [fdu.Probe(name, (name,), role, judge) for name, role in names]  # type: ignore[arg-type]
    before = fdu.Draws([torch.full((count, 3, 8, 8), level) for level in (0.1, 0.5, 0.5, 0.5, 0.9)])
    after = fdu.Draws([torch.full((count, 3, 8, 8), level) for level in (0.5, 0.5, 0.5, 0.5, 0.5)])
    picture = before_after(before, after, probes, fdu.evaluate(before, after, probes))
    # Four rows: the target and three of the four retained classes, k2 the worst as the first of those never seen.
    assert picture.height == 34 + 4 * 68 + 4
    assert 800 <= picture.width <= 900
    assert picture.getpixel((130, 50)) == (26, 26, 26)
    assert picture.getpixel((490, 50)) == (128, 128, 128)
