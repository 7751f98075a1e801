"""The committed pages are those of the committed records, and the records those of today's code and model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import erasure
import erasure_runs
import experiment
import pytest
import robustness
import study
import theory
import torch

from fdu.comparison.runs import jobs
from fdu.comparison.sweep import Job, Records

ROOT = Path(experiment.__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = {"erasure": erasure, "results": study, "robustness": robustness, "theory": theory}
FIGURES = ["results/change.svg", "results/front.svg", "results/variational.svg"]
FIGURES += ["theory/estimate.svg", "theory/flow.svg", "theory/gradient.svg"]


def suites() -> dict[str, Sequence[Job]]:
    """All jobs of all experiments, by the name of their file."""
    found = {name: jobs(comparison, Path()) for name, comparison in study.comparisons().items()}
    return found | {
        "erasure": erasure_runs.jobs(Path()),
        "robustness": robustness.jobs(Path()),
        "theory": theory.jobs(Path()),
    }


@pytest.fixture(autouse=True)
def as_the_script() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def test_the_records_are_those_of_todays_settings_and_model() -> None:
    """A setting or a weight that changed would make the pages old."""
    assert {path.stem for path in RESULTS.iterdir()} == set(suites())
    for name, own in suites().items():
        records = Records(RESULTS / f"{name}.jsonl")
        assert {job.name for job in own} == set(records.found)
        assert [job.name for job in own if records.of(job.name, job.identity) is None] == []


def test_a_header_holds_what_most_records_share() -> None:
    for path in RESULTS.iterdir():
        header, *rest = map(json.loads, path.read_text().splitlines())
        assert {"identity", "device", "versions"} <= header.keys()
        whole = [line for line in rest if line.get("whole")]
        assert len(whole) < len(rest) / 3 and not any("versions" in line for line in rest if line not in whole)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_that_of_the_records(name: str, tmp_path: Path) -> None:
    PAGES[name].write_page(RESULTS, tmp_path)
    assert (tmp_path / f"{name}.md").read_text() == (ROOT / "docs" / f"{name}.md").read_text()
    drawn = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.svg"))
    assert drawn == [figure for figure in FIGURES if figure.startswith(f"{name}/")]


@pytest.mark.parametrize("name", PAGES)
def test_without_records_the_page_stays(name: str, tmp_path: Path) -> None:
    PAGES[name].write_page(tmp_path / "results", tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


@pytest.mark.slow
def test_a_command_has_help() -> None:
    command = [sys.executable, erasure.__file__, "--help"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0 and "--page_only" in ran.stdout and "docs/erasure.md" in ran.stdout


def test_a_command_makes_what_is_missing_and_then_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    seen: list[list[str]] = []

    def work(number: int) -> dict[str, int]:
        made.append(number)
        return {"number": number}

    def own(number: int) -> Callable[[], dict[str, int]]:
        return lambda: work(number)

    def all_jobs(cache: Path) -> Mapping[str, Sequence[Job]]:
        return {"suite": [Job(f"job {number}", {"number": number}, own(number)) for number in range(3)]}

    def write_page(results: Path, docs: Path) -> None:
        seen.append(sorted(Records(results / "suite.jsonl").found))

    def command(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["experiment.py", "--workers", "1", "--results", str(tmp_path), *words])
        experiment.run("", all_jobs, write_page)

    command("--page_only")
    command("--only", "job 1")
    command("--most", "1")
    command()
    command()
    assert made == [1, 0, 2]
    assert seen == [[], ["job 1"], ["job 0", "job 1"], *[["job 0", "job 1", "job 2"]] * 2]
