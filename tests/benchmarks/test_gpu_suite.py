"""The GPU suite, rehearsed on the CPU: every section at toy size, budgets that hold, promises that can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_bounds
import gpu_suite
import pytest
import torch
from gpu_records import a_record, losses

SUITE = Path(gpu_suite.__file__)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, memory is read from /proc")


def test_all_sections_fit_into_nine_minutes() -> None:
    wanted = gpu_suite.sections(rehearsal=False)
    assert sum(section.seconds for section in wanted) <= 9 * 60 - gpu_suite.GRACE
    names = [section.name for section in wanted]
    assert len(set(names)) == len(names)
    assert {"large", "latents", "sd15", "sdxl", "host", "sweep", "tests", "sanitizer"} < set(names)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rehearsal_runs_every_section(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--out", str(tmp_path), "--rehearsal"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    record = json.loads((tmp_path / gpu_suite.RECORD).read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    for section in gpu_suite.sections(True):
        assert section.name in record and "skipped" not in record[section.name]
    machine = record["machine"]
    assert (
        machine["torch"] == torch.__version__ and machine["backends"]["triton"] is None and len(machine["commit"]) >= 7
    )

    for name in ("large", "latents", "sweep"):
        rows = record[name]["rows"]
        assert rows and record[name]["complete"] and not [row for row in rows if "error" in row]
        candidates = {row["candidate"] for row in rows}
        assert {"clone", "triton value_and_grad", "cpu value_and_grad"} <= candidates
        if name != "sweep":
            assert {"eager", "compiled", "triton autograd"} <= candidates
        assert all(row["share_of_copy"] > 0 for row in rows if "value_and_grad" in row["candidate"])
    assert all(row["wall_us"] > 0 for row in record["latents"]["rows"])
    assert {row["backend"] for row in record["host"]["rows"]} == {"triton", "cpu"}
    for model in ("sd15", "sdxl"):
        rows = record[model]["rows"]
        assert [row["loop"] for row in rows] == ["reference", "fdu"]
        for row in rows:
            assert row["step_s"] > 0 and row["loss_us"] > 0 and isinstance(row["peak_mib"], float)
    assert record["codegen"]["exit"] == 0 and "passed" in record["codegen"]["tail"][-1]


def section(tmp_path: Path, body: str, seconds: float) -> dict[str, Any]:
    """Run a section whose function has this body, and return its result."""
    (tmp_path / "imagined.py").write_text(
        f"import os, time\n\ndef run(plan):\n    plan.keep({{'rows': [1]}})\n    {body}\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        suite = gpu_suite.Suite(tmp_path, time.monotonic() + 60, rehearsal=True)
        outcome = suite.run(gpu_suite.Section("imagined", seconds, "imagined.run"))
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("imagined", None)
    kept = json.loads((tmp_path / gpu_suite.RECORD).read_text())["imagined"]
    assert outcome == kept.get("complete", True)
    return kept


def test_a_section_that_hangs_is_killed_and_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "GRACE", 0.2)
    kept = section(tmp_path, "time.sleep(60)", 1.0)
    assert kept["killed"] and not kept["complete"] and kept["rows"] == [1] and kept["seconds"] < 20


def test_a_section_that_dies_loses_no_other(tmp_path: Path) -> None:
    kept = section(tmp_path, "os._exit(6)", 5.0)
    assert kept["exit"] == 6 and not kept["complete"] and kept["rows"] == [1]


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "GRACE", 0.2)
    suite = gpu_suite.Suite(tmp_path, time.monotonic() + 60, rehearsal=True)
    script = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '61.5'])"
    assert not suite.run(gpu_suite.Section("hung", 2.0, command=(sys.executable, "-c", script)))
    assert suite.record["hung"]["exit"] is None and suite.record["hung"]["tail"] == ["begun"]
    end = time.monotonic() + 20  # a killed process stays in the table until somebody has collected it
    while (left := _running(b"61.5")) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def _running(argument: bytes) -> list[bytes]:
    """The command lines with this argument; those that end meanwhile are left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return [command for command in found if argument in command.split(b"\0")]


def test_without_time_nothing_starts(tmp_path: Path) -> None:
    suite = gpu_suite.Suite(tmp_path, time.monotonic() + 1)
    assert not suite.run(gpu_suite.Section("late", 10, command=("false",)))
    assert suite.record["late"] == {"skipped": "no time left"}


def test_unknown_sections_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--out", str(tmp_path), "--only", "lattents"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "lattents; there are build, machine" in done.stderr


def verdicts(record: dict[str, Any]) -> dict[str, str]:
    return {bound.what: bound.verdict for bound in gpu_bounds.bounds(record)}


def test_a_record_without_figures_waits() -> None:
    assert set(verdicts({}).values()) == {"waits"} and len(verdicts({})) == 13
    assert set(verdicts({"sanitizer": {"skipped": "its program is not installed"}}).values()) == {"waits"}


def test_a_record_that_keeps_all_promises_holds() -> None:
    assert set(verdicts(a_record()).values()) == {"holds"}
    by_name = {bound.what: bound for bound in gpu_bounds.bounds(a_record())}
    # Rate and memory are those of one run: the fastest of those that need little.
    assert by_name["step of Stable Diffusion 1.5: x the reference loop"].value == pytest.approx(3.1)
    assert by_name["step of Stable Diffusion 1.5: x the reference loop"].note == "fdu, sparing"


@pytest.mark.parametrize(
    "section, key, value, missed",
    [
        ("large", "share_of_copy", 0.89, 4),
        ("large", "extra_bytes", 2**29, 1),
        ("tests", "exit", 1, 1),
        ("sanitizer", "exit", None, 1),
    ],
)
def test_a_promise_that_is_not_kept_shows(section: str, key: str, value: Any, missed: int) -> None:
    record = a_record()
    for row in record[section].get("rows", [record[section]]):
        if key in row:
            row[key] = value
    assert list(verdicts(record).values()).count("fails") == missed


@pytest.mark.parametrize("section, figure, missed", [("latents", "wall_us", 2), ("large", "cold_us", 2)])
def test_the_slowest_shape_counts(section: str, figure: str, missed: int) -> None:
    record = a_record()
    slow = losses([64, 16, 128, 128], figure, {"eager": 12.0, "compiled": 12.0, "cuda value_and_grad": 10.0})
    record[section]["rows"] += slow
    assert list(verdicts(record).values()).count("fails") == missed
