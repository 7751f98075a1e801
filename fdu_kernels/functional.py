"""The losses as functions, drop-in beside ``torch.nn.functional.mse_loss``.

Sources: Novello et al. 2026, "A Unified Framework for Diffusion Model Unlearning with f-Divergence"
(arXiv 2509.21167); Nowozin et al. 2016, "f-GAN" (arXiv 1606.00709) for the variational bound.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fdu_kernels import backends
from fdu_kernels.backends import reference
from fdu_kernels.catalogue import Divergence, get_divergence
from fdu_kernels.checks import (
    REDUCTIONS,
    check_choice,
    check_device,
    check_floats,
    check_mask,
    check_pair,
    check_per_sample,
    check_samples,
)
from fdu_kernels.critics import CriticTerm

DISTANCES = ("mean", "sum")


def squared_distance(
    pred: Tensor,
    target: Tensor,
    *,
    sigma: float | Tensor = 1.0,
    mask: Tensor | None = None,
    distance: str = "mean",
) -> Tensor:
    """The squared Mahalanobis distance s of every sample, the argument of every Gaussian profile.

    s_b = sum_j m_bj (pred_bj - target_bj)^2 / (sigma_b^2 Z_b), with Z_b = sum_j m_bj for distance "mean" and 1 for "sum".

    Args: as for :func:`gaussian_divergence`.

    Returns:
        [B], float64 for float64 inputs, else float32; differentiable in ``pred``.
    """
    _check_gaussian(pred, target, sigma, None, mask, distance, "none")
    return reference.squared_distance(pred, target, sigma, mask, distance)


def gaussian_divergence(
    pred: Tensor,
    target: Tensor,
    divergence: str | Divergence = "squared_hellinger",
    *,
    sigma: float | Tensor = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    distance: str = "mean",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The f-divergence of two Gaussians with means ``target`` and ``pred`` and one covariance sigma^2 I.

    loss_b = weight_b h_f(s_b), with s_b as :func:`squared_distance` gives it (arXiv 2509.21167; h_f in
    ``fdu_kernels.profiles``). In diffusion models pred and target are denoiser outputs, target the frozen one.

    Args:
        pred: [B, ...], float16, bfloat16, float32 or float64.
        target: as ``pred``. A constant: it gets no gradient.
        divergence: a name of :func:`divergences` or a :class:`Divergence`.
        sigma: standard deviation in units of ``pred``, > 0: a number, or a tensor [B] or []. A constant.
        weight: [B], >= 0: a weight a sample, such as a timestep weighting. A constant.
        mask: bool or floating >= 0, broadcast to ``pred``: [H, W], [B, 1, H, W] or full. A sample whose mask is empty
            has loss 0 and gradient 0.
        distance: "mean" divides by the mask's sum a sample (the paper's code); "sum" is the true divergence.
        reduction: "mean" or "sum" over the samples, or "none" for [B].
        backend: a name of :func:`backends`; None takes the fastest that can run.

    Returns:
        A scalar or [B], float64 for float64 inputs, else float32; differentiable twice in ``pred``. NaN in ``pred``
        gives NaN. Profiles that grow like exp(k s) continue as a straight line beyond k s = 80.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong argument, named.
    """
    _check_gaussian(pred, target, sigma, weight, mask, distance, reduction)
    chosen = backends.find(backend)
    losses = chosen.gaussian_losses(pred, target, get_divergence(divergence), sigma, weight, mask, distance)
    return _reduce(losses, reduction)


