"""Launches of the expectation kernels: one for up to a few thousand elements, else two.

torch.sum takes the sum of a mask first, before broadcasting.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fdu_kernels.calls import ExpectationCall
from fdu_kernels.critic import ElementFunction, sigmoid
from fdu_kernels.kernels.triton import expectation_kernels, tuning
from fdu_kernels.kernels.triton.launch_gaussian import launching_on, scale_on
from fdu_kernels.kernels.triton.layout import ALIGNED, UNALIGNED, broadcast_strides, collapse


def expectation_forward(call: ExpectationCall) -> Tensor:
    """See Backend.expectation_forward."""
    return _run(call, gradient=False)[0]


def expectation_backward(call: ExpectationCall, upstream: Tensor) -> Tensor:
    """See Backend.expectation_backward."""
    each = call.reduction == "none"
    return _run(call, 1.0 if each else upstream, upstream if each else None, value=False)[1]


def expectation_value_and_grad(call: ExpectationCall) -> tuple[Tensor, Tensor]:
    """See Backend.expectation_value_and_grad."""
    return _run(call, call.grad_scale)


def _run(
    call: ExpectationCall, grad_scale: float | Tensor = 1.0, upstream: Tensor | None = None, value: bool = True,
    gradient: bool = True,
) -> tuple[Any, Any]:  # fmt: skip
    """The value and the gradient, or None where not asked for; ``upstream``: every element's, besides grad_scale."""
    v, mask, shape, size = call.v, call.mask, tuple(call.v.shape), call.v.numel()
    values = torch.empty_like(v, dtype=torch.float32) if value and call.reduction == "none" else None
    grad = torch.empty_like(v) if gradient else None
    factor, factor_strides = mask, None if mask is None else broadcast_strides(mask, shape)
    if call.weight is not None:
        factor, factor_strides = call.weight, (call.weight.stride(0), *[0] * (v.ndim - 1))
    data = tuple(tensor.stride() for tensor in (v, values, grad) if tensor is not None)
    others = () if factor_strides is None else (factor_strides,)
    layout = collapse(shape, data, others if upstream is None else (*others, upstream.stride()))
    if layout is None:  # more than MAX_DIMS dimensions
        mask = None if mask is None else mask.expand(shape).contiguous()
        copy = ExpectationCall(v.contiguous(), call.function, call.weight, mask, call.reduction)
        return _run(copy, grad_scale, None if upstream is None else upstream.contiguous(), value, gradient)

    over: tuple[Tensor | None, float, float] = (None, 1.0, float(size) if call.reduction == "mean" else 1.0)
    if call.reduction == "mean" and mask is not None:
        over = (mask.sum(dtype=torch.float32), size / max(mask.numel(), 1), 1.0)
    tensors = (v, values, grad, factor, upstream)
    own = iter(layout.strides)
    strides = tuple(() if tensor is None else next(own) for tensor in tensors)
    vector = 16 // v.element_size()
    align = ALIGNED if layout.linear and size % vector == 0 else UNALIGNED
    split, target = tuning.expectation(size), tuning.target_of(v.device)
    partials = v.new_empty(split.parts, dtype=torch.float32) if value and values is None else None
    scale = (None, None) if grad is None else scale_on(grad_scale, v.device)
    function = call.function
    assert isinstance(function, ElementFunction), "why_unsuitable refuses Python code"
    with launching_on(v.device):
        expectation_kernels.expectation_kernel[(split.parts,)](
            tensors, strides, partials, over, scale, (*_rows(function), float(function.limit), float(function.slope)),
            size, layout.sizes, split.blocks, split.block, layout.linear, layout.dims, align, vector, layout.wide,
            **target.options(split.warps, tuning.EXPECTATION_REGISTERS),
        )  # fmt: skip
        if partials is None:
            return values, grad
        if split.parts == 1:
            return partials.reshape(()), grad
        result = v.new_empty((), dtype=torch.float32)
        expectation_kernels.expectation_total[(1,)](
            partials, result, over, split.parts, tuning.TOTAL_BLOCK, **target.options(tuning.TOTAL_WARPS)
        )
    return result, grad


@functools.lru_cache(maxsize=1024)
def _rows(function: ElementFunction) -> tuple[tuple[float, ...], ...]:
    """In the order of expectation_kernels.py; what would lose digits in float32 is computed here."""
    rows = (
        (
            tilt, row.const, row.linear, row.square, row.exp, row.exp_rate + tilt, row.exp_rate, row.expm1,
            row.expm1_rate, row.softplus, row.sigmoid, row.tanh, row.tanh_squared, row.scale, sigmoid(row.logit),
            sigmoid(-row.logit), row.logit, row.step, row.threshold,
        )
        for row, tilt in ((function.first, function.first_tilt), (function.second, function.second_tilt))
    )  # fmt: skip
    return tuple(tuple(map(float, row)) for row in rows)
