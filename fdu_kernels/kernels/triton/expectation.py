"""The expectation of a function of the density-ratio estimate: its kernels and their launches.

One launch serves up to a few thousand elements, two serve more. torch.sum takes the sum of a mask first, before
broadcasting.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdu_kernels.calls import ExpectationCall
from fdu_kernels.critic import DERIVATIVE, ElementFunction, sigmoid
from fdu_kernels.kernels.triton import tuning
from fdu_kernels.kernels.triton.gaussian import launching_on, scale_on
from fdu_kernels.kernels.triton.layout import ALIGNED, UNALIGNED, broadcast_strides, collapse
from fdu_kernels.kernels.triton.scalars import (
    addresses,
    bounded_exp,
    exp,
    expm1,
    falling_exp,
    logarithm,
    reciprocal,
    shifted_softplus,
    store,
)

FIRST = tl.constexpr(1.0)
"""As in fdu_kernels.critic."""
ANY, SOFTPLUS, EXPONENTIALS = (tl.constexpr(i) for i in range(3))
"""The kinds of functions that a kernel is compiled for: any; one row, whose derivative is the slope, with nothing
but a softplus of logit 0; or one of powers of v and exponentials, with a finite limit."""


@triton.jit
def _exponentials(v: tl.tensor, row: tl.tuple) -> tuple[tl.tensor, tl.tensor]:
    """row(v) and row'(v) of a row of the kind EXPONENTIALS."""
    (
        _tilt, const, linear, square, exponential, _tilted_exp_rate, exp_rate, minus_one, expm1_rate,
        _softplus, _sigmoid, _tanh, _tanh_squared, _scale, _mix, _rest_of_mix, _logit, _step, _threshold,
    ) = row  # fmt: skip
    value = const + v * (linear + square * v)
    slope = linear + 2.0 * square * v
    if exponential != 0.0:
        term = exponential * bounded_exp(exp_rate * v)
        value += term
        slope += exp_rate * term
    if minus_one != 0.0:
        x = expm1_rate * v
        power = bounded_exp(x)
        value += minus_one * expm1(x, power)
        slope += minus_one * expm1_rate * power
    return value, slope


@triton.jit
def _row(v: tl.tensor, row: tl.tuple) -> tl.tensor:
    """e^(tilt v) row(v), as fdu_kernels.critic.CriticRow.value; terms without a coefficient are skipped."""
    (
        tilt, const, linear, square, exponential, tilted_exp_rate, _exp_rate, minus_one, expm1_rate,
        softplus, sigmoid, tanh, tanh_squared, scale, mix, rest_of_mix, logit, step, threshold,
    ) = row  # fmt: skip
    # A term without a coefficient is none, also at infinity; a NaN stays one, whatever the terms.
    result = const + tl.where(v == v, 0.0, v)
    if (linear != 0.0) | (square != 0.0):
        result += v * (linear + square * v)
    if softplus != 0.0:
        x = scale * v
        if logit == 0.0:
            part = shifted_softplus(x, falling_exp(x))
        else:
            # Which of 1 - mix and mix e^x is the larger one decides: else x and the logarithm would cancel.
            above = x + logit > 0.0
            exponent = tl.where(above, -x, x)
            near, far = tl.where(above, mix, rest_of_mix), tl.where(above, rest_of_mix, mix)
            power = exp(exponent)
            part = tl.where(above, x, 0.0) + logarithm(near + far * power, far * expm1(exponent, power))
        result += softplus * part
    if sigmoid != 0.0:
        sigma, _ = _sigmoids(scale * v + logit)
        result += sigmoid * sigma
    if (tanh != 0.0) | (tanh_squared != 0.0):
        x = scale * v + logit
        # Not a difference of sigmoids: near 0 it would have no digits.
        less_one = expm1(-tl.abs(x), falling_exp(x))
        part = tl.where(x < 0.0, less_one, -less_one) / (2.0 + less_one)
        result += part * (tanh + tanh_squared * part)
    if step != 0.0:
        result += step * tl.where(v > threshold, 1.0, tl.where(v < threshold, 0.0, 0.5))
    if tilt != 0.0:
        result *= bounded_exp(tilt * v)
    # The tilt joins each exponential's exponent.
    if exponential != 0.0:
        result += exponential * bounded_exp(tilted_exp_rate * v)
    if minus_one != 0.0:
        x = expm1_rate * v
        less_one = expm1(-tl.abs(x), falling_exp(x))
        result += minus_one * tl.where(x > 0.0, -less_one, less_one) * bounded_exp(tilt * v + tl.where(x > 0.0, x, 0.0))
    return result