def gaussian_divergence_value_and_grad(
    pred: Tensor,
    target: Tensor,
    divergence: str | Divergence = "squared_hellinger",
    *,
    sigma: float | Tensor = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    distance: str = "mean",
    reduction: str = "mean",
    grad_scale: float | Tensor = 1.0,
    grad_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The value of :func:`gaussian_divergence` and its gradient by ``pred``, in one pass, without an autograd graph.

    Args: as for :func:`gaussian_divergence`, and
        grad_scale: multiplies the gradient: a number, or a tensor [] such as a loss scale.
        grad_out: a buffer like ``pred`` to write the gradient into.

    Returns:
        The value, a scalar or [B] (then the gradient is that of the sum), and the gradient, shape and dtype of ``pred``.
    """
    _check_gaussian(pred, target, sigma, weight, mask, distance, reduction)
    if grad_out is not None:
        check_pair("grad_out", grad_out, "pred", pred)
    if reduction == "mean":
        grad_scale = grad_scale / max(len(pred), 1)
    losses, gradient = backends.find(backend).gaussian_value_and_grad(
        pred, target, get_divergence(divergence), sigma, weight, mask, distance, grad_scale, grad_out
    )
    return _reduce(losses, reduction), gradient


def variational_divergence(
    log_ratio_p: Tensor,
    log_ratio_q: Tensor,
    divergence: str | Divergence = "jensen_shannon",
    *,
    mask: Tensor | None = None,
    parametrization: str = "log_ratio",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The variational lower bound E_p[A(v)] - E_q[B(v)] <= D_f(p || q), which a critic maximises.

    Args:
        log_ratio_p: critic outputs on samples of p, any shape, floating: estimates of v = log p/q.
        log_ratio_q: critic outputs on samples of q, any shape, the same dtype and device.
        divergence: a name of :func:`divergences` or a :class:`Divergence`, but not mse.
        mask: bool or floating >= 0, broadcast to both: the weights of the means (a patch critic's mask).
        parametrization: "log_ratio": A = f'(e^v), B = f*(A), tight at the true ratio. "fgan": f-GAN's output activations
            (kl: T = v) where its table has one that differs and is elementary; the log-ratio form for the others.
        reduction: "mean", "sum", or "none" for A(v_p) - B(v_q) elementwise, for inputs of one shape.
        backend: a name of :func:`backends`; None takes the fastest that can run.

    Returns:
        A scalar, or the elements; float64 for float64 inputs, else float32; differentiable twice in both inputs.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong argument, named.
    """
    chosen, (a, b) = _check_variational(log_ratio_p, log_ratio_q, divergence, mask, parametrization, reduction, backend)
    values_p, values_q = chosen.critic_values(a, log_ratio_p), chosen.critic_values(b, log_ratio_q)
    if reduction == "none":
        return _masked(values_p, mask) - _masked(values_q, mask)
    return _average(values_p, mask, reduction) - _average(values_q, mask, reduction)


def variational_divergence_value_and_grad(
    log_ratio_p: Tensor,
    log_ratio_q: Tensor,
    divergence: str | Divergence = "jensen_shannon",
    *,
    mask: Tensor | None = None,
    parametrization: str = "log_ratio",
    reduction: str = "mean",
    grad_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The value of :func:`variational_divergence` and its gradients by ``log_ratio_p`` and ``log_ratio_q``.

    With reduction "none" the gradients are those of the sum. ``grad_scale`` multiplies them.
    """
    chosen, (a, b) = _check_variational(log_ratio_p, log_ratio_q, divergence, mask, parametrization, reduction, backend)
    with torch.no_grad():
        value = variational_divergence(
            log_ratio_p,
            log_ratio_q,
            divergence,
            mask=mask,
            parametrization=parametrization,
            reduction=reduction,
            backend=backend,
        )
        gradient_p = _spread(chosen.critic_slopes(a, log_ratio_p), mask, reduction) * grad_scale
        gradient_q = _spread(chosen.critic_slopes(b, log_ratio_q), mask, reduction) * -grad_scale
    return value, gradient_p.to(log_ratio_p.dtype), gradient_q.to(log_ratio_q.dtype)


def variational_model_loss(
    log_ratio_q: Tensor,
    divergence: str | Divergence = "jensen_shannon",
    *,
    mask: Tensor | None = None,
    parametrization: str = "log_ratio",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """-E_q[B(v)]: the part of the bound that depends on the model q, which the model minimises.

    Args: as for :func:`variational_divergence`; ``log_ratio_q`` must carry the gradient to the model.

    Returns:
        A scalar, or the elements for reduction "none"; differentiable twice.
    """
    check_floats("log_ratio_q", log_ratio_q)
    check_choice("reduction", reduction, REDUCTIONS)
    if mask is not None:
        check_mask(mask, "log_ratio_q", log_ratio_q)
    _, b = get_divergence(divergence).terms(parametrization)
    values = backends.find(backend).critic_values(b, log_ratio_q)
    return -(_masked(values, mask) if reduction == "none" else _average(values, mask, reduction))


def density_ratio_divergence(
    log_ratio: Tensor,
    divergence: str | Divergence = "kl",
    *,
    samples_from: str = "q",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """D_f(p || q) from estimates of the density ratio r = p/q: E_q[f(r)], or E_p[f(r) / r].

    Args:
        log_ratio: v = log r, any shape with the samples first, floating.
        divergence: a name of :func:`divergences` or a :class:`Divergence`, but not mse.
        samples_from: "q" or "p": which of the two the samples were drawn from.
        weight: [B], >= 0: importance weights of the samples. A constant.
        reduction: "mean" over all elements, "sum", or "none".
        backend: a name of :func:`backends`; None takes the fastest that can run.

    Returns:
        A scalar, or the shape of ``log_ratio``; float64 for float64 inputs, else float32; differentiable twice.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong argument, named.
    """
    chosen, found = _check_ratio(log_ratio, divergence, samples_from, weight, reduction, backend)
    values = _weighted(chosen.ratio_values(log_ratio, found, samples_from == "p"), weight)
    return _reduce(values, reduction)


def density_ratio_divergence_value_and_grad(
    log_ratio: Tensor,
    divergence: str | Divergence = "kl",
    *,
    samples_from: str = "q",
    weight: Tensor | None = None,
    reduction: str = "mean",
    grad_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The value of :func:`density_ratio_divergence` and its gradient by ``log_ratio``.

    With reduction "none" the gradient is that of the sum. ``grad_scale`` multiplies it.
    """
    chosen, found = _check_ratio(log_ratio, divergence, samples_from, weight, reduction, backend)
    with torch.no_grad():
        from_p = samples_from == "p"
        value = _reduce(_weighted(chosen.ratio_values(log_ratio, found, from_p), weight), reduction)
        gradient = _weighted(chosen.ratio_slopes(log_ratio, found, from_p), weight) * grad_scale
        if reduction == "mean":
            gradient = gradient / max(log_ratio.numel(), 1)
    return value, gradient.to(log_ratio.dtype)


def _check_gaussian(
    pred: Tensor,
    target: Tensor,
    sigma: float | Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
    reduction: str,
) -> None:
    check_pair("pred", pred, "target", target)
    check_samples("pred", pred)
    check_choice("distance", distance, DISTANCES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_per_sample("sigma", sigma, "pred", pred, above_zero=True)
    if weight is not None:
        _check_weight(weight, "pred", pred)
    if mask is not None:
        check_mask(mask, "pred", pred)


def _check_weight(weight: Tensor, like_name: str, like: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor [B], one number a sample of {like_name}, got {type(weight).__name__}")
    check_per_sample("weight", weight, like_name, like, above_zero=False)


def _check_variational(
    log_ratio_p: Tensor,
    log_ratio_q: Tensor,
    divergence: str | Divergence,
    mask: Tensor | None,
    parametrization: str,
    reduction: str,
    backend: str | None,
) -> tuple[ModuleType, tuple[CriticTerm, CriticTerm]]:
    check_floats("log_ratio_p", log_ratio_p)
    check_floats("log_ratio_q", log_ratio_q)
    if log_ratio_p.dtype != log_ratio_q.dtype:
        raise TypeError(
            f"log_ratio_p and log_ratio_q must have one dtype, got {log_ratio_p.dtype} and {log_ratio_q.dtype}; "
            "convert one with .to()"
        )
    check_device("log_ratio_p", log_ratio_p, "log_ratio_q", log_ratio_q)
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none" and log_ratio_p.shape != log_ratio_q.shape:
        raise ValueError(
            f"log_ratio_p and log_ratio_q must have one shape for reduction='none', got {tuple(log_ratio_p.shape)} "
            f"and {tuple(log_ratio_q.shape)}; use reduction='mean'"
        )
    if mask is not None:
        check_mask(mask, "log_ratio_p", log_ratio_p)
        check_mask(mask, "log_ratio_q", log_ratio_q)
    return backends.find(backend), get_divergence(divergence).terms(parametrization)


def _check_ratio(
    log_ratio: Tensor,
    divergence: str | Divergence,
    samples_from: str,
    weight: Tensor | None,
    reduction: str,
    backend: str | None,
) -> tuple[ModuleType, Divergence]:
    check_floats("log_ratio", log_ratio)
    check_choice("samples_from", samples_from, ("q", "p"))
    check_choice("reduction", reduction, REDUCTIONS)
    if weight is not None:
        check_samples("log_ratio", log_ratio)
        _check_weight(weight, "log_ratio", log_ratio)
    found = get_divergence(divergence)
    found.terms()
    return backends.find(backend), found


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" or not values.numel() else values.mean()


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values
    return values * weight.to(values.dtype).reshape(-1, *(1,) * (values.ndim - 1))


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values
    weights = mask.to(values.dtype).expand_as(values)
    # A masked-out element may hold anything, also an infinity, which 0 times would make NaN.
    return torch.where(weights == 0, torch.zeros_like(values), values * weights)


def _count(values: Tensor, mask: Tensor | None) -> Tensor | int:
    """What a mean divides by: the mask's sum, at least 1 where it is empty."""
    if mask is None:
        return max(values.numel(), 1)
    total = mask.to(values.dtype).expand_as(values).sum()
    return torch.where(total > 0, total, torch.ones_like(total))


def _average(values: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    total = _masked(values, mask).sum()
    return total if reduction == "sum" else total / _count(values, mask)


def _spread(slopes: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """The gradient of :func:`_average`, or of the masked sum, from the slope of every element."""
    masked = _masked(slopes, mask)
    return masked / _count(slopes, mask) if reduction == "mean" else masked
