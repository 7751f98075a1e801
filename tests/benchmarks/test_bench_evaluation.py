"""The benchmark of the evaluation: what it draws, and that a missed bound shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_evaluation
import pytest
import report
import torch

import fdu


def test_a_missed_bound_shows_and_the_record_holds_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(pipeline: Any, probes: list[fdu.Probe], images: int, *others: Any, **named: Any) -> fdu.Draws:
        assert len({probe.name for probe in probes}) == 10
        return fdu.Draws([torch.rand(images, 3, 32, 32) for _ in probes])

    monkeypatch.setattr(fdu, "draw", draw)
    path = tmp_path / "evaluation" / "cpu.json"
    words = ["--images_per_class", "2", "--check", "--record", str(path)]
    monkeypatch.setattr("sys.argv", ["bench_evaluation.py", *words])
    assert bench_evaluation.main() == 0
    record = json.loads(path.read_text())
    assert (record["classes"], record["images_per_class"], len(record["seconds"])) == (10, 2, 3)
    page = report.performance(report.Records(tmp_path, "cpu"), tmp_path)
    assert "10 classes x 2 images" in page and "<= 120" in page and "fails" not in page
    assert "10 classes x 2 images, before and after; cpu" in capsys.readouterr().out
    monkeypatch.setattr(bench_evaluation, "BOUND", 0.0)
    assert bench_evaluation.main() == 1
    assert "fails" in capsys.readouterr().out
