"""Fifty erasures: the choice of targets and anchors, and whether what is left or comes back shows on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import many
import pytest
from handmade import CONDITIONS

from fdu.comparison.sweep import Records
from fdu.subjects.emoji.emoji_pipeline import relatives


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded to tell whose records these are."""
    monkeypatch.setattr(many, "weights", lambda model: "0123456789abcdef")


def figures(shares: dict[str, float], **more: Any) -> dict[str, Any]:
    names = ("target_accuracy", "unseen_accuracy", "retained_accuracy", "attribute_accuracy", "retained_by_group.near")
    per_class = dict.fromkeys(many.TARGETS, 0.0) | dict.fromkeys(many.ANCHORS, 1.0) | shares
    became = {name: {"wolf": 1 - per_class[name], name: per_class[name]} for name in many.TARGETS}
    return {
        "shares": {name: [0.5, 0.25, 0.75] for name in names},
        "per_class": per_class,
        "became": became,
        "change": 0.0123,
        **more,
        **CONDITIONS,
    }


def page_of(folder: Path, rows: dict[str, dict[str, Any]]) -> str:
    records = Records(folder / "many.jsonl")
    identities = {job.name: job.identity for job in many.jobs(Path())}
    for name, row in rows.items():
        records.found[name] = {"identity": identities[name], **row}
    records.write([])
    many.write_page(folder, folder / "docs")
    return (folder / "docs" / "many.md").read_text()


def test_no_anchor_is_erased_and_all_are_neighbours() -> None:
    assert len(set(many.TARGETS)) == 50 and not {*many.TARGETS} & {*many.ANCHORS}
    for target, anchor in many.PAIRS:
        assert anchor in {one.name for one in relatives(target)}


def test_what_is_left_and_what_comes_back_are_on_the_page(tmp_path: Path) -> None:
    first, second = many.TARGETS[:2]
    gone = dict.fromkeys(many.TARGETS, 0.0)
    page = page_of(tmp_path, {
        "before": figures(dict.fromkeys(many.TARGETS, 1.0)),
        many.SHOWN: figures({first: 0.25}, seconds=31.4),
        "in turn/closed_form seed 1": figures({first: 0.5, second: 1.0}, at_once={**gone, second: 1.0}),
    })  # fmt: skip
    (once,) = [line for line in page.splitlines() if line.startswith("| text_encoder, 480 steps | 0 |")]
    assert once.endswith(f"| 1.23 | {first} 25 | 31.4 |") and "50.0 (25.0 to 75.0)" in once
    (turn,) = [line for line in page.splitlines() if line.startswith("| closed_form | 1 |")]
    # The second was never gone, so it does not come back.
    assert turn.endswith(f"| {second} 100, {first} 50 | {first} 50 |")
    assert "| none |" in page and "many/became.svg" in page
    assert f"{first}, itself: 25 %" in (tmp_path / "docs" / "many" / "became.svg").read_text()


def test_without_records_there_is_no_page(tmp_path: Path) -> None:
    many.write_page(tmp_path, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
