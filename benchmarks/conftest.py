"""Options of the benchmarks that run under pytest, the record they write, and one allocator for all competitors."""

from __future__ import annotations

import ctypes
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import records
import timing

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, MAPPED = 1 << 30, 32 << 20
"""Bytes: what glibc keeps of freed memory at the top of its heap; the largest block that it takes from there."""
ROWS = pytest.StashKey[dict[str, list[records.Row]]]()
"""The rows by suite."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--competitors`` and ``--record``."""
    parser.addoption("--competitors", metavar="FILE", help="Python file that enters competitors (competitors.py)")
    parser.addoption("--record", type=Path, metavar="FILE", help="JSON file whose part of this suite to write")


def pytest_configure(config: pytest.Config) -> None:
    """Set the allocator, and enter competitors before tests are collected."""
    # By default, what ran before decides whether a fresh output costs page faults.
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(library, "mallopt"):
        library.mallopt(M_TRIM_THRESHOLD, KEPT)
        library.mallopt(M_MMAP_THRESHOLD, MAPPED)
    config.stash[ROWS] = {}
    if config.getoption("--competitors"):
        runpy.run_path(config.getoption("--competitors"))


@pytest.fixture(autouse=True)
def _row(request: pytest.FixtureRequest, benchmark: timing.BenchmarkFixture) -> Iterator[None]:
    """Keep the figures in ``benchmark.extra_info`` as a row of the record."""
    yield
    if benchmark.extra_info:
        suite = request.path.stem.removeprefix("bench_")
        request.config.stash[ROWS].setdefault(suite, []).append(benchmark.extra_info)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record."""
    path = session.config.getoption("--record")
    for suite, rows in session.config.stash[ROWS].items():
        if path:
            records.keep(path, suite, rows=rows)
