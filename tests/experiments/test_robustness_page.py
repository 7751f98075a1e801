"""The page on robustness says what its records say."""

from __future__ import annotations

from pathlib import Path

import robustness

from fdu.comparison.sweep import Records

RESULTS = Path(robustness.__file__).parent / "results"


def test_every_row_shows_its_figures() -> None:
    rows = Records(RESULTS / "robustness.jsonl").found
    page = robustness.page(rows)
    for name, row in rows.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert f"{row['attack']['after']['value']:.2f} (" in line
    rows["lora"] = {**rows["not erased"], "retained": 0.25}
    rows["lora"]["attack"] = {**rows["lora"]["attack"], "back_after": None}
    (line,) = (line for line in robustness.page(rows).splitlines() if line.startswith("| lora |"))
    assert line.startswith("| lora | 0.25 |") and "| never |" in line


def test_a_page_of_some_rows_says_so() -> None:
    rows = Records(RESULTS / "robustness.jsonl").found
    del rows[robustness.NEVER_KNOWN]
    page = robustness.page(rows)
    assert "8 of 9 rows" in page and "Under the attack" not in page


def test_rows_differ_in_what_they_are_made_of() -> None:
    identities = [job.identity for job in robustness.jobs(Path())]
    assert all(one not in identities[:place] for place, one in enumerate(identities))
    assert robustness.config_of("full, 480 steps").max_train_steps == 480
