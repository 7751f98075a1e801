"""The erasure experiment: which runs it makes, and whether a run outside the bounds shows on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import erasure
import erasure_runs
from erasure_runs import Erasure

from fdu.comparison.sweep import Records
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.digits.vocabulary import DIGITS, INKS

CONDITIONS = {"device": "cpu: some", "versions": {"fdu": "0", "torch": "9.9"}}


def record(run: Erasure, **figures: Any) -> dict[str, Any]:
    """A record as a run would write it, all well but for ``figures``; of two concepts, those of the first."""
    good = {
        "target_accuracy": 0.0,
        "unseen_accuracy": 0.0,
        "retained_accuracy": 1.0,
        "worst_retained_accuracy": 1.0,
        "worst_retained_class": "one",
        "cross_domain_accuracy": 1.0,
    }
    (first, _), *others = run.pairs
    return {
        "identity": run.identity,
        "figures": {first: {**good, **figures}, **{target: good for target, _ in others}},
        **({"first_alone": 0.0} if run.order != "at_once" else {}),
        "seconds": 30.0,
        **CONDITIONS,
    }


def page_of(folder: Path, found: list[tuple[Erasure, dict[str, Any]]]) -> str:
    """The page of these records and a perfect pipeline's figures."""
    seen = dict.fromkeys((*DIGITS, *INKS), 1.0)
    records = Records(folder / "results" / "erasure.jsonl")
    jobs = erasure_runs.jobs(folder)
    before = {"identity": erasure_runs.conditions(), "seen": seen, "unseen": seen, **CONDITIONS}
    for name, content in [(erasure_runs.BASELINE, before), *((run.name, content) for run, content in found)]:
        records.add(name, content, jobs)
    erasure.write_page(folder / "results", folder / "docs")
    return (folder / "docs" / "erasure.md").read_text()


def row(page: str, start: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return line


def test_every_target_meets_both_anchors_and_no_two_runs_share_a_file() -> None:
    runs = erasure_runs.runs()
    assert len({run.name for run in runs}) == len(runs)
    runs = [run for run in runs if len(run.pairs) == 1]
    default = [run for run in runs if run.suite == "concepts" and not run.settings and run.seed == 0]
    for target in (*DIGITS, *INKS):
        assert len({run.pairs for run in default if run.pairs[0][0] == target}) == 2
    seeds: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        if run.suite == "concepts" and not run.settings:
            seeds.setdefault(run.pairs[0], set()).add(run.seed)
    assert len({target for (target, _), found in seeds.items() if found == {0, 1, 2}}) == 3
    divergences = {dict(run.settings).get("divergence") for run in runs if run.suite == "concepts"} - {None}
    assert divergences == {"mse", "kl", "jensen_shannon", "alpha:0.3", "pearson_chi2"}


def test_a_run_is_made_again_if_its_settings_or_the_pipeline_changed(tmp_path: Path) -> None:
    run = erasure_runs.runs()[0]
    records = Records(tmp_path / "erasure.jsonl")
    records.add(run.name, record(run), erasure_runs.jobs(tmp_path))
    assert records.of(run.name, run.identity) is not None
    settings = {**run.identity["settings"], "learning_rate": 1.0}
    for change in ({"weights": "another"}, {"settings": settings}, {"images_of_target": 8}, {"roles": ["target"]}):
        assert records.of(run.name, {**run.identity, **change}) is None


def test_every_change_of_the_settings_and_every_order_of_two_concepts_runs_with_three_seeds() -> None:
    runs = [run for run in erasure_runs.runs() if run.suite not in ("concepts", "sigma")]
    seeds: dict[tuple[Any, ...], list[int]] = {}
    for run in runs:
        seeds.setdefault((run.suite, run.pairs, run.order, run.settings), []).append(run.seed)
    assert set(map(tuple, seeds.values())) == {(0, 1, 2)}
    assert {order for suite, _, order, _ in seeds if suite == "several"} == {"at_once", "in_sequence", "merged"}
    for suite in ("objectives", "variational"):
        assert {pairs[0][1] for found, pairs, _, _ in seeds if found == suite} == {"eight", "digit"}


def test_the_anchors_of_two_concepts_at_once_name_neither() -> None:
    both = next(run for run in erasure_runs.runs() if len(run.pairs) == 2)
    for pair in both.pairs:
        anchor = digits.concepts(*pair)[1]
        prompts = erasure_runs.without_targets(anchor, both).prompts
        assert not any(name in prompt.split() for prompt in prompts for name, _ in both.pairs)
        assert any("eight in black ink" in prompt for prompt in prompts)
        alone = Erasure("concepts", (pair,), 0)
        assert erasure_runs.without_targets(anchor, alone) == anchor


def test_the_page_shows_the_run_that_breaks_a_bound(tmp_path: Path) -> None:
    records = []
    for run in erasure_runs.runs()[:4]:
        bad = {"target_accuracy": 0.3} if run.pairs == (("one", "digit"),) else {}
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
    back = next(run for run in erasure_runs.runs() if run.order == "merged" and run.seed == 1)
    records.append((back, record(back, target_accuracy=0.2)))
    page = page_of(tmp_path, records)
    what = "retained accuracy, share of before | both"
    assert "0 of 1" in row(page, f"| objectives | {what} | >= 0.95")
    assert "1 of 1" in row(page, f"| variational | {what} | >= 0.90")
    line = row(page, f"| several | {what} | >= 0.93")
    assert "3 of 4" in line and "0.920 (at once, three to eight, seed 0)" in line
    line = row(page, "| several | rise of the first concept")
    assert "0 of 1" in line and "0.200 (merged, three to eight, seed 1)" in line


def test_a_failed_run_is_left_out(tmp_path: Path) -> None:
    first, second = erasure_runs.runs()[:2]
    failed = {"identity": second.identity, "failed": "the loss became nan at step 3", **CONDITIONS}
    assert f"1 of {len(erasure_runs.runs())} runs" in page_of(tmp_path, [(first, record(first)), (second, failed)])
