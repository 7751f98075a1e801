"""One allocator for all competitors, competitors of your own, and what every record notes of the machine."""

from __future__ import annotations

import ctypes
import platform
import runpy
import sys
from typing import Any

import pytest
import torch

import fdu_kernels as fk

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, MAPPED = 1 << 30, 32 << 20
"""Bytes: what glibc keeps of freed memory at the top of its heap; the largest block that it takes from there."""


def keep_freed_memory() -> bool:
    """Have glibc keep it. By default what ran before decides whether a fresh output costs page faults."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and bool(
        library.mallopt(M_TRIM_THRESHOLD, KEPT) and library.mallopt(M_MMAP_THRESHOLD, MAPPED)
    )


KEEPS_FREED_MEMORY = keep_freed_memory()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--competitors``."""
    parser.addoption("--competitors", metavar="FILE", help="Python file that enters competitors (competitors.py)")


def pytest_configure(config: pytest.Config) -> None:
    """Enter them before tests are collected."""
    if config.getoption("--competitors"):
        runpy.run_path(config.getoption("--competitors"))


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """pytest-benchmark's own hook."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    machine_info.pop("node", None)  # the machine's name says nothing about its speed
    machine_info["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine_info["backends"] = fk.backends()
    machine_info["keeps_freed_memory"] = KEEPS_FREED_MEMORY


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep the statistics and not every single time."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
