"""The erasure experiment: which runs it makes, and whether a run outside the bounds shows on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import erasure
import experiment
import pytest
from erasure import Erasure

from fdu.comparison.sweep import Records
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.digits.vocabulary import DIGITS, INKS

CONDITIONS = {"device": "cpu: some", "versions": {"fdu": "0", "torch": "9.9"}}
ALL = erasure.runs()


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded to tell whose records these are."""
    monkeypatch.setattr(erasure, "weights", lambda model: "0123456789abcdef")


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
        "identity": run.job(Path()).identity,
        "figures": {first: {**good, **figures}, **{target: good for target, _ in others}},
        **({"first_alone": 0.0} if run.order != "at_once" else {}),
        "seconds": 30.0,
        **CONDITIONS,
    }


def page_of(folder: Path, found: list[tuple[Erasure, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> str:
    """The page of these records and a perfect pipeline's figures; one more run has no record."""
    monkeypatch.setattr(erasure, "runs", lambda: [*(run for run, _ in found), ALL[-1]])
    seen = dict.fromkeys((*DIGITS, *INKS), 1.0)
    first, *jobs = erasure.jobs(folder)
    records = Records(folder / "results" / "erasure.jsonl")
    before = {"identity": first.identity, "seen": seen, "unseen": seen, **CONDITIONS}
    for name, content in [(erasure.BASELINE, before), *((run.name, content) for run, content in found)]:
        records.add(name, content, [first, *jobs])
    erasure.write_page(folder / "results", folder / "docs")
    return (folder / "docs" / "erasure.md").read_text()


def row(page: str, start: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return line


def test_the_suites_cover_every_target_divergence_and_order() -> None:
    assert len({run.name for run in ALL}) == len(ALL)
    default = [run for run in ALL if run.suite == "concepts" and not run.settings]
    for target in (*DIGITS, *INKS):
        assert len({run.pairs for run in default if run.seed == 0 and run.pairs[0][0] == target}) == 2
    assert len({run.pairs[0][0] for run in default if run.seed == 2}) == 3
    divergences = {run.config.divergence for run in ALL if run.suite == "concepts"}
    assert divergences == {"squared_hellinger", "mse", "kl", "jensen_shannon", "alpha:0.3", "pearson_chi2"}
    seeds: dict[tuple[Any, ...], list[int]] = {}
    for run in ALL:
        if run.suite != "concepts":
            seeds.setdefault((run.suite, run.pairs, run.order, run.settings), []).append(run.seed)
    assert set(map(tuple, seeds.values())) == {(0, 1, 2)}
    assert {order for suite, _, order, _ in seeds if suite == "several"} == {"at_once", "in_sequence", "merged"}
    for suite in ("objectives", "variational"):
        assert {pairs[0][1] for found, pairs, _, _ in seeds if found == suite} == {"eight", "digit"}


def test_a_run_is_made_again_if_anything_that_it_depends_on_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ALL[0]
    job = run.job(tmp_path)
    records = Records(tmp_path / "erasure.jsonl")
    records.add(run.name, record(run), [job])
    assert records.of(run.name, job.identity) is not None
    settings = {**job.identity["settings"], "learning_rate": 1.0}
    for change in ({"weights": "another"}, {"settings": settings}, {"images_of_target": 8}, {"roles": ["target"]}):
        assert records.of(run.name, {**job.identity, **change}) is None
    monkeypatch.setattr(experiment, "losses", lambda divergence: ["corrected"])
    assert records.of(run.name, run.job(tmp_path).identity) is None
    monkeypatch.undo()
    monkeypatch.setattr(erasure, "weights", lambda model: "0123456789abcdef")
    monkeypatch.setattr(experiment, "asked", lambda *pair: [("another prompt",)])
    assert records.of(run.name, run.job(tmp_path).identity) is None


def test_the_anchors_of_two_concepts_at_once_name_neither() -> None:
    both = next(run for run in ALL if len(run.pairs) == 2)
    for pair in both.pairs:
        anchor = digits.concepts(*pair)[1]
        prompts = erasure.without_targets(anchor, both).prompts
        assert not any(name in prompt.split() for prompt in prompts for name, _ in both.pairs)
        assert any("eight in black ink" in prompt for prompt in prompts)
        alone = Erasure("concepts", (pair,), 0)
        assert erasure.without_targets(anchor, alone) == anchor


def test_the_page_shows_the_run_that_breaks_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = []
    for run in ALL[:4]:
        bad = {"target_accuracy": 0.3} if run.pairs == (("one", "digit"),) else {}
        records.append((run, record(run, **bad)))
    page = page_of(tmp_path, records, monkeypatch)
    line = row(page, "| concepts | target accuracy | superclass")
    assert "1 of 2" in line and "0.300 (one to digit, seed 0)" in line
    assert "4 of 4" in row(page, "| concepts | worst retained class")
    assert "4 of 5 runs" in page


def test_each_suite_has_bounds_of_its_own_and_a_first_concept_that_comes_back_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"retained_accuracy": 0.92}
    records = [(run, record(run)) for run in ALL[:1]]
    for suite in ("objectives", "variational", "several"):
        run = next(run for run in ALL if run.suite == suite)
        records.append((run, record(run, **kept)))
    back = next(run for run in ALL if run.order == "merged" and run.seed == 1)
    records.append((back, record(back, target_accuracy=0.2)))
    page = page_of(tmp_path, records, monkeypatch)
    what = "retained accuracy, share of before | both"
    assert "0 of 1" in row(page, f"| objectives | {what} | >= 0.95")
    assert "1 of 1" in row(page, f"| variational | {what} | >= 0.90")
    line = row(page, f"| several | {what} | >= 0.93")
    assert "3 of 4" in line and "0.920 (at once, three to eight, seed 0)" in line
    line = row(page, "| several | rise of the first concept")
    assert "0 of 1" in line and "0.200 (merged, three to eight, seed 1)" in line


def test_a_failed_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ALL[:2]
    failed = {"identity": second.job(tmp_path).identity, "failed": "the loss became nan at step 3", **CONDITIONS}
    assert "1 of 3 runs" in page_of(tmp_path, [(first, record(first)), (second, failed)], monkeypatch)


def test_a_page_of_one_suite_has_gaps_and_one_without_the_baseline_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next(run for run in ALL if run.suite == "several")
    page = page_of(tmp_path, [(run, record(run))], monkeypatch)
    assert "| at once | three to eight |" in page and "Not measured yet." in page
    path = tmp_path / "results" / "erasure.jsonl"
    path.write_text("".join(line for line in path.open() if f'"{erasure.BASELINE}"' not in line))
    (tmp_path / "docs" / "erasure.md").unlink()
    erasure.write_page(tmp_path / "results", tmp_path / "docs")
    assert not (tmp_path / "docs" / "erasure.md").exists() and f"'{erasure.BASELINE}'" in capsys.readouterr().out
