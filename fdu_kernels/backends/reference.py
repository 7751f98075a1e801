"""The reference backend: eager PyTorch on any device, twice differentiable; every other backend is tested against it.

float16, bfloat16 and float32 are computed in float32 and rounded once, at the end; float64 in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdu_kernels.checks import accumulation_dtype
from fdu_kernels.critic import critic_terms, ratio_terms
from fdu_kernels.divergence import Divergence
from fdu_kernels.profiles import profile
from fdu_kernels.scalar import Scalar


def why_unavailable() -> str | None:
    """It runs wherever PyTorch does."""
    return None


def why_unsuitable(device: torch.device, dtype: torch.dtype, own: str | None, form: str) -> str | None:
    """It takes every call."""
    return None


def squared_distance(pred: Tensor, target: Tensor, sigma: float | Tensor, mask: Tensor | None, distance: str) -> Tensor:
    """s [B] in the accumulation dtype, differentiable in pred."""
    difference, mask, divisor = _terms_of_distance(pred, target, sigma, mask, distance)
    square = difference.square() if mask is None else mask * difference.square()
    return _sum_per_sample(square) / divisor


def gaussian_divergence(
    pred: Tensor,
    target: Tensor,
    divergence: Divergence,
    sigma: float | Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
    reduction: str,
) -> Tensor:
    """weight h(s), reduced."""
    loss = profile(divergence)(squared_distance(pred, target, sigma, mask, distance))
    if weight is not None:
        loss = weight.detach().to(loss.dtype) * loss
    return reduce(loss, reduction)


@torch.no_grad()
def gaussian_divergence_value_and_grad(
    pred: Tensor,
    target: Tensor,
    divergence: Divergence,
    sigma: float | Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
    reduction: str,
    grad_scale: float | Tensor,
    grad_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and d(sum of losses)/d(pred) = 2 weight h'(s) mask (pred - target) / (sigma^2 Z)."""
    difference, mask, divisor = _terms_of_distance(pred, target, sigma, mask, distance)
    masked = difference if mask is None else mask * difference
    s = _sum_per_sample(masked * difference) / divisor
    h = profile(divergence)
    loss, coefficient = h.value_at(s), 2 * h.slope_at(s) / divisor
    if weight is not None:
        weight = weight.to(loss.dtype)
        loss, coefficient = weight * loss, weight * coefficient
    coefficient = coefficient * grad_scale
    if reduction == "mean":
        coefficient = coefficient / pred.shape[0]
    grad = torch.empty_like(pred) if grad_out is None else grad_out
    grad.copy_(coefficient.reshape(-1, *[1] * (pred.ndim - 1)) * masked)
    return reduce(loss, reduction), grad


def variational_divergence(
    log_ratio_p: Tensor | None,
    log_ratio_q: Tensor,
    divergence: Divergence,
    mask: Tensor | None,
    parametrization: str,
    reduction: str,
) -> Tensor:
    """E_p[A] - E_q[B], or its second term alone."""
    a, b = critic_terms(divergence, parametrization)
    second = expectation(b, log_ratio_q, None, mask, reduction)
    return -second if log_ratio_p is None else expectation(a, log_ratio_p, None, mask, reduction) - second


@torch.no_grad()
def variational_divergence_value_and_grad(
    log_ratio_p: Tensor,
    log_ratio_q: Tensor,
    divergence: Divergence,
    mask: Tensor | None,
    parametrization: str,
    reduction: str,
    grad_scale: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The bound, and the gradients of its sum in log_ratio_p and log_ratio_q."""
    a, b = critic_terms(divergence, parametrization)
    first, grad_p = _expectation_and_grad(a, log_ratio_p, mask, reduction, grad_scale)
    second, grad_q = _expectation_and_grad(b, log_ratio_q, mask, reduction, grad_scale)
    return first - second, grad_p, -grad_q


def density_ratio_divergence(
    log_ratio: Tensor, divergence: Divergence, samples_from: str, weight: Tensor | None, reduction: str
) -> Tensor:
    """E_q[weight f(r)] or E_p[weight f(r)/r]."""
    return expectation(ratio_terms(divergence, samples_from), log_ratio, weight, None, reduction)


@torch.no_grad()
def density_ratio_divergence_value_and_grad(
    log_ratio: Tensor,
    divergence: Divergence,
    samples_from: str,
    weight: Tensor | None,
    reduction: str,
    grad_scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The estimate, and the gradient of its sum."""
    v = _widened(log_ratio)
    function = ratio_terms(divergence, samples_from)
    terms, grad = function.value_at(v), function.slope_at(v) * grad_scale
    if weight is not None:
        factor = _per_sample(weight, terms)
        terms, grad = factor * terms, factor * grad
    if reduction == "mean":
        grad = grad / log_ratio.numel()
    return reduce(terms, reduction), grad.to(log_ratio.dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


def _per_sample(weight: Tensor, terms: Tensor) -> Tensor:
    return weight.detach().to(terms.dtype).reshape(-1, *[1] * (terms.ndim - 1))


def _terms_of_distance(
    pred: Tensor, target: Tensor, sigma: float | Tensor, mask: Tensor | None, distance: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """pred - target, the mask, and sigma^2 Z per sample, all in the accumulation dtype."""
    difference = _widened(pred) - _widened(target.detach())
    mask = None if mask is None else mask.detach().to(difference.dtype)
    divisor = difference.new_ones(pred.shape[0])
    if distance == "mean" and mask is None:
        divisor = divisor * max(pred[0].numel(), 1)
    elif distance == "mean" and mask is not None:
        divisor = _sum_per_sample(mask.expand(pred.shape))
        # An empty row has s = 0/1, not 0/0.
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    sigma = sigma.detach().to(difference.dtype) if isinstance(sigma, Tensor) else sigma
    return difference, mask, divisor * sigma**2


def _sum_per_sample(tensor: Tensor) -> Tensor:
    return tensor.sum(dim=tuple(range(1, tensor.ndim))) if tensor.ndim > 1 else tensor


def reduce(terms: Tensor, reduction: str) -> Tensor:
    """The terms, their mean or their sum."""
    if reduction == "none":
        return terms
    return terms.mean() if reduction == "mean" else terms.sum()


def expectation(
    function: Scalar, log_ratio: Tensor, weight: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor:
    """function(v) times weight [B] or the mask, reduced; a mean runs over the mask's sum, where there is one."""
    terms = function(_widened(log_ratio))
    if weight is not None:
        terms = _per_sample(weight, terms) * terms
    return _expectation(terms, mask, reduction)


def _expectation(terms: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    factor = _expectation_factor(terms, mask, reduction)
    return (
        reduce(terms, reduction) if factor is None else reduce(factor * terms, "none" if reduction == "none" else "sum")
    )


def _expectation_and_grad(
    function: Scalar, log_ratio: Tensor, mask: Tensor | None, reduction: str, grad_scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    v = _widened(log_ratio)
    grad = function.slope_at(v) * grad_scale
    factor = _expectation_factor(v, mask, reduction)
    if factor is not None:
        grad = factor * grad
    elif reduction == "mean":
        grad = grad / v.numel()
    return _expectation(function.value_at(v), mask, reduction), grad.to(log_ratio.dtype)


def _expectation_factor(terms: Tensor, mask: Tensor | None, reduction: str) -> Tensor | None:
    """The mask, divided by its sum where a mean is asked for; a mask of zeros gives 0."""
    if mask is None:
        return None
    mask = mask.detach().to(terms.dtype)
    if reduction != "mean":
        return mask
    total = mask.expand(terms.shape).sum()
    return mask / torch.where(total == 0, torch.ones_like(total), total)
