"""What every record of a benchmark notes beside its figures: versions, threads, device and the backends at hand."""

from __future__ import annotations

import platform
from typing import Any

import torch

import fdu_kernels as fk


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
