"""Launches of the expectation kernels: one for up to a few thousand elements, else two.

A mean over a mask needs the mask's sum before the first gradient is written: torch.sum takes it, of the mask as it is
before broadcasting.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fdu_kernels.calls import ExpectationCall
from fdu_kernels.critic import CriticRow, ElementFunction
from fdu_kernels.kernels.triton import tuning
from fdu_kernels.kernels.triton.expectation_kernels import expectation_kernel, expectation_total
from fdu_kernels.kernels.triton.launch_gaussian import launching_on, scale_on
from fdu_kernels.kernels.triton.layout import ALIGNED, UNALIGNED, broadcast_strides, collapse


def expectation_forward(call: ExpectationCall) -> Tensor:
    """See Backend.expectation_forward."""
    values = torch.empty_like(call.v, dtype=torch.float32) if call.reduction == "none" else None
    total = _run(call, values, None, None, summed=values is None)
    return total if values is None else values


def expectation_backward(call: ExpectationCall, upstream: Tensor) -> Tensor:
    """See Backend.expectation_backward."""
    grad, elementwise = torch.empty_like(call.v), call.reduction == "none"
    if not elementwise:
        call.grad_scale = upstream
    _run(call, None, grad, upstream if elementwise else None, summed=False)
    return grad


def expectation_value_and_grad(call: ExpectationCall) -> tuple[Tensor, Tensor]:
    """See Backend.expectation_value_and_grad."""
    values = torch.empty_like(call.v, dtype=torch.float32) if call.reduction == "none" else None
    grad = torch.empty_like(call.v)
    total = _run(call, values, grad, None, summed=values is None)
    return total if values is None else values, grad


def _run(
    call: ExpectationCall, values: Tensor | None, grad: Tensor | None, upstream: Tensor | None, summed: bool
) -> Tensor:
    """Fill values and grad; the reduced value, if summed."""
    v, mask, shape, size = call.v, call.mask, tuple(call.v.shape), call.v.numel()
    total, repeats, divisor = None, 1.0, 1.0
    if call.reduction == "mean" and mask is not None:
        total, repeats = mask.sum(dtype=torch.float32), size / max(mask.numel(), 1)
    elif call.reduction == "mean":
        divisor = float(size)
    factor, factor_strides = mask, None if mask is None else broadcast_strides(mask, shape)
    if call.weight is not None:
        factor, factor_strides = call.weight, (call.weight.stride(0), *[0] * (v.ndim - 1))

    tensors = [tensor for tensor in (v, values, grad) if tensor is not None]
    others = [] if factor_strides is None else [factor_strides]
    if upstream is not None:
        others.append(upstream.stride())
    layout = collapse(shape, tuple(tensor.stride() for tensor in tensors), tuple(others))
    if layout is None:
        return _run_on_copies(call, values, grad, upstream, summed)
    strides = iter(layout.strides)
    each = [next(strides) if tensor is not None else () for tensor in (v, values, grad, factor, upstream)]
    vector = 16 // v.element_size()
    align = ALIGNED if layout.linear and size % vector == 0 else UNALIGNED
    split = tuning.expectation(size)
    partials = v.new_empty(split.parts, dtype=torch.float32) if summed else None
    scale, number = scale_on(call.grad_scale, v.device) if grad is not None else (None, None)
    function, target = call.function, tuning.target_of(v.device)
    assert isinstance(function, ElementFunction), "why_unsuitable refuses Python code"
    first, second = _rows(function)
    with launching_on(v.device):
        expectation_kernel[(split.parts,)](
            v, values, grad, factor, upstream, partials, total, repeats, divisor, scale, number, first, second,
            float(function.limit), float(function.slope), size, layout.sizes, *each, split.blocks, split.block,
            layout.linear, layout.dims, align, vector, layout.wide,
            **target.options(split.warps, tuning.EXPECTATION_REGISTERS),
        )  # fmt: skip
        if partials is None:
            return v.new_empty(0, dtype=torch.float32)
        if split.parts == 1:
            return partials.reshape(())
        result = v.new_empty((), dtype=torch.float32)
        expectation_total[(1,)](
            partials, result, total, repeats, divisor, split.parts, tuning.PARTIALS_BLOCK,
            **target.options(tuning.FINISH_WARPS),
        )  # fmt: skip
    return result


def _run_on_copies(
    call: ExpectationCall, values: Tensor | None, grad: Tensor | None, upstream: Tensor | None, summed: bool
) -> Tensor:
    """For strides that need more than MAX_DIMS dimensions."""
    mask = None if call.mask is None else call.mask.expand(call.v.shape).contiguous()
    copy = ExpectationCall(call.v.contiguous(), call.function, call.weight, mask, call.reduction, call.grad_scale)
    own_values, own_grad = (
        None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (values, grad)
    )
    result = _run(copy, own_values, own_grad, None if upstream is None else upstream.contiguous(), summed)
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
        row.softplus, row.sigmoid, row.tanh, row.tanh_squared, row.scale, row.mix, row.rest_of_mix, row.logit, row.step,
        row.threshold,
    )  # fmt: skip
    return tuple(float(number) for number in numbers)
