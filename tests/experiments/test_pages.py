"""The committed pages are those of the committed records, and the records those of today's code and model."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import defaults
import erasure
import experiment
import methods
import pytest
import robustness
import study
import theory
import torch

from fdu.comparison.sweep import Job, Records

ROOT = Path(experiment.__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
OTHERS = {
    **{"defaults": defaults, "erasure": erasure, "methods": methods},
    **{"robustness": robustness, "theory": theory},
}
PAGES, RECORDS = {"results": study, **OTHERS}, {"study": study, **OTHERS}


@pytest.fixture(autouse=True)
def as_the_script() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def test_the_records_are_those_of_todays_settings_and_model() -> None:
    """A setting or a weight that changed would make the pages old."""
    assert {path.stem for path in RESULTS.glob("*.jsonl")} == set(RECORDS)
    for name, module in RECORDS.items():
        found = set(Records(RESULTS / f"{name}.jsonl").found)
        assert found == set(experiment.current(RESULTS, name, module.jobs(Path())))


def test_a_header_holds_what_most_records_share() -> None:
    for path in RESULTS.glob("*.jsonl"):
        header, *rest = map(json.loads, path.read_text().splitlines())
        assert {"identity", "device", "versions"} <= header.keys()
        whole = [line for line in rest if line.get("whole")]
        # Only what was erased has settings; the models as they are share less with the header.
        assert not any(line["identity"].get("settings") for line in whole)
        assert not any("versions" in line for line in rest if line not in whole)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_that_of_the_records(name: str, tmp_path: Path) -> None:
    PAGES[name].write_page(RESULTS, tmp_path)
    assert (tmp_path / f"{name}.md").read_text() == (ROOT / "docs" / f"{name}.md").read_text()
    drawn, committed = (sorted(folder.glob(f"{name}/*.svg")) for folder in (tmp_path, ROOT / "docs"))
    assert [path.name for path in drawn] == [path.name for path in committed]
    assert [path.read_text() for path in drawn] == [path.read_text() for path in committed]


@pytest.mark.parametrize("name", ["robustness", "theory"])  # test_erasure.py and test_study.py have the others
def test_without_records_the_page_stays(name: str, tmp_path: Path) -> None:
    PAGES[name].write_page(tmp_path / "results", tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize("name", RECORDS)
def test_a_command_has_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECORDS[name].__file__), run_name="__main__")
    told = capsys.readouterr().out
    assert not ended.value.code and "--page_only" in told and f"python experiments/{name}.py" in told


def test_a_command_makes_what_is_missing_and_then_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []
    seen: list[list[str]] = []

    def work(number: int) -> dict[str, int]:
        made.append(number)
        return {"number": number}

    def own(number: int) -> Callable[[], dict[str, int]]:
        return lambda: work(number)

    def all_jobs(cache: Path) -> Sequence[Job]:
        return [Job(f"job {number}", {"number": number}, own(number)) for number in range(3)]

    def write_page(results: Path, docs: Path) -> None:
        seen.append(sorted(Records(results / "suite.jsonl").found))

    def command(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["experiment.py", "--workers", "1", "--results", str(tmp_path), *words])
        experiment.run("", "suite", all_jobs, write_page)

    command("--page_only")
    assert "3 of 3 records are missing" in capsys.readouterr().out
    command("--only", "job 1")
    assert "2 of 3 records are missing" in capsys.readouterr().out
    command("--only", "job 0")
    command()
    command()
    assert "missing" not in capsys.readouterr().out.splitlines()[-1]
    assert made == [1, 0, 2]
    assert seen == [[], ["job 1"], ["job 0", "job 1"], *[["job 0", "job 1", "job 2"]] * 2]
