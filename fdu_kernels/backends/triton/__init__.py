"""The Triton backend: fused kernels for CUDA devices, in float16, bfloat16 and float32; see backends/kernels.py.

Sums are taken in float32; a tabulated profile is read in float64. Under TRITON_INTERPRET=1 it runs on the CPU, slowly.
Triton is imported at the first call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from fdu_kernels.lowering import ElementFunction, GaussianProfile

FUSES_FORWARD = False
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 arithmetic."""


def why_unavailable() -> str | None:
    """Why it cannot run on this machine, or None."""
    return _why_unavailable(_interpreted())


def why_unsuitable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot take tensors of this kind, or None."""
    if dtype not in DTYPES:
        return f"it computes in float32 and does not take {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        return _why_too_old(device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "cpu" and _interpreted():
        return None
    return f"its kernels run on CUDA devices, not on {device.type}"


def gaussian_forward(
    pred: Tensor,
    target: Tensor,
    profile: GaussianProfile,
    sigma: float | Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
) -> tuple[Tensor, Tensor]:
    """See :meth:`fdu_kernels.backends.kernels.Kernels.gaussian_forward`."""
    loss, coefficient = _gaussian().gaussian_forward(pred, target, profile, sigma, weight, mask, distance)
    return loss, coefficient


def gaussian_backward(pred: Tensor, target: Tensor, mask: Tensor | None, coefficient: Tensor) -> Tensor:
    """See :meth:`fdu_kernels.backends.kernels.Kernels.gaussian_backward`."""
    grad: Tensor = _gaussian().gaussian_backward(pred, target, mask, coefficient)
    return grad


def gaussian_value_and_grad(
    pred: Tensor,
    target: Tensor,
    profile: GaussianProfile,
    sigma: float | Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
    reduction: str,
    grad_scale: float | Tensor,
    grad_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :meth:`fdu_kernels.backends.kernels.Kernels.gaussian_value_and_grad`."""
    value, grad = _gaussian().gaussian_value_and_grad(
        pred, target, profile, sigma, weight, mask, distance, reduction, grad_scale, grad_out
    )
    return value, grad


def expectation(
    v: Tensor, function: ElementFunction, weight: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor:
    """See :meth:`fdu_kernels.backends.kernels.Kernels.expectation`."""
    value: Tensor = _expectation().expectation(v, function, weight, mask, reduction)
    return value


def expectation_backward(
    v: Tensor,
    function: ElementFunction,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    upstream: Tensor,
) -> Tensor:
    """See :meth:`fdu_kernels.backends.kernels.Kernels.expectation_backward`."""
    grad: Tensor = _expectation().expectation_backward(v, function, weight, mask, reduction, upstream)
    return grad


def expectation_value_and_grad(
    v: Tensor,
    function: ElementFunction,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    grad_scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """See :meth:`fdu_kernels.backends.kernels.Kernels.expectation_value_and_grad`."""
    value, grad = _expectation().expectation_value_and_grad(v, function, weight, mask, reduction, grad_scale)
    return value, grad


@functools.cache
def _gaussian() -> ModuleType:
    from fdu_kernels.backends.triton import launch_gaussian

    return launch_gaussian


@functools.cache
def _expectation() -> ModuleType:
    from fdu_kernels.backends.triton import launch_expectation

    return launch_expectation


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
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    reasons = [_why_too_old(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.cache
def _why_too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    wanted = ".".join(map(str, LEAST_CAPABILITY))
    return f"cuda:{index} has compute capability {'.'.join(map(str, capability))}, below {wanted}"
