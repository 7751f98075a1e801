"""The losses as functions: check the arguments, choose a backend, compute.

Gaussian closed forms: Novello et al. 2026, arXiv 2509.21167. Variational bound: Nowozin et al. 2016, f-GAN,
arXiv 1606.00709. Values are float32 (float64 for float64 inputs), gradients have the dtype of their input. Every
function takes ``divergence`` (a name such as "alpha:0.3", or a Divergence), ``reduction`` ("none", "mean" or "sum") and
``backend`` (None: use_backend, FDU_BACKEND, else the fastest that fits). Errors: fdu_kernels.checks, .registry.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fdu_kernels import checks, dispatch, formulas
from fdu_kernels.calls import PARAMETRIZATIONS, ExpectationCall, GaussianCall
from fdu_kernels.catalogue import get_divergence
from fdu_kernels.constants import bound_terms, profile_of, ratio_function
from fdu_kernels.divergence import Divergence
from fdu_kernels.profiles import GaussianProfile

_SQUARE = GaussianProfile.exponential(1.0, 0.0)


def squared_distance(
    pred: Tensor, target: Tensor, sigma: float | Tensor = 1.0, mask: Tensor | None = None, distance: str = "mean"
) -> Tensor:
    """s_b = sum_j m_bj (pred_bj - target_bj)^2 / (sigma_b^2 Z_b), the squared Mahalanobis distance of each sample.

    Arguments as in :func:`gaussian_divergence`. Returns [B], differentiable in pred; an empty mask row gives 0.
    """
    call = GaussianCall(pred, target, _SQUARE, sigma, None, mask, distance, "none").checked()
    return formulas.distance_terms(call)[0]


@overload
def gaussian_divergence(
    pred: Tensor, target: Tensor, divergence: str | Divergence = "squared_hellinger", sigma: float | Tensor = 1.0,
    weight: Tensor | None = None, mask: Tensor | None = None, distance: str = "mean", reduction: str = "mean",
    backend: str | None = None, *, return_distance: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def gaussian_divergence(
    pred: Tensor, target: Tensor, divergence: str | Divergence = "squared_hellinger", sigma: float | Tensor = 1.0,
    weight: Tensor | None = None, mask: Tensor | None = None, distance: str = "mean", reduction: str = "mean",
    backend: str | None = None, return_distance: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


def gaussian_divergence(
    pred: Tensor, target: Tensor, divergence: str | Divergence = "squared_hellinger", sigma: float | Tensor = 1.0,
    weight: Tensor | None = None, mask: Tensor | None = None, distance: str = "mean", reduction: str = "mean",
    backend: str | None = None, return_distance: bool = False,
) -> Any:  # fmt: skip
    """The f-divergence of N(target, sigma^2) from N(pred, sigma^2): weight_b h_f(s_b). Used like F.mse_loss.

    Args:
        pred: [B, ...], any trailing shape and strides; float16, bfloat16, float32 or float64.
        target: like pred. No gradient flows into target, sigma, weight or mask.
        divergence: see :func:`fdu_kernels.divergences`.
        sigma: standard deviation, > 0: a number, or a tensor [B] or [].
        weight: omega_b >= 0, [B].
        mask: bool or floating, >= 0, broadcastable to pred: [B, 1, H, W], [H, W], ... An empty row gives 0.
        distance: "mean" divides s by the mask's sum (the paper's code), "sum" does not (the true divergence).
        reduction: over the batch; "none" returns [B].
        return_distance: also return s [B], last; the kernels compute it anyway. It is a constant, in float64 so that
            h(s) and other functions of it are as exact as the loss; float32 on devices without float64.

    Returns:
        The loss in [0, weight * divergence.upper]. If h grows like exp(k s), it is linear beyond k s = 64.
        NaN inputs give NaN, even under a zero mask; an infinite pred gives the limit, and its gradient is NaN.

    Source: Novello et al. 2026 (arXiv 2509.21167), for every f: h_f(s) = E[f(exp(sqrt(s) z - s/2))], z ~ N(0, 1).
    """
    call = GaussianCall(pred, target, _SQUARE, sigma, weight, mask, distance, reduction, 1.0, return_distance)
    loss = dispatch.gaussian(_gaussian(divergence, call), backend)
    return (loss, call.s) if return_distance else loss


@overload
def gaussian_divergence_value_and_grad(
    pred: Tensor, target: Tensor, divergence: str | Divergence = "squared_hellinger", sigma: float | Tensor = 1.0,
    weight: Tensor | None = None, mask: Tensor | None = None, distance: str = "mean", reduction: str = "mean",
    backend: str | None = None, grad_scale: float | Tensor = 1.0, grad_out: Tensor | None = None, *,
    return_distance: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


@overload
def gaussian_divergence_value_and_grad(
    pred: Tensor, target: Tensor, divergence: str | Divergence = "squared_hellinger", sigma: float | Tensor = 1.0,
    weight: Tensor | None = None, mask: Tensor | None = None, distance: str = "mean", reduction: str = "mean",
    backend: str | None = None, grad_scale: float | Tensor = 1.0, grad_out: Tensor | None = None,
    return_distance: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def gaussian_divergence_value_and_grad(
    pred: Tensor, target: Tensor, divergence: str | Divergence = "squared_hellinger", sigma: float | Tensor = 1.0,
    weight: Tensor | None = None, mask: Tensor | None = None, distance: str = "mean", reduction: str = "mean",
    backend: str | None = None, grad_scale: float | Tensor = 1.0, grad_out: Tensor | None = None,
    return_distance: bool = False,
) -> Any:  # fmt: skip
    """:func:`gaussian_divergence` and its gradient in pred in one pass, without an autograd graph. Under
    torch.func and forward-mode differentiation, both are differentiable.

    Args:
        grad_scale: factor on the gradient alone, a number or a tensor [] (loss scaling, gradient accumulation).
        grad_out: a buffer like pred that receives the gradient, instead of a new tensor; it must not share storage
            with pred or target.

    Returns:
        The value, and the gradient of its sum with the shape, dtype and device of pred; then s, if asked for.
    """
    call = GaussianCall(pred, target, _SQUARE, sigma, weight, mask, distance, reduction, grad_scale, return_distance)
    both = dispatch.gaussian_value_and_grad(_gaussian(divergence, call, grad_out), grad_out, backend)
    return (*both, call.s) if return_distance else both


def warm_up(pred: Tensor, target: Tensor, divergence: str | Divergence = "squared_hellinger", **options: Any) -> None:
    """Make the first calls of :func:`gaussian_divergence` and of its value-and-grad form with these arguments.

    A first call moves tables to the device, and compiles and loads kernels, which a CUDA graph cannot capture. Call
    this before you capture new divergences, dtypes or shapes. Call the other losses once instead.

    Args:
        pred, target, divergence: as in the function; the values do not matter.
        options: its other arguments.
    """
    with torch.enable_grad():
        leaf = pred.detach().requires_grad_()
        torch.autograd.grad(gaussian_divergence(leaf, target, divergence, **options).sum(), leaf)
    gaussian_divergence_value_and_grad(leaf, target, divergence, **options)


def variational_divergence(
    log_ratio_p: Tensor, log_ratio_q: Tensor, divergence: str | Divergence = "jensen_shannon",
    mask: Tensor | None = None, parametrization: str = "log_ratio", reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The variational lower bound E_p[A(v)] - E_q[B(v)] <= D_f(p || q). A critic maximises it.

    Beyond |v| = 64 / (largest exponential rate), A and B continue as straight lines.

    Args:
        log_ratio_p: critic outputs v on samples of p, any shape; v estimates log p/q.
        log_ratio_q: the same on samples of q; the shapes may differ unless reduction is "none".
        mask: bool or floating, >= 0, broadcastable to both; the mean divides by its sum.
        parametrization: "log_ratio": A(v) = f'(e^v), B(v) = f*(A(v)). "fgan": T = g_f(v) and f*(T) with f-GAN's
            output activation where table 6 has one that needs no special function, else as "log_ratio"; v is then no
            log ratio. A and B of total_variation and hockey_stick are steps, so only "fgan" trains a critic.
        reduction: over all elements.

    Source: Nowozin et al. 2016, eq. 4-6; Novello et al. 2026 (arXiv 2509.21167), variational losses.
    """
    calls = _terms_of_bound(log_ratio_p, log_ratio_q, divergence, mask, parametrization, reduction)
    return dispatch.expectations(calls, backend)


