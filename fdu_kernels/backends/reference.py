"""The reference backend: eager PyTorch, every dtype and device, differentiable twice. What other backends must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from fdu_kernels import critics, profiles
from fdu_kernels.catalogue import Divergence
from fdu_kernels.critics import CriticTerm


def unavailable() -> str | None:
    """PyTorch is always there."""
    return None


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def squared_distance(
    pred: Tensor, target: Tensor, sigma: float | Tensor, mask: Tensor | None, distance: str
) -> Tensor:
    """s [B] = sum_j m_bj (pred_bj - target_bj)^2 / (sigma_b^2 Z_b), Z_b = sum_j m_bj or 1; 0 where the mask is empty."""
    dtype = working_dtype(pred)
    squares = (pred.to(dtype) - target.detach().to(dtype)).square()
    size = pred[0].numel() if len(pred) else 1
    if mask is None:
        total, count = squares.flatten(1).sum(1) if pred.ndim > 1 else squares, size
        scale = torch.as_tensor(sigma, dtype=dtype, device=pred.device).square()
        return total / (scale * count) if distance == "mean" else total / scale
    weights = mask.to(dtype).expand_as(pred)
    # A masked-out element may hold anything, also an infinity, which 0 times would make NaN.
    squares = torch.where(weights == 0, torch.zeros_like(squares), squares * weights)
    total = squares.flatten(1).sum(1) if pred.ndim > 1 else squares
    scale = torch.as_tensor(sigma, dtype=dtype, device=pred.device).square()
    if distance == "sum":
        return total / scale
    count = weights.flatten(1).sum(1) if pred.ndim > 1 else weights
    return total / (scale * torch.where(count > 0, count, torch.ones_like(count)))


def gaussian_losses(
    pred: Tensor,
    target: Tensor,
    divergence: Divergence,
    sigma: float | Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
) -> Tensor:
    """weight_b h(s_b), [B], differentiable in pred."""
    losses = profiles.value(divergence.gaussian, squared_distance(pred, target, sigma, mask, distance))
    return losses if weight is None else losses * weight.to(losses.dtype)


def gaussian_value_and_grad(
    pred: Tensor,
    target: Tensor,
    divergence: Divergence,
    sigma: float | Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
    grad_scale: float | Tensor,
    grad_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses [B] and grad_scale times the gradient of their sum, in pred's dtype, rounded once."""
    with torch.no_grad():
        s = squared_distance(pred, target, sigma, mask, distance)
        losses = profiles.value(divergence.gaussian, s)
        slopes = profiles.slope(divergence.gaussian, s)
        dtype = losses.dtype
        scale = 2 * slopes / torch.as_tensor(sigma, dtype=dtype, device=pred.device).square() * grad_scale
        if weight is not None:
            losses, scale = losses * weight.to(dtype), scale * weight.to(dtype)
        weights = None if mask is None else mask.to(dtype).expand_as(pred)
        if distance == "mean" and weights is None:
            scale = scale / (pred[0].numel() if len(pred) else 1)
        elif distance == "mean" and weights is not None:
            count = weights.flatten(1).sum(1) if pred.ndim > 1 else weights
            scale = scale / torch.where(count > 0, count, torch.ones_like(count))
        gradient = (pred.to(dtype) - target.to(dtype)) * scale.reshape(-1, *(1,) * (pred.ndim - 1))
        if weights is not None:
            gradient = torch.where(weights == 0, torch.zeros_like(gradient), gradient * weights)
        return losses, gradient.to(pred.dtype) if grad_out is None else grad_out.copy_(gradient)


def critic_values(term: CriticTerm, v: Tensor) -> Tensor:
    """A or B at v, elementwise, in the working dtype, differentiable."""
    return critics.value(term, v.to(working_dtype(v)))


def critic_slopes(term: CriticTerm, v: Tensor) -> Tensor:
    """The derivative of A or B at v, elementwise, in the working dtype."""
    with torch.no_grad():
        return term.slope(v.to(working_dtype(v)))


class _RatioValue(torch.autograd.Function):
    """f(e^v), or f(e^v) / e^v, with their exact derivatives e^v A(v) and e^-v B(v)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, v: Tensor, divergence: Divergence, from_p: bool) -> Tensor:
        ctx.save_for_backward(v)
        ctx.divergence, ctx.from_p = divergence, from_p  # type: ignore[attr-defined]
        generator = divergence.log_generator
        if generator is None:
            raise ValueError(f"divergence {divergence.key!r} has no generator f; use kl or jeffreys")
        return generator(v) * torch.exp(-v) if from_p else generator(v)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (v,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * ratio_slopes(v, ctx.divergence, ctx.from_p), None, None  # type: ignore[attr-defined]


def ratio_values(v: Tensor, divergence: Divergence, from_p: bool) -> Tensor:
    """f(r) at r = e^v, or f(r) / r where the samples come from p; elementwise, working dtype, differentiable."""
    result: Tensor = _RatioValue.apply(v.to(working_dtype(v)), divergence, from_p)
    return result


def ratio_slopes(v: Tensor, divergence: Divergence, from_p: bool) -> Tensor:
    """The derivative of :func:`ratio_values` with respect to v."""
    v = v.to(working_dtype(v))
    a, b = divergence.terms()
    return torch.exp(-v) * critics.value(b, v) if from_p else torch.exp(v) * critics.value(a, v)
