"""The page of the catalogue is what the catalogue says."""

from __future__ import annotations

from pathlib import Path

import fdu_kernels as fk
from fdu.cli.divergences import page, rows

PAGE = Path(__file__).parents[2] / "docs" / "divergences.md"


def test_the_page_is_made_from_the_catalogue() -> None:
    assert PAGE.read_text() == page(rows()) + "\n", "fdu divergences --markdown > docs/divergences.md"
    for name in fk.divergences():
        assert f"| `{fk.get_divergence(name)}` |" in PAGE.read_text()