def variational_divergence_value_and_grad(
    log_ratio_p: Tensor, log_ratio_q: Tensor, divergence: str | Divergence = "jensen_shannon",
    mask: Tensor | None = None, parametrization: str = "log_ratio", reduction: str = "mean",
    backend: str | None = None, grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`variational_divergence` with the gradients of its sum in log_ratio_p and in log_ratio_q, no graph."""
    calls = _terms_of_bound(log_ratio_p, log_ratio_q, divergence, mask, parametrization, reduction, grad_scale)
    (first, grad_p), (second, grad_q) = (dispatch.expectation_value_and_grad(call, backend) for call in calls)
    return first + second, grad_p, grad_q


def variational_model_loss(
    log_ratio_q: Tensor, divergence: str | Divergence = "jensen_shannon", mask: Tensor | None = None,
    parametrization: str = "log_ratio", reduction: str = "mean", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """-E_q[B(v)], the model's term of the bound, to be minimised; see :func:`variational_divergence`."""
    checks.check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    _, minus_b = bound_terms(get_divergence(divergence), parametrization)
    call = ExpectationCall(log_ratio_q, minus_b, None, mask, reduction)
    return dispatch.expectations((call.checked("log_ratio_q"),), backend)


def density_ratio_divergence(
    log_ratio: Tensor, divergence: str | Divergence = "kl", samples_from: str = "q", weight: Tensor | None = None,
    reduction: str = "mean", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The plug-in estimate of D_f(p || q) from log density ratios: E_q[f(r)], or E_p[f(r)/r] with samples from p.

    Beyond |v| = 64 / (largest exponential rate), the terms continue as straight lines.

    Args:
        log_ratio: v = log p/q at the samples, [B, ...].
        samples_from: "q" or "p".
        weight: >= 0, [B], one factor per sample (not normalised).
        reduction: over all elements.
    """
    return dispatch.expectations((_ratio(log_ratio, divergence, samples_from, weight, reduction),), backend)


def density_ratio_divergence_value_and_grad(
    log_ratio: Tensor, divergence: str | Divergence = "kl", samples_from: str = "q", weight: Tensor | None = None,
    reduction: str = "mean", backend: str | None = None, grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`density_ratio_divergence` with the gradient of its sum in log_ratio, without an autograd graph."""
    call = _ratio(log_ratio, divergence, samples_from, weight, reduction, grad_scale)
    return dispatch.expectation_value_and_grad(call, backend)


def _gaussian(divergence: str | Divergence, call: GaussianCall, grad_out: Tensor | None = None) -> GaussianCall:
    """The call, checked, with the divergence's profile: only then, as Dynamo cannot raise with a table in its hands."""
    divergence = get_divergence(divergence)
    call.checked(grad_out)
    call.profile = profile_of(divergence, call.pred)
    return call


def _terms_of_bound(
    log_ratio_p: Tensor, log_ratio_q: Tensor, divergence: str | Divergence, mask: Tensor | None, parametrization: str,
    reduction: str, grad_scale: float | Tensor = 1.0,
) -> tuple[ExpectationCall, ExpectationCall]:  # fmt: skip
    """E_p[A] and E_q[-B], which add up to the bound."""
    checks.check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    a, minus_b = bound_terms(get_divergence(divergence), parametrization)
    of_p = ExpectationCall(log_ratio_p, a, None, mask, reduction, grad_scale).checked("log_ratio_p")
    of_q = ExpectationCall(log_ratio_q, minus_b, None, mask, reduction, grad_scale).checked("log_ratio_q")
    checks.check_same("log_ratio_p", log_ratio_p, "log_ratio_q", log_ratio_q, shape=reduction == "none")
    return of_p, of_q


def _ratio(
    log_ratio: Tensor, divergence: str | Divergence, samples_from: str, weight: Tensor | None, reduction: str,
    grad_scale: float | Tensor = 1.0,
) -> ExpectationCall:  # fmt: skip
    checks.check_choice("samples_from", samples_from, ("q", "p"))
    function = ratio_function(get_divergence(divergence), samples_from)
    return ExpectationCall(log_ratio, function, weight, None, reduction, grad_scale).checked("log_ratio")
