"""The losses as functions: arguments are checked, a backend is chosen, and it computes.

Gaussian closed forms: Novello et al. 2026, arXiv 2509.21167. Variational bound: Nowozin et al. 2016, f-GAN,
arXiv 1606.00709. All values come in float32 (float64 for float64 inputs); gradients in the dtype of their input.

Every function takes ``divergence`` (a name such as "squared_hellinger" or "alpha:0.3", or a Divergence), ``reduction``
("none", "mean" or "sum") and ``backend`` (None: use_backend, FDU_BACKEND, else the fastest that fits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdu_kernels import checks
from fdu_kernels.backends import choose_backend, reference
from fdu_kernels.catalogue import get_divergence
from fdu_kernels.divergence import Divergence

REDUCTIONS = ("none", "mean", "sum")
DISTANCES = ("mean", "sum")
PARAMETRIZATIONS = ("log_ratio", "fgan")


def squared_distance(
    pred: Tensor,
    target: Tensor,
    sigma: float | Tensor = 1.0,
    mask: Tensor | None = None,
    distance: str = "mean",
) -> Tensor:
    """s_b = sum_j m_bj (pred_bj - target_bj)^2 / (sigma_b^2 Z_b), the squared Mahalanobis distance of each sample.

    Arguments as in :func:`gaussian_divergence`. Returns [B], differentiable in pred; an empty mask row gives 0.
    """
    _check_pair(pred, target, sigma, mask, distance)
    return reference.squared_distance(pred, target, sigma, mask, distance)


def gaussian_divergence(
    pred: Tensor,
    target: Tensor,
    divergence: str | Divergence = "squared_hellinger",
    sigma: float | Tensor = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    distance: str = "mean",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The f-divergence of N(target, sigma^2) from N(pred, sigma^2): weight_b h_f(s_b). Used like F.mse_loss.

    Args:
        pred: [B, ...] of any trailing shape and strides; float16, bfloat16, float32 or float64.
        target: like pred. A constant, as are sigma, weight and mask: no gradient flows into them.
        divergence: see :func:`fdu_kernels.divergences`.
        sigma: standard deviation, > 0: a number, or a tensor [B] or [].
        weight: omega_b >= 0, [B].
        mask: bool or floating, >= 0, broadcastable to pred: [B, 1, H, W], [H, W], ... An empty row counts 0.
        distance: "mean" divides s by the mask's sum (the paper's code), "sum" does not (the true divergence).
        reduction: over the batch; "none" returns [B].

    Returns:
        The loss in [0, weight * divergence.upper]. Where h grows like exp(k s) it is a straight line beyond k s = 64.
        NaN in gives NaN out, also under a zero mask.

    Raises:
        ValueError, TypeError, RuntimeError: see fdu_kernels.checks and fdu_kernels.backends.

    Source: Novello et al. 2026 (arXiv 2509.21167), for every f: h_f(s) = E[f(exp(sqrt(s) z - s/2))], z ~ N(0, 1).
    """
    divergence = get_divergence(divergence)
    _check_gaussian(pred, target, sigma, weight, mask, distance, reduction)
    pred, target, weight, mask = _plain(pred, target, weight, mask)
    chosen = choose_backend(backend, pred, divergence, "gaussian")
    return chosen.gaussian_divergence(pred, target, divergence, sigma, weight, mask, distance, reduction)


