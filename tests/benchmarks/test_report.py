"""docs/performance.md: from records alone, the same every time, with a word where a record is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import promises
import pytest
import report
from gpu_records import a_record

ROOT = Path(report.__file__).parents[1]
MACHINE = {
    "versions": {"python": "3", "torch": "2"}, "device": "CPU", "cpu": {"brand_raw": "a CPU", "count": 2}, "threads": 2,
    "capability": "AVX2", "keeps_freed_memory": True,
}  # fmt: skip
NAMES = ("clone", "eager", "compiled", "cpu", "torch")


def keep(folder: Path, suite: str, notes: list[dict[str, Any]]) -> None:
    """A record as pytest-benchmark writes it."""
    record = {
        "machine_info": MACHINE, "commit_info": {"id": "0123456789abcdef", "dirty": False}, "datetime": "2026-01-02T03",
        "benchmarks": [{"extra_info": note} for note in notes],
    }  # fmt: skip
    (folder / suite).mkdir(parents=True)
    (folder / suite / "cpu.json").write_text(json.dumps(record))


def sweep(form: str, shape: list[int], seconds: float) -> dict[str, Any]:
    size = 4
    for length in shape:
        size *= length
    medians = {name: seconds * (1 + number) for number, name in enumerate(NAMES)}
    return {
        "form": form, "shape": shape, "bytes": size, "pairs": 2, "medians": medians,
        "quartiles": {name: [taken * 0.9, taken * 1.1] for name, taken in medians.items()},
        "share": {name: 1.5 * seconds / taken for name, taken in medians.items() if name != "clone"},
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Records of every suite and of a GPU."""
    folder = tmp_path / "results"
    medians = {"eager": 8e-4, "compiled": 4e-4, "autograd": 2e-4, "value_and_grad": 1e-4}
    losses = {"form": "gaussian", "dtype": "float32", "shape": [2, 4, 64, 64], "medians": medians}
    clone = {"form": "bandwidth", "dtype": "float32", "shape": [2, 4], "pairs": 2, "share": 0.9}
    clone["medians"] = {"clone": 1e-4, "value_and_grad": 2e-4}
    keep(folder, "losses", [losses, clone])
    parts = {"checks": 4.0, "choice and dispatch": 1.0, "allocation and arguments": 2.0, "launch": 3.0}
    host = {"form": "host", "shape": [1, 4, 64, 64], "backend": "cpu", "medians_us": {"call": 10.0}, "parts_us": parts}
    pieces = {"call": {"before_us": 12.0, "after_us": 10.0, "ratio": 0.83}}
    change = {"form": "host change", "commit": "fedcba9876543210", "pieces": pieces}
    keep(folder, "host", [host, change])
    one = {"input_bytes": 100, "gradient_bytes": 100}
    memory = {"eager": {**one, "extra_bytes": 400}, "cpu value_and_grad": {**one, "extra_bytes": 4}}
    keep(folder, "memory", [{"form": "gaussian", "dtype": "float32", "shape": [2, 50], "memory": memory}])
    notes = [sweep("batch", [batch, 4, 64, 64], 1e-5 * batch) for batch in (1, 4)]
    notes += [sweep("elements", [4, elements], 1e-8 * elements) for elements in (256, 1024)]
    keep(folder, "scaling", [*notes, {"form": "concepts", "concepts": 2, "batch": 16, "step": 0.5}])
    (folder / "gpu").mkdir()
    record = a_record()
    record["machine"] = {
        "device": "A GPU",
        "driver": "580.1",
        "torch": "2.11",
        "commit": "abcdef0123456",
        "date": "today",
    }
    shapes = ([1, 4, 64, 64], [64, 4, 64, 64])
    record["sweep"] = {
        "rows": [
            {"form": "gaussian", "dtype": "float32", "shape": shape, "candidate": "cuda value_and_grad", "cold_us": 5.0,
             "share_of_copy": 0.9}
            for shape in shapes
        ]
    }  # fmt: skip
    failed = {"shape": [1, 4, 64, 64], "backend": "triton", "error": "RuntimeError: no"}
    record["host"] = {"rows": [{**host, "backend": "cuda"}, failed]}
    (folder / "gpu" / "h100.json").write_text(json.dumps(record))
    return folder


def test_every_record_is_shown_and_the_same_records_give_the_same_files(results: Path, tmp_path: Path) -> None:
    made = []
    for turn in ("first", "second"):
        figures = tmp_path / turn
        text = report.performance(report.Records(results, "cpu"), figures)
        made.append((text, {path.name: path.read_bytes() for path in figures.iterdir()}))
    assert made[0] == made[1]
    text, figures = made[0]
    assert {
        "losses.svg", "speed-of-light.svg", "latency.svg", "elements.svg", "host.svg", "memory.svg",
        "h100-speed-of-light.svg", "h100-latency.svg", "h100-host.svg",
    } == set(figures)  # fmt: skip
    for name in figures:
        assert f"(performance/{name})" in text
    for said in (
        "commit 0123456789", "## A GPU", "580.1; torch 2.11; commit abcdef0123; today", "| 2 | 16 | 500 |",
        "against commit fedcba9876: two", "| call | 12.0 | 10.0 | 0.83 |", "clone's bandwidth | >= 0.8 | 0.9 | holds",
        "| gaussian float32 | 2x50 | 4.000 | 0.040 |", "counts as 5N",
    ):  # fmt: skip
        assert said in text, said
    assert "fails" not in text and "No record yet" not in text and "waits" not in text


def test_a_promise_that_is_not_kept_stands_out(results: Path, tmp_path: Path) -> None:
    path = results / "gpu" / "h100.json"
    record = json.loads(path.read_text())
    record["tests"]["exit"] = 1
    path.write_text(json.dumps(record))
    assert report.performance(report.Records(results, "cpu"), tmp_path / "figures").count("**fails**") == 1


def test_without_records_the_page_says_how_to_make_them(tmp_path: Path) -> None:
    text = report.performance(report.Records(tmp_path, "cpu"), tmp_path / "figures")
    for suite in ("losses", "host", "memory", "scaling"):
        assert f"`make bench SUITES={suite}` makes it" in text
    assert all(bound.what in text for bound in promises.gpu({}))
    assert not (tmp_path / "figures").exists()


def test_the_pages_in_docs_are_those_of_the_committed_records(tmp_path: Path) -> None:
    command = [sys.executable, report.__file__, "--docs", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for page in ("performance.md", "training.md"):
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text()
    drawn = {path.name for path in (tmp_path / "performance").glob("*.svg")}
    assert drawn == {path.name for path in (ROOT / "docs" / "performance").glob("*.svg")}


def test_promises_are_judged_from_the_command_line(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results / "losses" / "cpu.json"
    monkeypatch.setattr(sys, "argv", ["promises.py", str(path), str(results / "gpu" / "h100.json")])
    assert promises.main() == 0
    path.write_text(path.read_text().replace('"eager": 0.0008', '"eager": 0.0007'))
    assert promises.main() == 1
    monkeypatch.setattr(sys, "argv", ["promises.py", str(results / "host" / "cpu.json")])
    with pytest.raises(SystemExit):
        promises.main()
