"""Pictures along the front: images of the model as it is and of each candidate, from most retained to most erased."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fdu.comparison.front import Judged, Standing
from fdu.comparison.plan import Candidate, Run
from fdu.comparison.results import Results
from fdu.comparison.runs import before_name, picture_name
from fdu.report.pictures import data_uri, gallery
from fdu.report.run import IMAGES_FOLDER


@dataclasses.dataclass(frozen=True)
class Tile:
    """A picture of the gallery."""

    name: str
    """The requested class."""
    prompt: str
    image: Image.Image
    alt: str
    seen: bool | None
    """Whether the judge saw the requested class; None before the erasure."""

    @property
    def source(self) -> str:
        """A PNG data URI."""
        return data_uri(self.image)


@dataclasses.dataclass(frozen=True)
class GalleryRow:
    """The pictures of a candidate, or of the model as it is."""

    standing: Standing | None
    """None: before the erasure."""
    tiles: list[Tile]
    """Empty if its file is missing or damaged."""

    @property
    def name(self) -> str:
        """The candidate in words."""
        return self.standing.candidate.label if self.standing else "before"

    @property
    def line(self) -> str:
        """Its figures in words."""
        if self.standing is None:
            return "the model as it is"
        erased, retained = (100 * figure.value for figure in (self.standing.erased, self.standing.retained))
        return f"erased {erased:.0f} %, retained {retained:.0f} %"


def galleries(folder: Path, results: Results, recommended: Candidate) -> dict[str, list[GalleryRow]]:
    """By target: the model as it is, then the candidates on the front and the recommended one, the most erased last.

    Targets without any picture are left out.

    Args:
        folder: the folder of the comparison.
        results: its figures.
        recommended: a candidate.
    """
    shown = [one for one in results.standings if one.on_front or one.candidate == recommended]
    shown.sort(key=lambda one: (one.erased.value, -one.retained.value))
    seed = results.comparison.seeds[0]
    found = {}
    for target, anchor in results.comparison.pairs:
        pictured = results.pictured.get(target, [])
        rows = [GalleryRow(None, _tiles(folder, before_name(target), pictured, "before the erasure"))]
        for one in shown:
            name = Run(target, anchor, one.candidate, seed).name
            judged = results.runs.get((target, one.candidate, seed), ())
            rows.append(GalleryRow(one, _tiles(folder, name, pictured, one.candidate.label, judged)))
        if any(row.tiles for row in rows):
            found[target] = rows
    return found


def drawn_gallery(rows: Sequence[GalleryRow]) -> Image.Image:
    """The rows of one target as a picture of their own."""
    heads = next([tile.name for tile in row.tiles] for row in rows if row.tiles)
    return gallery([(row.name, row.line, [tile.image for tile in row.tiles]) for row in rows], heads)


def _tiles(
    folder: Path, record: str, pictured: Sequence[tuple[str, str]], when: str, judged: Sequence[Judged] = ()
) -> list[Tile]:
    """The pictures of a record, with the judge's view of each."""
    images = _cut(folder / IMAGES_FOLDER / picture_name(record), len(pictured))
    hits = {one.name: one.hits for one in judged if one.role in ("target", "retained")}
    tiles: list[Tile] = []
    for image, (name, prompt) in zip(images, pictured, strict=False):
        place = sum(tile.name == name for tile in tiles)
        seen = hits[name][place] if name in hits else None
        answer = "" if seen is None else f"; the judge {'saw' if seen else 'did not see'} {name}"
        tiles.append(Tile(name, prompt, image, f"{when}, for the prompt {prompt!r}{answer}", seen))
    return tiles


def _cut(path: Path, count: int) -> list[Image.Image]:
    """The images of a strip; empty if it cannot be read."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    if not count or picture.width % count:
        return []
    width = picture.width // count
    return [picture.crop((width * place, 0, width * (place + 1), picture.height)) for place in range(count)]
