"""The erasure table: which runs it makes, when it makes one anew, and whether a run outside the bounds shows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import erasure_page
import erasure_runs

from fdu.storage.output import write_json
from fdu.subjects.digits.vocabulary import DIGITS, INKS


def record(run: Any, **figures: Any) -> dict[str, Any]:
    """A record as a run would write it, all well but for ``figures``; of two concepts, those of the first."""
    good = {
        "target_accuracy": 0.0,
        "unseen_accuracy": 0.0,
        "retained_accuracy": 1.0,
        "worst_retained_accuracy": 1.0,
        "worst_retained_class": "one",
        "cross_domain_accuracy": 1.0,
    }
    several = isinstance(run, erasure_runs.TwoConcepts)
    found = {**good, **figures}
    return {
        "run": dataclasses.asdict(run),
        "figures": {"three": found, "red": good} if several else found,
        **({"first_alone": 0.0} if several and run.order != "at_once" else {}),
        "settings": run.config().as_dict(),
        "seconds": 30.0,
        "workers": 2,
        **erasure_runs.conditions(),
    }


def page_of(folder: Path, records: list[tuple[Any, dict[str, Any]]]) -> str:
    """The page of a folder that holds these records and a perfect pipeline's figures."""
    seen = dict.fromkeys((*DIGITS, *INKS), 1.0)
    write_json(folder / "results" / erasure_runs.BASELINE, {"seen": seen, "unseen": seen, **erasure_runs.conditions()})
    for run, content in records:
        write_json(folder / "results" / run.suite / f"{run.name}.json", content)
    erasure_page.write_page(folder / "results", folder / "docs" / "erasure.md")
    return (folder / "docs" / "erasure.md").read_text()


def row(page: str, start: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return line


def test_every_target_meets_both_anchors_and_no_two_runs_share_a_file() -> None:
    runs = erasure_runs.runs()
    assert len({(run.suite, run.name) for run in runs}) == len(runs)
    runs = [run for run in runs if isinstance(run, erasure_runs.Run)]
    default = [run for run in runs if run.suite == "concepts" and not run.settings and run.seed == 0]
    for target in (*DIGITS, *INKS):
        assert len({run.anchor for run in default if run.target == target}) == 2
    seeds: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        if run.suite == "concepts" and not run.settings:
            seeds.setdefault((run.target, run.anchor), set()).add(run.seed)
    assert len({target for (target, _), found in seeds.items() if found == {0, 1, 2}}) == 3
    divergences = {dict(run.settings).get("divergence") for run in runs if run.suite == "concepts"} - {None}
    assert divergences == {"mse", "kl", "jensen_shannon", "alpha:0.3", "pearson_chi2"}


def test_a_run_is_made_anew_if_its_settings_or_the_pipeline_changed(tmp_path: Path) -> None:
    run = erasure_runs.runs()[0]
    path = tmp_path / run.suite / f"{run.name}.json"
    assert erasure_runs.record_of(tmp_path, run) is None
    write_json(path, record(run))
    assert erasure_runs.record_of(tmp_path, run) is not None
    for change in ({"pipeline": "another"}, {"settings": {**run.config().as_dict(), "learning_rate": 1.0}}):
        write_json(path, {**json.loads(path.read_text()), **record(run), **change})
        assert erasure_runs.record_of(tmp_path, run) is None


def test_a_record_older_than_a_setting_holds_if_the_run_leaves_that_at_its_default(tmp_path: Path) -> None:
    default = erasure_runs.runs()[0]
    changed = erasure_runs.Run("objectives", "three", "eight", 0, (("objective", "noise"),))
    for run in (default, changed):
        older = record(run)
        del older["settings"]["objective"]
        write_json(tmp_path / run.suite / f"{run.name}.json", older)
    found = erasure_runs.record_of(tmp_path, default)
    assert found is not None and found["settings"] == default.config().as_dict()
    assert erasure_runs.record_of(tmp_path, changed) is None


def test_every_change_of_the_settings_and_every_order_of_two_concepts_runs_with_three_seeds() -> None:
    runs = [run for run in erasure_runs.runs() if run.suite not in ("concepts", "sigma")]
    seeds: dict[tuple[Any, ...], list[int]] = {}
    for run in runs:
        what = getattr(run, "order", None) or run.anchor
        seeds.setdefault((run.suite, what, run.settings), []).append(run.seed)
    assert set(map(tuple, seeds.values())) == {(0, 1, 2)}
    assert {order for suite, order, _ in seeds if suite == "several"} == {"at_once", "in_sequence", "merged"}
    for suite in ("objectives", "variational"):
        assert {anchor for found, anchor, _ in seeds if found == suite} == {"eight", "digit"}


def test_the_anchors_of_two_concepts_at_once_name_neither() -> None:
    for target, anchor in erasure_runs.BOTH.items():
        prompts = erasure_runs.without_targets(erasure_runs.embedded.concepts(target, anchor)[1]).prompts
        assert not any(name in prompt.split() for prompt in prompts for name in erasure_runs.BOTH)
        assert any("eight in black ink" in prompt for prompt in prompts)


def test_the_page_shows_the_run_that_breaks_a_bound(tmp_path: Path) -> None:
    records = []
    for run in erasure_runs.runs()[:4]:
        bad = {"target_accuracy": 0.3} if run.target == "one" and run.anchor == "digit" else {}
        records.append((run, record(run, **bad)))
    page = page_of(tmp_path, records)
    line = row(page, "| concepts | target accuracy | superclass")
    assert "1 of 2" in line and "0.300 (one to digit, seed 0)" in line
    assert "4 of 4" in row(page, "| concepts | worst retained class")
    assert f"4 of {len(erasure_runs.runs())} runs" in page


def test_each_suite_has_bounds_of_its_own_and_a_first_concept_that_comes_back_shows(tmp_path: Path) -> None:
    kept = {"retained_accuracy": 0.92}
    records = [(run, record(run)) for run in erasure_runs.runs()[:1]]
    for suite in ("objectives", "variational", "several"):
        run = next(run for run in erasure_runs.runs() if run.suite == suite)
        records.append((run, record(run, **kept)))
    back = erasure_runs.TwoConcepts("merged", 1)
    records.append((back, record(back, target_accuracy=0.2)))
    page = page_of(tmp_path, records)
    what = "retained accuracy, share of before | both"
    assert "0 of 1" in row(page, f"| objectives | {what} | >= 0.95")
    assert "1 of 1" in row(page, f"| variational | {what} | >= 0.90")
    line = row(page, f"| several | {what} | >= 0.93")
    assert "3 of 4" in line and "0.920 (at once, three to eight, seed 0)" in line
    line = row(page, "| several | rise of the first concept")
    assert "0 of 1" in line and "0.200 (merged, seed 1)" in line