def gaussian_divergence_value_and_grad(
    pred: Tensor,
    target: Tensor,
    divergence: str | Divergence = "squared_hellinger",
    sigma: float | Tensor = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    distance: str = "mean",
    reduction: str = "mean",
    backend: str | None = None,
    grad_scale: float | Tensor = 1.0,
    grad_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gaussian_divergence` and its gradient in pred in one pass, without an autograd graph.

    Args:
        grad_scale: a number or a tensor [] that multiplies the gradient only (loss scaling, gradient accumulation).
        grad_out: a buffer like pred to write the gradient into, instead of a new tensor; its storage is neither
            pred's nor target's.

    Returns:
        The value, and the gradient of the value's sum: the shape, dtype and device of pred.
    """
    divergence = get_divergence(divergence)
    _check_gaussian(pred, target, sigma, weight, mask, distance, reduction)
    checks.check_grad_scale(grad_scale)
    checks.check_grad_out(grad_out, pred, target)
    pred, target, weight, mask = _plain(pred, target, weight, mask)
    chosen = choose_backend(backend, pred, divergence, "gaussian")
    return chosen.gaussian_divergence_value_and_grad(
        pred, target, divergence, sigma, weight, mask, distance, reduction, grad_scale, grad_out
    )


def variational_divergence(
    log_ratio_p: Tensor,
    log_ratio_q: Tensor,
    divergence: str | Divergence = "jensen_shannon",
    mask: Tensor | None = None,
    parametrization: str = "log_ratio",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The variational lower bound E_p[A(v)] - E_q[B(v)] <= D_f(p || q). A critic maximises it.

    Args:
        log_ratio_p: critic outputs v on samples of p, any shape; v estimates log p/q.
        log_ratio_q: the same on samples of q; another shape is allowed unless reduction is "none".
        mask: bool or floating, >= 0, broadcastable to both; the mean runs over its sum.
        parametrization: "log_ratio": A(v) = f'(e^v), B(v) = f*(A(v)). "fgan": T = g_f(v) and f*(T) with f-GAN's
            output activation where table 6 has one that needs no special function; else as "log_ratio".
        reduction: over all elements.

    Returns:
        The bound. Beyond |v| = 64 / (largest exponential rate) A and B are straight lines.

    Raises:
        ValueError: "mse" (it has no generator; use "kl" or "jeffreys"), and see fdu_kernels.checks.

    Source: Nowozin et al. 2016, eq. 4-6; Novello et al. 2026 (arXiv 2509.21167), variational losses.
    """
    divergence = get_divergence(divergence)
    _check_variational(log_ratio_p, log_ratio_q, mask, parametrization, reduction)
    log_ratio_p, log_ratio_q, mask = _plain(log_ratio_p, log_ratio_q, mask)
    chosen = choose_backend(backend, log_ratio_q, divergence, "critic")
    return chosen.variational_divergence(log_ratio_p, log_ratio_q, divergence, mask, parametrization, reduction)


def variational_divergence_value_and_grad(
    log_ratio_p: Tensor,
    log_ratio_q: Tensor,
    divergence: str | Divergence = "jensen_shannon",
    mask: Tensor | None = None,
    parametrization: str = "log_ratio",
    reduction: str = "mean",
    backend: str | None = None,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`variational_divergence` with the gradients of its sum in log_ratio_p and in log_ratio_q, no graph."""
    divergence = get_divergence(divergence)
    _check_variational(log_ratio_p, log_ratio_q, mask, parametrization, reduction)
    checks.check_grad_scale(grad_scale)
    log_ratio_p, log_ratio_q, mask = _plain(log_ratio_p, log_ratio_q, mask)
    chosen = choose_backend(backend, log_ratio_q, divergence, "critic")
    return chosen.variational_divergence_value_and_grad(
        log_ratio_p, log_ratio_q, divergence, mask, parametrization, reduction, grad_scale
    )


def variational_model_loss(
    log_ratio_q: Tensor,
    divergence: str | Divergence = "jensen_shannon",
    mask: Tensor | None = None,
    parametrization: str = "log_ratio",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """-E_q[B(v)], the term of the bound that depends on the model's samples: the model minimises it.

    Arguments as in :func:`variational_divergence`.
    """
    divergence = get_divergence(divergence)
    _check_variational(None, log_ratio_q, mask, parametrization, reduction)
    log_ratio_q, mask = _plain(log_ratio_q, mask)
    chosen = choose_backend(backend, log_ratio_q, divergence, "critic")
    return chosen.variational_divergence(None, log_ratio_q, divergence, mask, parametrization, reduction)


def density_ratio_divergence(
    log_ratio: Tensor,
    divergence: str | Divergence = "kl",
    samples_from: str = "q",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The plug-in estimate of D_f(p || q) from log density ratios: E_q[f(r)], or E_p[f(r)/r] with samples from p.

    Args:
        log_ratio: v = log p/q at the samples, [B, ...].
        samples_from: "q" or "p".
        weight: >= 0, [B], one factor per sample (not normalised).
        reduction: over all elements.

    Returns:
        The estimate. Beyond |v| = 64 / (largest exponential rate) the terms are straight lines.

    Raises:
        ValueError: "mse" (it has no generator; use "kl" or "jeffreys"), and see fdu_kernels.checks.
    """
    divergence = get_divergence(divergence)
    _check_density_ratio(log_ratio, weight, samples_from, reduction)
    log_ratio, weight = _plain(log_ratio, weight)
    chosen = choose_backend(backend, log_ratio, divergence, "critic")
    return chosen.density_ratio_divergence(log_ratio, divergence, samples_from, weight, reduction)


def density_ratio_divergence_value_and_grad(
    log_ratio: Tensor,
    divergence: str | Divergence = "kl",
    samples_from: str = "q",
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`density_ratio_divergence` with the gradient of its sum in log_ratio, without an autograd graph."""
    divergence = get_divergence(divergence)
    _check_density_ratio(log_ratio, weight, samples_from, reduction)
    checks.check_grad_scale(grad_scale)
    log_ratio, weight = _plain(log_ratio, weight)
    chosen = choose_backend(backend, log_ratio, divergence, "critic")
    return chosen.density_ratio_divergence_value_and_grad(
        log_ratio, divergence, samples_from, weight, reduction, grad_scale
    )


def _plain(*tensors: Any) -> Any:
    # A pointer does not show the negative bit, which the imaginary part of a conjugate has. Dynamo cannot look at it.
    if torch.compiler.is_compiling():
        return tensors
    return [tensor if tensor is None or not tensor.is_neg() else tensor.resolve_neg() for tensor in tensors]


def _check_pair(pred: Tensor, target: Tensor, sigma: float | Tensor, mask: Tensor | None, distance: str) -> None:
    checks.check_floating("pred", pred)
    checks.check_floating("target", target)
    checks.check_same("pred", pred, "target", target, dtype=False)
    checks.check_batch("pred", pred)
    checks.check_sigma(sigma, pred)
    checks.check_mask(mask, pred)
    checks.check_choice("distance", distance, DISTANCES)


def _check_gaussian(
    pred: Tensor,
    target: Tensor,
    sigma: float | Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
    reduction: str,
) -> None:
    _check_pair(pred, target, sigma, mask, distance)
    checks.check_weight(weight, pred)
    checks.check_choice("reduction", reduction, REDUCTIONS)


def _check_variational(
    log_ratio_p: Tensor | None, log_ratio_q: Tensor, mask: Tensor | None, parametrization: str, reduction: str
) -> None:
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    checks.check_floating("log_ratio_q", log_ratio_q)
    checks.check_mask(mask, log_ratio_q, "log_ratio_q")
    if log_ratio_p is not None:
        checks.check_floating("log_ratio_p", log_ratio_p)
        checks.check_same("log_ratio_p", log_ratio_p, "log_ratio_q", log_ratio_q, shape=reduction == "none")
        checks.check_mask(mask, log_ratio_p, "log_ratio_p")


def _check_density_ratio(log_ratio: Tensor, weight: Tensor | None, samples_from: str, reduction: str) -> None:
    checks.check_floating("log_ratio", log_ratio)
    checks.check_batch("log_ratio", log_ratio)
    checks.check_weight(weight, log_ratio, "log_ratio")
    checks.check_choice("samples_from", samples_from, ("q", "p"))
    checks.check_choice("reduction", reduction, REDUCTIONS)
