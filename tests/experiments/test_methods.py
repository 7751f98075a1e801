"""Methods against each other: which runs are made, and whether the page tells the differences."""

from __future__ import annotations

from pathlib import Path

import methods
import pytest
from experiment import Suite
from handmade import Seen, write_records
from methods import DIVERGENCES, PAIRS, SEEDS, WAYS, computed, held, of_length

from fdu.comparison import runs as runs_file
from fdu.comparison.plan import Run


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded to tell whose records these are."""
    monkeypatch.setattr(runs_file, "weights", lambda *model: "0123456789abcdef")


WARM = "lora from the closed form"


def seen(suite: Suite, run: Run) -> Seen:
    """Only a warm start under attack tells divergences apart; from the closed form 20 steps do what 120 do."""
    steps = run.candidate.settings.get("max_train_steps")
    if suite.comparison.attacked:
        return Seen(1.0, held=0.9 if run.candidate == held(WARM, 4, methods.ONE) else 0.4)
    if run.candidate == computed(0):
        return Seen(0.9)
    warm = run.candidate.settings.get("init") == "closed_form"
    return Seen(0.9 if steps >= (20 if warm else 120) else 0.3)


def test_every_method_meets_every_divergence_with_and_without_searches() -> None:
    every = methods.suites()
    candidates = every["held"].comparison.candidates
    assert len(candidates) == len({*candidates}) == 2 + 2 * len(WAYS) * len(DIVERGENCES)
    assert every["held"].comparison.attacked and not every["steps"].comparison.attacked
    assert len(PAIRS) == 3 and len(SEEDS) == 2
    assert computed(0) in candidates and held("lora", 4, "mse") in candidates


def test_the_page_tells_what_differs_and_how_many_steps_are_saved(tmp_path: Path) -> None:
    write_records(tmp_path / "methods.jsonl", list(methods.suites().values()), seen)
    methods.write_page(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "methods.md").read_text()
    rows = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| ")}
    gap = rows[f"| {WARM}, 4 rounds, minus lora"].split(" | ")
    assert gap[4].startswith("50.0 (") and "may be chance" not in gap[4]
    assert rows["| lora"].count("may be chance") == 4
    for divergence in DIVERGENCES:
        lines = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| {divergence} | ")]
        assert [line[1:3] for line in lines] == [["lora", "120"], [WARM, "20"]]
    assert "|  | closed form alone | 0 | 90.0 (" in page
    assert "| held | train_method closed_form | 3 of 3 |" in page and "* balanced: " in page
    assert "| held |" in page and (tmp_path / "docs" / "methods" / "steps.svg").is_file()


def test_a_warm_start_that_never_gets_there_is_told(tmp_path: Path) -> None:
    def worse(suite: Suite, run: Run) -> Seen:
        return Seen(0.2 if run.candidate.settings.get("init") else 1.0)

    write_records(tmp_path / "methods.jsonl", [methods.suites()["steps"]], worse)
    methods.write_page(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "methods.md").read_text()
    assert page.count(f"| {WARM} | not in 40 |") == len(DIVERGENCES) and "Not measured yet." in page
    assert page.count("| lora | 20 |") == len(DIVERGENCES)
    assert of_length("lora", "mse", 120) in methods.suites()["steps"].comparison.candidates
