"""Checks of the arguments, all made before any kernel runs.

Shapes, dtypes and devices are always checked. The values of tensors (sigma > 0, weight and mask >= 0) are checked on
the CPU only, in eager mode: on an accelerator, reading them would make the host wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdu_kernels.internals import is_plain

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype, other: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which sums are taken and values returned: float32, or float64 if one of the dtypes is."""
    return torch.float64 if dtype is torch.float64 or other is torch.float64 else torch.float32


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless it is a tensor of a supported floating dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}; pass torch.as_tensor({name})")
    if tensor.dtype not in DTYPES:
        parts = f"torch.view_as_real({name}), which keeps both parts as real numbers"
        remedy = parts if tensor.dtype.is_complex else f"{name}.float()"
        wanted = "float16, bfloat16, float32 or float64"
        raise TypeError(f"{name} must be {wanted}, not {_dtype(tensor)}; convert it with {remedy}")
    _check_dense(name, tensor)


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor, shape: bool = True) -> None:
    """Raise unless two tensors agree in device and (if asked) shape."""
    if shape and tensor.shape != other.shape:
        shapes = f"{name} is {list(tensor.shape)} and {other_name} {list(other.shape)}"
        raise ValueError(f"{name} and {other_name} must have equal shapes, but {shapes}; expand one explicitly")
    _check_device(name, tensor, other_name, other)


