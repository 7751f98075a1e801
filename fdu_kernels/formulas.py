"""The losses as compositions of PyTorch operations: on any device and kind of tensor, differentiable as often as asked.

float16, bfloat16 and float32 are computed in float32 and rounded once, at the end; float64 in float64. The backend
"torch" is made of these, and what a fused backend cannot do comes here, such as second derivatives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdu_kernels.calls import ExpectationCall, GaussianCall


def gaussian(call: GaussianCall) -> Tensor:
    """weight h(s), reduced; differentiable in pred."""
    s = distance_terms(call)[0]
    call.note(s)
    return reduce(_weighted(call, call.profile.scalar()(s)), call.reduction)


def gaussian_value_and_grad(call: GaussianCall) -> tuple[Tensor, Tensor]:
    """The reduced loss and the gradient of its sum times grad_scale, both differentiable in pred."""
    losses, coefficient, masked = gaussian_terms(call)
    coefficient = coefficient * call.grad_scale / call.divisor
    return reduce(losses, call.reduction), (per_sample(coefficient, masked) * masked).to(call.pred.dtype)


def gaussian_terms(call: GaussianCall) -> tuple[Tensor, Tensor, Tensor]:
    """weight h(s) [B], 2 weight h'(s) / (sigma^2 Z) [B] and mask (pred - target), all differentiable in pred.

    The product of the last two is the gradient of the sum of the first.
    """
    s, masked, divisor = distance_terms(call)
    call.note(s)
    h = call.profile.scalar()
    return _weighted(call, h(s)), _weighted(call, 2 * h.slope_at(s) / divisor), masked


def distance_terms(call: GaussianCall) -> tuple[Tensor, Tensor, Tensor]:
    """s [B], mask (pred - target), and sigma^2 Z [B], all in the accumulation dtype and differentiable in pred."""
    dtype, sigma = call.accumulation, call.sigma
    difference = call.pred.to(dtype) - call.target.detach().to(dtype)
    masked, divisor = difference, difference.new_ones(difference.shape[0])
    if call.mask is not None:
        mask = call.mask.detach().to(dtype)
        masked = mask * difference
        if call.distance == "mean":
            divisor = _sum_per_sample(mask.expand(difference.shape))
            # An empty row has s = 0/1, not 0/0.
            divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    elif call.distance == "mean":
        divisor = divisor * max(math.prod(difference.shape[1:]), 1)
    if isinstance(sigma, Tensor):
        sigma = sigma.detach().to(dtype)
    divisor = divisor * sigma**2
    return _sum_per_sample(masked * difference) / divisor, masked, divisor


def expectation_value_and_grad(call: ExpectationCall) -> tuple[Tensor, Tensor]:
    """The value and the gradient of its sum times grad_scale, both differentiable in v."""
    return expectation(call), expectation_grad(call, call.grad_scale).to(call.v.dtype)


def expectation(call: ExpectationCall) -> Tensor:
    """y(v) times weight or mask, reduced; differentiable in v."""
    terms = call.function.scalar()(call.v.to(call.accumulation))
    factor = _factor(call, terms)
    if factor is not None:
        terms = factor * terms
    if call.mask is not None and call.reduction == "mean":
        return terms.sum()
    return reduce(terms, call.reduction)


def expectation_grad(call: ExpectationCall, upstream: float | Tensor) -> Tensor:
    """The gradient of its sum in v times upstream ([], or of the shape of v), in the accumulation dtype."""
    v = call.v.to(call.accumulation)
    slope = call.function.scalar().slope_at(v) * upstream
    factor = _factor(call, v)
    if factor is not None:
        slope = factor * slope
    return slope / v.numel() if call.reduction == "mean" and call.mask is None else slope


def _factor(call: ExpectationCall, terms: Tensor) -> Tensor | None:
    """weight, or the mask, divided by its sum where a mean is asked for; a mask of zeros gives 0."""
    if call.weight is not None:
        return per_sample(call.weight.detach().to(terms.dtype), terms)
    if call.mask is None:
        return None
    mask = call.mask.detach().to(terms.dtype)
    if call.reduction != "mean":
        return mask
    total = mask.expand(terms.shape).sum()
    return mask / torch.where(total == 0, torch.ones_like(total), total)


def reduce(terms: Tensor, reduction: str) -> Tensor:
    """The terms, their mean or their sum."""
    if reduction == "none":
        return terms
    return terms.mean() if reduction == "mean" else terms.sum()


def per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...] of the dimensions of another tensor."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def _weighted(call: GaussianCall, numbers: Tensor) -> Tensor:
    return numbers if call.weight is None else call.weight.detach().to(numbers.dtype) * numbers


def _sum_per_sample(tensor: Tensor) -> Tensor:
    return tensor.sum(dim=tuple(range(1, tensor.ndim))) if tensor.ndim > 1 else tensor
