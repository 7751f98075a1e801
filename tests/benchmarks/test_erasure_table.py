"""The erasure table: which runs it makes, when it makes one anew, and whether a run outside the bounds shows."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fdu.embedded.vocabulary import DIGITS, INKS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "erasure_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("erasure_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def record(script: ModuleType, run: Any, **figures: Any) -> dict[str, Any]:
    """A record as a run would write it, all well but for ``figures``."""
    good = {
        "target_accuracy": 0.0,
        "unseen_accuracy": 0.0,
        "retained_accuracy": 1.0,
        "worst_retained_accuracy": 1.0,
        "worst_retained_class": "one",
        "cross_domain_accuracy": 1.0,
    }
    return {
        "run": dataclasses.asdict(run),
        "figures": {**good, **figures},
        "settings": run.config().as_dict(),
        "seconds": 30.0,
        "workers": 2,
        **script.conditions(),
    }


def test_every_target_meets_both_anchors_and_no_two_runs_share_a_file(script: ModuleType) -> None:
    runs = script.runs()
    assert len({(run.suite, run.name) for run in runs}) == len(runs)
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


def test_a_run_is_made_anew_if_its_settings_or_the_pipeline_changed(script: ModuleType, tmp_path: Path) -> None:
    run = script.runs()[0]
    path = tmp_path / run.suite / f"{run.name}.json"
    assert script.record_of(tmp_path, run) is None
    script.write(path, record(script, run))
    assert script.record_of(tmp_path, run) is not None
    for change in ({"pipeline": "another"}, {"settings": {**run.config().as_dict(), "learning_rate": 1.0}}):
        script.write(path, {**json.loads(path.read_text()), **record(script, run), **change})
        assert script.record_of(tmp_path, run) is None


def test_the_page_shows_the_run_that_breaks_a_bound(script: ModuleType, tmp_path: Path) -> None:
    seen = dict.fromkeys((*DIGITS, *INKS), 1.0)
    script.write(tmp_path / "results" / script.BASELINE, {"seen": seen, "unseen": seen, **script.conditions()})
    for run in script.runs()[:4]:
        bad = {"target_accuracy": 0.3} if run.target == "one" and run.anchor == "digit" else {}
        script.write(tmp_path / "results" / run.suite / f"{run.name}.json", record(script, run, **bad))
    script.write_page(tmp_path / "results", tmp_path / "docs" / "erasure.md")
    page = (tmp_path / "docs" / "erasure.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| target accuracy | superclass")]
    assert "1 of 2" in line and "0.300 (one to digit, seed 0)" in line
    (line,) = [line for line in page.splitlines() if line.startswith("| worst retained class")]
    assert "4 of 4" in line
    assert f"4 of {len(script.runs())} runs" in page