def check_batch(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor has a batch dimension with something in it."""
    if not (shape := tensor.shape) or shape[0] == 0:
        remedy = "skip the empty batch" if shape else f"add a batch dimension: {name}[None]"
        raise ValueError(f"{name} must have shape [B, ...] with B >= 1 samples, not {list(shape)}; {remedy}")


def check_sigma(sigma: float | Tensor, pred: Tensor) -> None:
    """Raise unless sigma is a positive number or a floating tensor [B] or []."""
    if type(sigma) is float and sigma > 0:
        return
    if isinstance(sigma, Tensor):
        _check_per_sample("sigma", sigma, pred, scalar=True)
        _check_values("sigma", sigma, positive=True)
    elif isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
        remedy = "GaussianDivergenceLoss takes 'auto'" if isinstance(sigma, str) else "pass torch.as_tensor(sigma)"
        raise TypeError(f"sigma must be a number or a tensor [B], not {type(sigma).__name__} {sigma!r}; {remedy}")
    elif not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma!r}; it is the standard deviation that scales s")


def check_sigma_scale(sigma_scale: Tensor, pred: Tensor) -> None:
    """Raise unless sigma_scale is a positive floating tensor [B]."""
    _check_per_sample("sigma_scale", sigma_scale, pred, remedy="a number for all samples is sigma")
    _check_values("sigma_scale", sigma_scale, positive=True)


def check_weight(weight: Tensor, batch: Tensor, name: str = "pred") -> None:
    """Raise unless weight is a non-negative floating tensor [B]."""
    if not isinstance(weight, Tensor):
        kind = type(weight).__name__
        raise TypeError(f"weight must be None or a tensor [B], not {kind}; pass torch.as_tensor(weight).expand(B)")
    _check_per_sample("weight", weight, batch, batch_name=name)
    _check_values("weight", weight)


def check_mask(mask: Tensor, tensor: Tensor, name: str = "pred") -> None:
    """Raise unless mask is a bool or non-negative floating tensor that broadcasts to the tensor's shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be None or a tensor, not {type(mask).__name__}; pass torch.as_tensor(mask)")
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        remedy = "convert it with mask.bool() or mask.float()"
        raise TypeError(f"mask must be bool or floating, not {_dtype(mask)}; {remedy}")
    _check_dense("mask", mask)
    shape, wanted = mask.shape, tensor.shape
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    if len(shape) > len(wanted) or any(size not in (1, full) for size, full in pairs):
        remedy = "give it the dimensions of one sample, [B, 1, H, W], or the full shape"
        raise ValueError(f"mask {list(shape)} does not broadcast to {name} {list(wanted)}; {remedy}")
    _check_device("mask", mask, name, tensor)
    if mask.dtype != torch.bool:
        _check_values("mask", mask)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {listed}, not {value!r}")


def check_grad_out(grad_out: Tensor, read: tuple[tuple[str, Any], ...], plain: bool) -> None:
    """Raise unless grad_out is a buffer like pred, outside autograd and in another storage than what is read."""
    pred = read[0][1]
    if not isinstance(grad_out, Tensor) or grad_out.dtype is not pred.dtype or grad_out.layout is not torch.strided:
        check_floating("grad_out", grad_out)
    check_same("grad_out", grad_out, "pred", pred)
    remedy = "pass torch.empty_like(pred)"
    if grad_out.dtype != pred.dtype:
        raise TypeError(f"grad_out must have the dtype of pred, {_dtype(pred)}, not {_dtype(grad_out)}; {remedy}")
    if grad_out.requires_grad:
        raise ValueError(f"grad_out is written in place and must not require grad; {remedy}")
    if plain:
        own = grad_out.untyped_storage()._cdata
        for name, tensor in read:
            if isinstance(tensor, Tensor) and own == tensor.untyped_storage()._cdata:
                shared = f"its storage with {name}, which is read while it is written"
                raise ValueError(f"grad_out must not share {shared}; {remedy}")
        if grad_out.is_neg():
            raise ValueError(f"grad_out must not have the negative bit; {remedy}")
    strides = grad_out.stride()
    if 0 in strides and any(not stride and size > 1 for size, stride in zip(grad_out.shape, strides, strict=True)):
        raise ValueError(f"grad_out must not be an expanded tensor, whose elements overlap; {remedy}")


def check_grad_scale(grad_scale: float | Tensor) -> None:
    """Raise unless grad_scale is a number or a floating tensor []."""
    if type(grad_scale) is float:
        return
    if isinstance(grad_scale, Tensor):
        if grad_scale.ndim:
            raise ValueError(f"grad_scale must be a number or a tensor [], not of shape {list(grad_scale.shape)}")
        check_floating("grad_scale", grad_scale)
    elif isinstance(grad_scale, bool) or not isinstance(grad_scale, (int, float)):
        raise TypeError(f"grad_scale must be a number or a tensor [], not {grad_scale!r}; pass float(grad_scale)")


def _check_per_sample(
    name: str, tensor: Tensor, batch: Tensor, scalar: bool = False, batch_name: str = "pred", remedy: str | None = None
) -> None:
    check_floating(name, tensor)
    if tensor.shape != batch.shape[:1] and not (scalar and tensor.ndim == 0):
        wanted = list(batch.shape[:1])
        remedy = remedy or f"reshape, reduce or expand it to {wanted}"
        raise ValueError(f"{name} must have one number per sample, shape {wanted}, not {list(tensor.shape)}; {remedy}")
    _check_device(name, tensor, batch_name, batch)


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        remedy = f"torch.nested.to_padded_tensor({name}, 0.0) and a mask" if tensor.is_nested else f"{name}.to_dense()"
        raise TypeError(f"{name} must be a dense tensor, not a nested or sparse one; pass {remedy}")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        places = f"{name} is on {tensor.device} and {other_name} on {other.device}"
        remedy = f"move it: {name}.to({other_name}.device)"
        raise ValueError(f"{name} and {other_name} must be on the same device, but {places}; {remedy}")


def _check_values(name: str, tensor: Tensor, positive: bool = False) -> None:
    """Raise for a value < 0, or <= 0, where values can be read."""
    if tensor.device.type == "cpu" and is_plain(tensor) and bool((tensor <= 0 if positive else tensor < 0).any()):
        bound = "be positive" if positive else "not be negative"
        raise ValueError(f"{name} must {bound}, but its smallest value is {tensor.min().item():g}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
