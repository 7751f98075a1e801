"""What a call costs the host at the size of latents, by part: ``pytest benchmarks/bench_host.py``.

The pieces are those of host_levels.py; they take turns, one thread, medians over rounds. The results of every piece's
inputs are checked against the reference before.

``test_before_and_after`` runs only with ``FDU_BEFORE=COMMIT``: it times this checkout and that commit in processes that
take turns, so that a change of the host's work is judged in one run. Each commit is timed by its own host_levels.py.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import host_levels
import pytest
import torch
from candidates import fused_backends
from pytest_benchmark.fixture import BenchmarkFixture

ROOT = Path(__file__).parents[1]
BEFORE = os.environ.get("FDU_BEFORE")
TURNS = 5
"""Processes of each commit."""


@pytest.mark.parametrize("shape", host_levels.SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("backend", fused_backends())
def test_parts(benchmark: BenchmarkFixture, backend: str, shape: tuple[int, ...]) -> None:
    """Checks, dispatch, allocation and launch of value_and_grad."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = benchmark.pedantic(
            host_levels.measure, (shape, backend, "cpu" if backend == "cpu" else "cuda"), rounds=1
        )
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(form="host", **found)


@pytest.mark.skipif(BEFORE is None, reason="FDU_BEFORE names no commit to compare with")
def test_before_and_after(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """This checkout's call against another commit's."""
    assert BEFORE is not None
    archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive, check=True)
    commits: dict[str, list[list[dict]]] = {"before": [], "after": []}

    def one_turn() -> None:
        for name, folder in (("before", tmp_path), ("after", ROOT)):
            done = subprocess.run(
                [sys.executable, str(folder / "benchmarks" / "host_levels.py"), "--rounds", "100"],
                env={**os.environ, "PYTHONPATH": str(folder)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            commits[name].append(json.loads(done.stdout))

    benchmark.pedantic(one_turn, rounds=TURNS)
    found = {
        name: {
            f"{'x'.join(map(str, shape))}, {piece}": statistics.median(turn[i]["medians_us"][piece] for turn in turns)
            for i, shape in enumerate(host_levels.SHAPES)
            for piece in ("call", "call with grad_out", "checks alone", "autograd, forward and backward")
        }
        for name, turns in commits.items()
    }
    benchmark.extra_info.update(form="host change", commit=BEFORE, **found)
