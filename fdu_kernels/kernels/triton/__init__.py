"""The backend "triton": fused kernels for NVIDIA, AMD and Intel GPUs, in float16, bfloat16 and float32.

Sums are taken in float32; a tabulated profile is read in float64. Under TRITON_INTERPRET=1 it runs on the CPU, slowly.
Triton is imported at the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from fdu_kernels.calls import Kind

FUSES_FORWARD = False
LEAST_CAPABILITY = (8, 0)
"""Ampere: NVIDIA's first with bfloat16 arithmetic."""


def why_unavailable() -> str | None:
    """Why it cannot run on this machine, or None."""
    return _why_unavailable(_interpreted())


def why_unsuitable(kind: Kind) -> str | None:
    """Why it cannot take calls of this kind, or None."""
    if reason := kind.why_not_fused():
        return reason
    device = kind.device
    if device.type == "cpu" and _interpreted():
        return None
    if device.type not in ("cuda", "xpu"):
        return f"its kernels run on CUDA, ROCm and Intel GPUs, not on {device.type}"
    module = torch.get_device_module(device)
    return _why_unusable(device.type, module.current_device() if device.index is None else device.index, kind.form)


def __getattr__(name: str) -> Any:
    """The six functions of a backend, from the modules of the two losses."""
    form, underscore, _ = name.partition("_")
    if form not in ("gaussian", "expectation") or not underscore:
        raise AttributeError(name)
    return globals().setdefault(name, getattr(importlib.import_module(f"{__name__}.{form}"), name))


@functools.cache
def _interpreted() -> bool:
    """Whether kernels are interpreted. Decided once, as Triton does when it decorates them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _why_unavailable(interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if interpreted:
        return None
    counts = {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}
    reasons = [_why_unusable(kind, index, "exponential") for kind, count in counts.items() for index in range(count)]
    if not reasons:
        built = torch.version.cuda or torch.version.hip or torch.version.xpu
        return "no CUDA, ROCm or Intel GPU" if built else "this PyTorch is built without CUDA, ROCm and XPU"
    return None if None in reasons else reasons[0]


@functools.cache
def _why_unusable(kind: str, index: int, form: str) -> str | None:
    """Why its kernels cannot run on a device."""
    if kind == "xpu":
        if form == "table" and not torch.xpu.get_device_properties(index).has_fp64:
            return f"xpu:{index} has no float64, in which a tabulated profile is read"
        return None
    if torch.version.hip is not None or (capability := torch.cuda.get_device_capability(index)) >= LEAST_CAPABILITY:
        return None
    found, wanted = (".".join(map(str, numbers)) for numbers in (capability, LEAST_CAPABILITY))
    return f"cuda:{index} has compute capability {found}, below {wanted}"