@triton.jit
def _row_slope(v: tl.tensor, row: tl.tuple) -> tl.tensor:
    """row'(v), as fdu_kernels.critic.CriticRow.slope."""
    (
        _tilt, _const, linear, square, exponential, _tilted_exp_rate, exp_rate, minus_one, expm1_rate,
        softplus, sigmoid, tanh, tanh_squared, scale, _mix, _rest_of_mix, logit, _step, _threshold,
    ) = row  # fmt: skip
    result = linear + tl.where(v == v, 0.0, v)
    if square != 0.0:
        result += 2.0 * square * v
    if exponential != 0.0:
        result += exponential * exp_rate * bounded_exp(exp_rate * v)
    if minus_one != 0.0:
        result += minus_one * expm1_rate * bounded_exp(expm1_rate * v)
    if (softplus != 0.0) | (sigmoid != 0.0) | (tanh != 0.0) | (tanh_squared != 0.0):
        sigma, rest = _sigmoids(scale * v + logit)
        inner = softplus * sigma + (softplus + sigmoid) * rest
        # T' = 2 sigma rest and T = sigma - rest: so the two terms of le_cam's A and B cancel exactly.
        above, below = tanh + 2.0 * tanh_squared, tanh - 2.0 * tanh_squared
        result += scale * sigma * (inner + 2.0 * rest * (above * sigma + below * rest))
    return result


