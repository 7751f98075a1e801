"""Autograd in eager mode around any backend. Second derivatives are those of fdu_kernels.formulas.

At the size of a latent the host's work is the cost, so a call goes straight to the kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fdu_kernels import formulas
from fdu_kernels.calls import ExpectationCall, GaussianCall
from fdu_kernels.internals import needs_formula
from fdu_kernels.registry import Backend


def gaussian(call: GaussianCall, backend: Backend) -> Tensor:
    """The loss, differentiable in pred."""
    if call.pred.requires_grad and torch.is_grad_enabled():
        return _Gaussian.apply(call.pred, call, backend)
    return formulas.reduce(backend.gaussian_forward(call)[0], call.reduction)


def expectations(calls: tuple[ExpectationCall, ...], backend: Backend) -> Tensor:
    """The sum of the calls' values, differentiable in each v."""
    if torch.is_grad_enabled() and any(call.v.requires_grad for call in calls):
        return _Expectations.apply(calls, backend, *(call.v for call in calls))
    terms = [backend.expectation_forward(call) for call in calls]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


class _Gaussian(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, call: GaussianCall, backend: Backend) -> Tensor:
        ctx.grad, coefficient = None, None
        if backend.FUSES_FORWARD and call.reduction != "none":
            value, ctx.grad = backend.gaussian_value_and_grad(call, None)
        else:
            losses, coefficient = backend.gaussian_forward(call)
            value = formulas.reduce(losses, call.reduction)
        # A tensor goes where a later change of it is noticed, and where hooks can move it.
        sigma, changing = (None, call.sigma) if isinstance(call.sigma, Tensor) else (call.sigma, None)
        ctx.settings = backend, call.profile, sigma, call.distance, call.reduction
        ctx.save_for_backward(pred, call.target, call.weight, call.mask, coefficient, changing)
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = upstreams
        pred, target, weight, mask, coefficient, changing = ctx.saved_tensors
        ready, ctx.grad = ctx.grad, None
        by_formula = needs_formula(upstream)
        if ready is not None and not by_formula and _scaled_exactly(ready, upstream):
            return ready, None, None
        backend, profile, sigma, distance, reduction = ctx.settings
        sigma = sigma if changing is None else changing
        call = GaussianCall(pred, target, profile, sigma, weight, mask, distance, reduction)
        if by_formula:
            _, factor, masked = formulas.gaussian_terms(call)
            grad = (formulas.per_sample(factor * upstream / call.divisor, masked) * masked).to(pred.dtype)
        elif coefficient is not None:
            scale = upstream / len(coefficient) if reduction == "mean" else upstream
            grad = backend.gaussian_backward(call, coefficient * scale)
        else:  # scaled before it is rounded, or asked for once more
            call.grad_scale = upstream
            _, grad = backend.gaussian_value_and_grad(call, ready)
        return grad, None, None


class _Expectations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: tuple[ExpectationCall, ...], backend: Backend, *vs: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.grads, terms = [], []
        for call, needs in zip(calls, ctx.needs_input_grad[2:], strict=True):
            grad = None
            if needs and backend.FUSES_FORWARD and call.reduction != "none":
                term, grad = backend.expectation_value_and_grad(call)
            else:
                term = backend.expectation_forward(call)
            terms.append(term)
            ctx.grads.append(grad)
        ctx.settings = [(call.function, call.reduction) for call in calls]
        ctx.save_for_backward(calls[0].weight, calls[0].mask, *vs)
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        upstream = upstreams[0].resolve_neg()  # a pointer does not show the negative bit
        weight, mask, *vs = ctx.saved_tensors
        ready, ctx.grads = ctx.grads, [None] * len(vs)
        grads: list[Tensor | None] = []
        for v, (function, reduction), needs, grad in zip(
            vs, ctx.settings, ctx.needs_input_grad[2:], ready, strict=True
        ):
            call = ExpectationCall(v, function, weight, mask, reduction)
            if not needs:
                grad = None
            elif needs_formula(upstream):
                grad = formulas.expectation_grad(call, upstream).to(v.dtype)
            elif grad is None or not _scaled_exactly(grad, upstream):
                grad = ctx.backend.expectation_backward(call, upstream)
            grads.append(grad)
        return None, None, *grads


def _scaled_exactly(grad: Tensor, upstream: Tensor) -> bool:
    """Multiply ``grad`` in place, if that takes no second rounding; whether it was done.

    A power of two only moves the exponent, of a normal number; in half precision it may have been lost before.
    """
    scale = upstream.item()
    if abs(scale) != 1 and (grad.dtype.itemsize == 2 or math.frexp(abs(scale))[0] != 0.5):
        return False
    if scale != 1:
        grad.mul_(upstream)
    return True
