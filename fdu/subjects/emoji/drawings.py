"""Real emoji of four open sets as images: what the emoji pipeline and its judge learn from.

Noto Emoji (Google, Apache 2.0), Twemoji (Twitter, CC BY 4.0), and Fluent Emoji in its flat and its high-contrast style
(Microsoft, MIT), as the npm packages of Iconify hold them. resvg-py renders them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdu.storage.output import whole_file
from fdu.subjects.emoji.objects import ALL_THINGS, BACKGROUNDS, STYLES

IMAGE_SIZE = 64
REGISTRY = "https://registry.npmjs.org"


class Package(NamedTuple):
    """A set of emoji as a package of the npm registry."""

    name: str
    version: str
    sha256: str
    """Of the package's archive."""

    @property
    def archive(self) -> str:
        """The file name that ``npm pack`` gives it."""
        return f"iconify-json-{self.name}-{self.version}.tgz"

    def url(self, registry: str) -> str:
        """Where a registry has it."""
        return f"{registry}/@iconify-json/{self.name}/-/{self.name}-{self.version}.tgz"


PACKAGES = {
    "noto": Package("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": Package("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent": Package("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "ink": Package(
        "fluent-emoji-high-contrast", "1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"
    ),
}
"""The package of each style."""
BACKGROUND_RGB = {
    "white": (1.0, 1.0, 1.0),
    "blue": (0.62, 0.82, 1.0),
    "green": (0.70, 0.92, 0.66),
    "yellow": (1.0, 0.92, 0.52),
    "pink": (1.0, 0.74, 0.84),
}


def fetch_packages(folder: Path, registry: str = REGISTRY) -> None:
    """Download the packages that the folder lacks, and check all.

    Raises:
        ValueError: an archive is not the one that was used; the message names it.
        OSError: the registry cannot be reached.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES.values():
        path = folder / package.archive
        if not path.exists():
            with urllib.request.urlopen(package.url(registry), timeout=60) as answer:
                content = answer.read()
            with whole_file(path) as fresh:
                fresh.write_bytes(content)
        if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
            raise ValueError(f"{path} is not version {package.version} of {package.name}; delete it and start again")


def load_drawings(folder: Path) -> Tensor:
    """Every object in every style, RGB premultiplied by alpha: [objects, styles, 4, 64, 64] in [0, 1].

    Args:
        folder: the packages' archives, as :func:`fetch_packages` leaves them.

    Raises:
        KeyError: a package lacks an object.
    """
    sets = [_icons(folder / PACKAGES[style].archive) for style in STYLES]
    for style, icons in zip(STYLES, sets, strict=True):
        lacking = [
            one.icon for one in ALL_THINGS if one.icon not in icons["icons"] and one.icon not in icons["aliases"]
        ]
        if lacking:
            raise KeyError(f"{PACKAGES[style].archive} lacks the icon {lacking[0]!r}; fetch it again")
    drawn = torch.stack([torch.stack([_render(icons, thing.icon) for icons in sets]) for thing in ALL_THINGS])
    return torch.cat([drawn[:, :, :3] * drawn[:, :, 3:], drawn[:, :, 3:]], 2)


def _icons(archive: Path) -> dict[str, Any]:
    with tarfile.open(archive) as files:
        content = files.extractfile("package/icons.json")
        assert content is not None
        return json.load(content)


def _render(icons: dict[str, Any], name: str) -> Tensor:
    """One icon, centred on a square: [4, 64, 64] in [0, 1]."""
    import numpy
    import resvg_py
    from PIL import Image

    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    body = icon["body"].replace("currentColor", "#000")
    svg = f'<svg {names} width="{side}" height="{side}" viewBox="{box}">{body}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=IMAGE_SIZE, height=IMAGE_SIZE))
    pixels = numpy.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    return torch.tensor(pixels).permute(2, 0, 1) / 255


def jitter(
    drawings: Tensor, generator: torch.Generator, degrees: float = 8, scale: float = 0.08, shift: float = 0.04
) -> Tensor:
    """A random rotation, zoom and shift of each drawing [N, 4, 64, 64]; limits in degrees and in shares of the image.

    On average a drawing is a twentieth smaller than the set has it, so that little of it leaves the image.
    """
    uniform = torch.rand(4, len(drawings), generator=generator) * 2 - 1
    angle = uniform[0] * math.radians(degrees)
    zoom = 1.05 + uniform[1] * scale
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = [torch.stack([cos, -sin, uniform[2] * 2 * shift], -1), torch.stack([sin, cos, uniform[3] * 2 * shift], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(drawings.shape), align_corners=False)
    return F.grid_sample(drawings, grid, align_corners=False)


def on_backgrounds(drawings: Tensor, backgrounds: Tensor) -> Tensor:
    """Drawings [N, 4, H, W] on backgrounds [N] (indices into BACKGROUNDS): images [N, 3, H, W] in [0, 1]."""
    colours = torch.tensor([BACKGROUND_RGB[name] for name in BACKGROUNDS])[backgrounds]
    return drawings[:, :3] + (1 - drawings[:, 3:]) * colours[:, :, None, None]


def read_backgrounds(images: Tensor) -> Tensor:
    """The background [N] (indices into BACKGROUNDS) of images [N, 3, H, W]: the colour closest to most of the edge."""
    colours = torch.tensor([BACKGROUND_RGB[name] for name in BACKGROUNDS])
    edges = torch.cat([images[:, :, :2].flatten(2), images[:, :, -2:].flatten(2)], 2)
    edges = torch.cat([edges, images[:, :, :, :2].flatten(2), images[:, :, :, -2:].flatten(2)], 2)
    return torch.cdist(edges.median(2).values, colours).argmin(1)
