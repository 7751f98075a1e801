"""The page on robustness says what the committed records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import robustness_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "robustness"


def test_the_page_is_that_of_the_records() -> None:
    rows = {
        name: json.loads(path.read_text())
        for name in (*robustness_table.ERASURES, robustness_table.NEVER_KNOWN)
        if (path := robustness_table.record_path(RESULTS, name)).is_file()
    }
    page = robustness_table.page(rows)
    assert (ROOT / "docs" / "robustness.md").read_text() == page
    for name, row in rows.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert f"{row['attack']['after']['value']:.2f} (" in line
    rows["lora"] = {**rows["not erased"], "retained": 0.25}
    rows["lora"]["attack"] = {**rows["lora"]["attack"], "back_after": None}
    (line,) = (line for line in robustness_table.page(rows).splitlines() if line.startswith("| lora |"))
    assert line.startswith("| lora | 0.25 |") and "| never |" in line


def test_rows_that_are_there_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    found = json.loads(robustness_table.record_path(RESULTS, "not erased").read_text())
    monkeypatch.setattr(robustness_table, "examine", lambda settings: (made.append(settings), found)[1])
    words = ["--results", str(tmp_path), "--docs", "", "--rows", "not erased"]
    monkeypatch.setattr("sys.argv", ["robustness_table.py", *words])
    robustness_table.main()
    robustness_table.main()
    assert made == [None]
