"""One allocator for all candidates, and what every record notes: versions, threads, device, backends."""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

import torch

import fdu_kernels as fk

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, MAPPED = 1 << 30, 32 << 20
"""Bytes: what glibc keeps of freed memory at the top of its heap; the most it takes from there and not anew."""


def keep_freed_memory() -> bool:
    """Have glibc keep it. By default it depends on what ran before whether a fresh output costs page faults."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and bool(
        library.mallopt(M_TRIM_THRESHOLD, KEPT) and library.mallopt(M_MMAP_THRESHOLD, MAPPED)
    )


KEEPS_FREED_MEMORY = keep_freed_memory()


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
