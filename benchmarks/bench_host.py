"""What a call costs the host at the size of latents, by part: ``pytest benchmarks/bench_host.py``.

The pieces are those of host_levels.py; they take turns, one thread, medians over rounds. The results of every piece's
inputs are checked against the reference before.

``test_before_and_after`` runs only with ``FDU_BEFORE=COMMIT``: it times this checkout and that commit in two processes
that take turns, so that a change of the host's work is judged in one run. Each commit is timed by its own
host_levels.py.
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
PROCESSES, TURNS = 5, 100
"""Of each commit, and of each process. A turn is 40 calls of each piece, so that both meet the same noise."""
PIECES = ("call", "call with grad_out", "autograd, forward and backward")
TAKES_TURNS = """
import json, sys, torch, host_levels
torch.set_num_threads(1)
calls = {}
for shape in host_levels.SHAPES:
    name = "x".join(map(str, shape))
    for piece, call in host_levels.pieces(torch.randn(shape), torch.randn(shape), "cpu").items():
        if piece in sys.argv[1:]:
            calls[f"{name}, {piece}"] = call
for line in sys.stdin:
    times = host_levels.microseconds(calls, 1, 40, lambda: None)
    print(json.dumps({name: taken[0] for name, taken in times.items()}), flush=True)
"""


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
    """This checkout's call against another commit's: medians, and the median of the ratios of turns."""
    assert BEFORE is not None
    archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive, check=True)
    turns: list[list[dict[str, float]]] = []

    def one_pair_of_processes() -> None:
        with _process(tmp_path) as before, _process(ROOT) as after:
            turns.extend([_turn(before), _turn(after)] for _ in range(TURNS))

    benchmark.pedantic(one_pair_of_processes, rounds=PROCESSES)
    found = {
        piece: {
            "before_us": statistics.median(before[piece] for before, _ in turns),
            "after_us": statistics.median(after[piece] for _, after in turns),
            "ratio": statistics.median(after[piece] / before[piece] for before, after in turns),
        }
        for piece in turns[0][0]
    }
    benchmark.extra_info.update(form="host change", commit=BEFORE, pieces=found)


def _process(folder: Path) -> subprocess.Popen[str]:
    """A process that times the pieces of a checkout whenever it reads a line."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'benchmarks'}"}
    command = [sys.executable, "-c", TAKES_TURNS, *PIECES]
    return subprocess.Popen(
        command, env=environment, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _turn(process: subprocess.Popen[str]) -> dict[str, float]:
    """Microseconds of each piece at each shape."""
    assert process.stdin is not None and process.stdout is not None
    print(file=process.stdin, flush=True)
    found: dict[str, float] = json.loads(process.stdout.readline())
    return found