@triton.jit
def _sigmoids(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """sigmoid(x) and sigmoid(-x)."""
    z = falling_exp(x)
    large = reciprocal(1.0 + z)
    small = z * large
    return tl.where(x < 0.0, small, large), tl.where(x < 0.0, large, small)


@triton.jit
def _evaluate(
    v: tl.tensor, first: tl.tuple, second: tl.tuple, limit: tl.tensor, kind: tl.tensor, SLOPE: tl.constexpr,
    KIND: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """y(v) and, where it is asked for or counts, y'(v); see fdu_kernels.critic.ElementFunction. Of a SOFTPLUS both lack
    their coefficients, which _gains gives."""
    if KIND == SOFTPLUS:
        x = first[13] * v
        z = falling_exp(x)
        value = shifted_softplus(x, z)
        slope = tl.where(x > 0.0, 1.0, z) * reciprocal(1.0 + z)
    else:
        inside = tl.where(v > limit, limit, tl.where(v < -limit, -limit, v))
        if KIND == EXPONENTIALS:
            value, slope = _exponentials(inside, first)
        else:
            value = _row(inside, first)
            slope = value
            if kind != 0.0:
                other = _row(inside, second)
                if kind != FIRST:
                    slope = other
                value -= other
            elif SLOPE:
                slope = _row_slope(inside, first)
            elif limit < float("inf"):
                slope = _row_slope(inside, first)
        # Not where nothing was clamped: 0 times an infinite slope is no 0.
        value = tl.where(inside == v, value, value + slope * (v - inside))
    return value, slope


@triton.jit
def _gains(first: tl.tuple, KIND: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """What the value and the slope of _evaluate are multiplied by."""
    value = tl.full([], 1.0, tl.float32)
    slope = value
    if KIND == SOFTPLUS:
        value *= first[9]
        slope = value * first[13]
    return value, slope


@triton.jit
def _divisor(over: tl.tuple) -> tl.tensor:
    """What a mean divides by: the number of elements, or the mask's sum, or 1 instead of 0."""
    total, repeats, number = over
    if total is None:
        result = tl.full([], 0.0, tl.float32) + number
    else:
        result = tl.load(total).to(tl.float32) * repeats
        result = tl.where(result == 0.0, 1.0, result)
    return result


@triton.jit
def _load_block(pointers: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Guarded only where fewer elements than a block are left; the branch is the same for all threads."""
    if left >= BLOCK:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=tl.arange(0, BLOCK) < left, other=0)
    return values.to(tl.float32)


@triton.jit
def _store_block(pointers: tl.tensor, values: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr) -> None:
    if left >= BLOCK:
        store(pointers, values, None)
    else:
        store(pointers, values, tl.arange(0, BLOCK) < left)


@triton.jit(do_not_specialize=["size", "blocks"])
def expectation_kernel(
    tensors: tl.tuple, strides: tl.tuple, partials: tl.tensor, over: tl.tuple, scale: tl.tuple, function: tl.tuple,
    size: tl.tensor, sizes: tl.tuple, blocks: tl.tensor, BLOCK: tl.constexpr, LINEAR: tl.constexpr,
    DIMS: tl.constexpr, ALIGN: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Of values (every element's), grad and partials (sums) those that are not None; a single partial is final.

    tensors: v, values, grad, what both are multiplied by (a weight or mask), and what the gradient is (upstream).
    over: see _divisor. scale: a tensor and a number. function: rows, limit and kind of an ElementFunction.
    """
    v, values, grad, factor, upstream = tensors
    first, second, limit, kind = function
    program = tl.program_id(0)
    size = size.to(tl.int64)
    if ALIGN == 1:
        size = size // VECTOR * VECTOR
    sums = tl.zeros([BLOCK], tl.float32)
    divisor = _divisor(over)
    gain, multiplier = _gains(first, KIND)
    if grad is not None:
        number = scale[1] * multiplier
        if scale[0] is not None:
            number *= tl.load(scale[0]).to(tl.float32)
        multiplier = tl.div_rn(number, divisor)
    begin = program.to(tl.int64) * blocks
    end = tl.minimum(begin + blocks, (size + BLOCK - 1) // BLOCK)
    for block in range(begin, end):
        start = block * BLOCK
        zero = start - start
        left = tl.minimum(size - start, BLOCK).to(tl.int32)
        x = _load_block(addresses(v, zero, start, sizes, strides[0], BLOCK, LINEAR, DIMS, WIDE), left, BLOCK)
        value, slope = _evaluate(x, first, second, limit, kind, grad is not None, KIND)
        slope *= multiplier
        if factor is not None:
            pointers = addresses(factor, zero, start, sizes, strides[3], BLOCK, DIMS == 0, DIMS, WIDE)
            weight = _load_block(pointers, left, BLOCK)
            value *= weight
            slope *= weight
        if upstream is not None:
            pointers = addresses(upstream, zero, start, sizes, strides[4], BLOCK, DIMS == 0, DIMS, WIDE)
            slope *= _load_block(pointers, left, BLOCK)
        if values is not None:
            pointers = addresses(values, zero, start, sizes, strides[1], BLOCK, LINEAR, DIMS, WIDE)
            _store_block(pointers, gain * value, left, BLOCK)
        if partials is not None:
            if left < BLOCK:
                value = tl.where(tl.arange(0, BLOCK) < left, value, 0.0)
            sums += value
        if grad is not None:
            pointers = addresses(grad, zero, start, sizes, strides[2], BLOCK, LINEAR, DIMS, WIDE)
            _store_block(pointers, slope, left, BLOCK)
    if partials is not None:
        result = gain * tl.sum(sums)
        if tl.num_programs(0) == 1:
            result = tl.div_rn(result, divisor)
        tl.store(partials + program, result)


@triton.jit(do_not_specialize=["parts"])
def expectation_total(
    partials: tl.tensor, result: tl.tensor, over: tl.tuple, parts: tl.tensor, PARTIALS: tl.constexpr
) -> None:
    """The sum of the partial sums, divided; one program."""
    lane = tl.arange(0, PARTIALS)
    sums = tl.zeros([PARTIALS], tl.float32)
    for first in range(0, parts, PARTIALS):
        sums += tl.load(partials + first + lane, mask=first + lane < parts, other=0.0)
    tl.store(result, tl.div_rn(tl.sum(sums), _divisor(over)))


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
        expectation_kernel[(split.parts,)](
            tensors, strides, partials, over, scale, (*_rows(function), float(function.limit), float(function.slope)),
            size, layout.sizes, split.blocks, split.block, layout.linear, layout.dims, align, vector, layout.wide,
            _kind(function), **target.options(split.warps, tuning.EXPECTATION_REGISTERS),
        )  # fmt: skip
        if partials is None:
            return values, grad
        if split.parts == 1:
            return partials.reshape(()), grad
        result = v.new_empty((), dtype=torch.float32)
        expectation_total[(1,)](
            partials, result, over, split.parts, tuning.TOTAL_BLOCK, **target.options(tuning.TOTAL_WARPS)
        )
    return result, grad


@functools.lru_cache(maxsize=1024)
def _kind(function: ElementFunction) -> int:
    """ANY, SOFTPLUS or EXPONENTIALS."""
    row = function.first
    if function.slope != DERIVATIVE or row.sigmoid or row.tanh or row.tanh_squared or row.step:
        return ANY.value
    if function.limit < math.inf:
        return ANY.value if row.softplus else EXPONENTIALS.value
    others = row.const or row.linear or row.square or row.exp or row.expm1 or row.logit
    return ANY.value if others else SOFTPLUS.value


@functools.lru_cache(maxsize=1024)
def _rows(function: ElementFunction) -> tuple[tuple[float, ...], ...]:
    """In the order in which _row takes them apart; what would lose digits in float32 is computed here."""
    rows = (
        (
            tilt, row.const, row.linear, row.square, row.exp, row.exp_rate + tilt, row.exp_rate, row.expm1,
            row.expm1_rate, row.softplus, row.sigmoid, row.tanh, row.tanh_squared, row.scale, sigmoid(row.logit),
            sigmoid(-row.logit), row.logit, row.step, row.threshold,
        )
        for row, tilt in ((function.first, function.first_tilt), (function.second, function.second_tilt))
    )  # fmt: skip
    return tuple(tuple(map(float, row)) for row in rows)
