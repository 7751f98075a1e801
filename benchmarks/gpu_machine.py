"""What a GPU record says of its machine: device, driver, versions, commit."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import gpu_timing
import torch
from gpu_timing import Plan

import fdu_kernels as fk

HERE = Path(__file__).parent


def machine(plan: Plan) -> None:
    """Device, driver, versions, commit."""
    described: dict[str, Any] = {
        "device": "CPU, rehearsal",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        **source(),
        "date": time.strftime("%Y-%m-%d"),
        "nvcc": _output(["nvcc", "--version"]).splitlines()[-1:],
        "driver": _output(["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.mem", "--format=csv,noheader"]),
        "backends": fk.backends(),
    }
    if plan.device == "cuda":
        of = torch.cuda.get_device_properties(0)
        described.update(device=of.name, multiprocessors=of.multi_processor_count)
        described.update(l2_bytes=of.L2_cache_size, memory_bytes=of.total_memory)
    plan.write(described)  # the imports below may take all the time that is left
    for package in ("triton", "diffusers", "transformers", "peft", "accelerate"):
        try:
            described[package] = importlib.import_module(package).__version__
        except Exception:  # diffusers says by a RuntimeError that it cannot be imported
            described[package] = None
    plan.write(described)


def source() -> dict[str, Any]:
    """The commit, and whether files have changed since; None: nobody knows."""
    head = _output(["git", "rev-parse", "HEAD"])
    changed = bool(_output(["git", "status", "--porcelain", "--untracked-files=no"])) if head else None
    return {"commit": os.environ.get("FDU_COMMIT") or head, "changed": changed}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    gpu_timing.main({"machine": machine})
