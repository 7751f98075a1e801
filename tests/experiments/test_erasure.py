"""The erasure experiment: which runs it makes, and whether a run outside the bounds shows on the page."""

from __future__ import annotations

from pathlib import Path

import erasure
import pytest
from erasure import COMPUTED, PAIRS
from experiment import Suite
from handmade import Seen, write_records

from fdu.comparison import runs as runs_file
from fdu.comparison.plan import Run
from fdu.config import TRAIN_METHODS
from fdu.models.unet import UNetDenoiser
from fdu.subjects.digits.vocabulary import NAMES
from fdu.subjects.emoji.objects import STYLES, THINGS


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded to tell whose records these are."""
    monkeypatch.setattr(runs_file, "weights", lambda *model: "0123456789abcdef")


def page_of(folder: Path, figures: dict[tuple[str, str], Seen], without: str = "ways") -> str:
    """The page of all suites but one, with these figures by suite and target; all other runs are perfect."""

    def seen(suite: Suite, run: Run) -> Seen | None:
        perfect = Seen(1.0)
        return figures.get((suite.name, run.target), perfect) if run.candidate != COMPUTED else perfect

    suites = [one for name, one in erasure.suites().items() if name != without]
    write_records(folder / "erasure.jsonl", suites, seen)
    erasure.write_page(folder, folder / "docs")
    return (folder / "docs" / "erasure.md").read_text()


def row(page: str, start: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return line


def test_the_suites_cover_every_kind_and_method() -> None:
    kinds = {thing.superclasses[0] for thing in THINGS}
    assert len(PAIRS["neighbours"][1]) == len(PAIRS["above"][1]) == len(kinds)
    assert {target for target, _ in PAIRS["styles"][1]} == set(STYLES)
    assert {target for name in ("digits", "inks") for target, _ in PAIRS[name][1]} == set(NAMES)
    ways = erasure.suites()["ways"].comparison
    # On these pipelines "text" trains what "cross_attention" trains.
    groups = UNetDenoiser.layer_groups()
    assert groups["text"] == groups["cross_attention"]
    assert {one.settings.get("train_method", "lora") for one in ways.candidates} == {*TRAIN_METHODS} - {"text"}
    assert ways.seeds == (0, 1)


def test_the_page_names_the_target_that_breaks_a_bound(tmp_path: Path) -> None:
    target = PAIRS["neighbours"][1][3][0]
    page = page_of(tmp_path, {("neighbours", target): Seen(0.9), ("styles", "ink"): Seen(1.0, 0.9, 0.01, 0.5)})
    line = row(page, "| neighbours | defaults")
    assert f"12 of 13; not {target} 10.0 |" in line and line.count("13 of 13") == 2
    assert row(page, "| neighbours | train_method closed_form").count("13 of 13") == 3
    assert "| 4 of 4 | 3 of 4; not ink 90.0 | 3 of 4; not ink 50.0 |" in row(page, "| styles | defaults")


def test_chance_is_added_to_the_bound_of_an_anchor_that_includes_the_target(tmp_path: Path) -> None:
    page = page_of(tmp_path, {("digits above", "zero"): Seen(0.875), ("digits", "zero"): Seen(0.875)})
    assert "10 of 10" in row(page, "| digits above | defaults") and "9 of 10; not zero" in row(
        page, "| digits | defaults"
    )


def test_a_suite_without_records_says_so_and_without_any_the_page_stays(tmp_path: Path) -> None:
    page = page_of(tmp_path, {})
    assert page.count(erasure.NOT_MEASURED) == 1 and "(152 of 256 runs;" in page
    erasure.write_page(tmp_path / "nothing", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_every_way_has_a_row_beside_the_defaults(tmp_path: Path) -> None:
    page = page_of(tmp_path, {}, without="styles")
    assert page.count("\n| defaults | 3 | 100.0 (") == len(erasure.WAYS) + 1  # and what keeps the attributes
    assert "| divergence kl, variational | 3 | 100.0 (" in page and "| init closed_form, rank 64 | 3 | 100.0 (" in page
