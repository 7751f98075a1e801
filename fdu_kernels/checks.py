"""Argument checks: every message names the argument, what was expected, what came, and the remedy.

Shapes, dtypes and devices are compared without a look at the data. The values of tensors are checked on the CPU only:
on a GPU the check would wait for the device at every call, and under torch.compile it would break the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "mean", "sum")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_floats(name: str, value: object) -> Tensor:
    """Raise TypeError unless ``value`` is a tensor of a floating dtype that the losses take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; wrap it in torch.as_tensor")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}; convert with .float()")
    return value


def check_pair(name: str, value: object, other_name: str, other: object) -> None:
    """Raise unless both are floating tensors of one shape, dtype and device."""
    first, second = check_floats(name, value), check_floats(other_name, other)
    if first.shape != second.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}; "
            "the losses do not broadcast them"
        )
    if first.dtype != second.dtype:
        raise TypeError(
            f"{name} and {other_name} must have one dtype, got {first.dtype} and {second.dtype}; convert one with .to()"
        )
    check_device(name, first, other_name, second)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise RuntimeError unless both are on one device."""
    if value.device != other.device:
        raise RuntimeError(
            f"{name} and {other_name} must be on one device, got {value.device} and {other.device}; move one with .to()"
        )


def check_samples(name: str, value: Tensor) -> None:
    """Raise ValueError unless there is a batch dimension."""
    if value.ndim < 1:
        raise ValueError(f"{name} must have a batch dimension, [B, ...], got a scalar; add one with [None]")


def check_per_sample(name: str, value: float | Tensor, like_name: str, like: Tensor, above_zero: bool) -> None:
    """Raise unless ``value`` is a number or a tensor [B] or [] that is > 0, or >= 0."""
    bound = "> 0" if above_zero else ">= 0"
    if isinstance(value, Tensor):
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating, got {value.dtype}; convert with .float()")
        if value.ndim and tuple(value.shape) != tuple(like.shape[:1]):
            raise ValueError(
                f"{name} must be a number or have shape ({like.shape[0]},), one value a sample of {like_name}, "
                f"got {tuple(value.shape)}"
            )
        if value.ndim:
            check_device(name, value, like_name, like)
        if _readable(value) and not bool(((value > 0) if above_zero else (value >= 0)).logical_or(value.isnan()).all()):
            raise ValueError(f"{name} must be {bound}, got {value.detach().min().item():g} as its smallest value")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    elif not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")


def check_mask(mask: object, like_name: str, like: Tensor) -> None:
    """Raise unless ``mask`` is a bool or non-negative floating tensor that broadcasts to ``like``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise TypeError(f"mask must be bool or floating, got {mask.dtype}; convert with .bool() or .float()")
    check_device("mask", mask, like_name, like)
    trailing = like.shape[like.ndim - mask.ndim :] if mask.ndim <= like.ndim else None
    if trailing is None or any(own not in (1, other) for own, other in zip(mask.shape, trailing, strict=True)):
        raise ValueError(
            f"mask must broadcast to the shape of {like_name}, {tuple(like.shape)}, got {tuple(mask.shape)}; "
            "give [H, W], [B, 1, H, W] or the full shape"
        )
    if mask.dtype != torch.bool and _readable(mask) and bool((mask < 0).any()):
        raise ValueError(f"mask must be >= 0, got {mask.min().item():g} as its smallest value")


def _readable(value: Tensor) -> bool:
    """Whether the values can be looked at without waiting for a device or breaking a graph."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()
