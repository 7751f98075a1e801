"""The page of memory by model: what fits where, and that the page is what the script writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import vram

from fdu.config import EraseConfig
from fdu.erasure import check_suited
from fdu.presets import PRESETS


def test_the_first_options_that_fit_leave_a_tenth_free() -> None:
    peaks = ["21.7", "21.6", "7.0"]
    assert [vram.first_that_fits(peaks, card) for card in (7, 8, 24, 48)] == [None, 2, 1, 0]
    assert vram.smallest(peaks, ["--a", "--b", "--c"]) == ["8 GiB", "`--c`"]
    assert vram.smallest(["500.0"], ["--a"])[0] == "none of these"


def test_every_step_is_an_option_and_keeps_the_former_ones() -> None:
    for options in vram.cumulative(vram.STEPS.values()):
        known = set(EraseConfig.field_names()) | {"quantization", "offload"}
        assert set(options) <= known and options["mixed_precision"] == "bf16"
    assert len(options) == 7


def test_the_page_follows_from_its_figures() -> None:
    """Figures are read from the page's last tables, and what depends on a model from the first; all else must be what
    the script writes."""
    text = vram.PAGE.read_text(encoding="utf-8")
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()[2:]]
        for part in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    ]
    beginnings, _, presets, memory = tables
    models = [
        (row[:2], [tuple(cell.rstrip(")").split(" (")) for cell in row[2:] if cell])  # type: ignore[misc]
        for row in memory
    ]
    assert len(models) == len(vram.NAMES) and {row[0] for row in presets} == set(PRESETS)
    assert vram.page(models, [row[:4] for row in presets], beginnings) == text  # type: ignore[arg-type]


@pytest.mark.quick(name=["sd15", "flux1-schnell", "flux1-dev"])
@pytest.mark.parametrize("name", vram.NAMES)
def test_the_page_says_what_each_model_needs(name: str, tmp_path: Path) -> None:
    denoiser = vram.shapes(str(vram.unpack(name, tmp_path)), EraseConfig(), "none")
    row = vram.beginning(name, denoiser)
    assert f"| {' | '.join(row)} |" in vram.PAGE.read_text(encoding="utf-8")
    needed = vram.few_step_settings(name, denoiser)
    check_suited(denoiser, EraseConfig(**needed))
    assert bool(needed) == bool(denoiser.few_steps) and bool(row[3]) == denoiser.reads_guidance
    if needed:
        with pytest.raises(ValueError, match="few steps"):
            check_suited(denoiser, EraseConfig())


def test_without_checkpointing_a_step_needs_more() -> None:
    _, named, figures, presets = vram.rows("sd15")
    assert named == ["Stable Diffusion 1.5", "512"]
    assert float(figures[0][0]) > float(figures[1][0]) >= float(figures[2][0]) >= float(figures[3][0])
    assert len(figures) == 4  # a UNet has no blocks to offload
    assert [row[0] for row in presets] == ["fdmu", "concept-ablation", "esd-x", "sd15-style", "sd15-object"]
    # The batch of concept ablation needs most; the others do where they draw latents, which checkpointing leaves alone.
    assert [float(row[2]) > float(row[3]) for row in presets] == [False, True, False, False, True]
