"""The benchmark of the evaluation: what it draws, and that a missed bound shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import fdu

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_evaluation.py"


def test_a_missed_bound_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    described = importlib.util.spec_from_file_location("bench_evaluation", SCRIPT)
    assert described and described.loader
    benchmark: Any = importlib.util.module_from_spec(described)
    described.loader.exec_module(benchmark)

    def draw(pipeline: Any, probes: list[fdu.Probe], images: int, *others: Any, **named: Any) -> fdu.Draws:
        assert len({probe.name for probe in probes}) == 10
        return fdu.Draws([torch.rand(images, 3, 32, 32) for _ in probes])

    monkeypatch.setattr(fdu, "draw", draw)
    monkeypatch.setattr("sys.argv", ["bench_evaluation.py", "--images_per_class", "2", "--check"])
    assert benchmark.main() == 0
    assert "10 classes x 2 images, before and after; cpu" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "BOUND", 0.0)
    assert benchmark.main() == 1
    assert "beyond the bound of 0 s" in capsys.readouterr().err
