"""Launches of the expectation kernels: one for up to a few thousand elements, else two.

A mean over a mask needs the mask's sum before the first gradient is written: torch.sum takes it, of the mask as it is
before broadcasting.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fdu_kernels.backends.triton import tuning
from fdu_kernels.backends.triton.expectation_kernels import expectation_kernel, expectation_total
from fdu_kernels.backends.triton.launch_gaussian import launching_on, scale_on
from fdu_kernels.backends.triton.layout import ALIGNED, UNALIGNED, broadcast_strides, collapse
from fdu_kernels.critic import CriticRow
from fdu_kernels.lowering import ElementFunction


def expectation(
    v: Tensor, function: ElementFunction, weight: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor:
    """See Kernels.expectation."""
    values = torch.empty_like(v, dtype=torch.float32) if reduction == "none" else None
    total = _run(v, function, weight, mask, reduction, values=values)
    return values if values is not None else total


def expectation_backward(
    v: Tensor,
    function: ElementFunction,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    upstream: Tensor,
) -> Tensor:
    """See Kernels.expectation_backward."""
    grad = torch.empty_like(v)
    if reduction == "none":
        _run(v, function, weight, mask, reduction, grad=grad, upstream=upstream, summed=False)
    else:
        _run(v, function, weight, mask, reduction, grad=grad, grad_scale=upstream, summed=False)
    return grad


def expectation_value_and_grad(
    v: Tensor,
    function: ElementFunction,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    grad_scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """See Kernels.expectation_value_and_grad."""
    values = torch.empty_like(v, dtype=torch.float32) if reduction == "none" else None
    grad = torch.empty_like(v)
    total = _run(v, function, weight, mask, reduction, values=values, grad=grad, grad_scale=grad_scale)
    return values if values is not None else total, grad


def _run(
    v: Tensor,
    function: ElementFunction,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    *,
    values: Tensor | None = None,
    grad: Tensor | None = None,
    upstream: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
    summed: bool = True,
) -> Tensor:
    """Fill values and grad; the reduced value, if summed and there are no values."""
    shape, size = tuple(v.shape), v.numel()
    summed = summed and values is None
    total, repeats, divisor = None, 1.0, 1.0
    if reduction == "mean" and mask is not None:
        total, repeats = mask.sum(dtype=torch.float32), size / max(mask.numel(), 1)
    elif reduction == "mean":
        divisor = float(size)
    factor, factor_strides = mask, None if mask is None else broadcast_strides(mask, shape)
    if weight is not None:
        factor, factor_strides = weight, (weight.stride(0), *[0] * (v.ndim - 1))

    tensors = [tensor for tensor in (v, values, grad) if tensor is not None]
    others = [] if factor_strides is None else [factor_strides]
    if upstream is not None:
        others.append(upstream.stride())
    layout = collapse(shape, tuple(tensor.stride() for tensor in tensors), tuple(others))
    if layout is None:
        return _run_on_copies(
            v, function, weight, mask, reduction, values=values, grad=grad, upstream=upstream, grad_scale=grad_scale,
            summed=summed,
        )  # fmt: skip
    strides = iter(layout.strides)
    each = [next(strides) if tensor is not None else () for tensor in (v, values, grad, factor, upstream)]
    vector = 16 // v.element_size()
    align = ALIGNED if layout.linear and size % vector == 0 else UNALIGNED
    split = tuning.expectation(size)
    partials = v.new_empty(split.parts, dtype=torch.float32) if summed else None
    scale, number = scale_on(grad_scale, v.device) if grad is not None else (None, None)
    first, second = _rows(function)
    with launching_on(v.device):
        expectation_kernel[(split.parts,)](
            v, values, grad, factor, upstream, partials, total, repeats, divisor, scale, number, first, second,
            float(function.limit), float(function.slope), size, layout.sizes, *each, split.blocks, split.block,
            layout.linear, layout.dims, align, vector, layout.wide, num_warps=split.warps,
            maxnreg=tuning.EXPECTATION_REGISTERS,
        )  # fmt: skip
        if partials is None:
            return v.new_empty(0, dtype=torch.float32)
        if split.parts == 1:
            return partials.reshape(())
        result = v.new_empty((), dtype=torch.float32)
        expectation_total[(1,)](
            partials, result, total, repeats, divisor, split.parts, tuning.PARTIALS_BLOCK, num_warps=tuning.FINISH_WARPS
        )
    return result


def _run_on_copies(
    v: Tensor,
    function: ElementFunction,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    *,
    values: Tensor | None,
    grad: Tensor | None,
    upstream: Tensor | None,
    grad_scale: float | Tensor,
    summed: bool,
) -> Tensor:
    """For strides that need more than MAX_DIMS dimensions."""
    if mask is not None:
        mask = mask.expand(v.shape).contiguous()
    own_values = None if values is None else torch.empty(v.shape, dtype=values.dtype, device=v.device)
    own_grad = None if grad is None else torch.empty(v.shape, dtype=grad.dtype, device=v.device)
    result = _run(
        v.contiguous(), function, weight, mask, reduction, values=own_values, grad=own_grad,
        upstream=None if upstream is None else upstream.contiguous(), grad_scale=grad_scale, summed=summed,
    )  # fmt: skip
    for tensor, own in ((values, own_values), (grad, own_grad)):
        if tensor is not None and own is not None:
            tensor.copy_(own)
    return result


@functools.lru_cache(maxsize=1024)
def _rows(function: ElementFunction) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return _row(function.first, function.first_tilt), _row(function.second, function.second_tilt)


def _row(row: CriticRow, tilt: float) -> tuple[float, ...]:
    """In the order of expectation_kernels.py; what would lose digits in float32 is computed here."""
    numbers = (
        tilt, row.const, row.linear, row.square, row.exp, row.exp_rate + tilt, row.exp_rate, row.expm1, row.expm1_rate,
        row.softplus, row.sigmoid, row.tanh, row.tanh_squared, row.scale, row.mix, row.rest_of_mix,
        row.logit, row.step, row.threshold,
    )  # fmt: skip
    return tuple(float(number) for number in numbers)
