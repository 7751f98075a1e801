"""Autograd around the kernels of the fused backends, and the same as torch.library ops for torch.compile.

Plain tensors in eager mode take the short way, a :class:`torch.autograd.Function` that calls the kernels: at the size
of a latent the host's work is the cost. Compiled code and tensor subclasses see the ops. Second derivatives are those
of the reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fdu_kernels.backends import native, reference, triton
from fdu_kernels.backends.kernels import Kernels
from fdu_kernels.catalogue import find_divergence
from fdu_kernels.checks import accumulation_dtype
from fdu_kernels.critic import critic_terms, ratio_terms
from fdu_kernels.divergence import Divergence
from fdu_kernels.lowering import ElementFunction, GaussianProfile, critic_functions, gaussian_profile, ratio_function
from fdu_kernels.scalar import Scalar

KERNELS: dict[str, Kernels] = {"triton": triton, "cuda": native.cuda, "cpu": native.cpu}
"""Name -> kernels, the preferred first."""


class FusedBackend:
    """A backend (see fdu_kernels.backends.Backend) made of kernels."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernels = KERNELS[name]

    def why_unavailable(self) -> str | None:
        """Why its kernels cannot run on this machine."""
        return self.kernels.why_unavailable()

    def why_unsuitable(self, device: torch.device, dtype: torch.dtype, own: str | None, form: str) -> str | None:
        """Why its kernels cannot take this device, dtype, or a user's generator in the form "critic"."""
        if form == "critic" and own is not None:
            return (
                f"the generator of {own!r} is Python code, of which only the Gaussian profile can be tabulated; "
                'use backend="torch"'
            )
        return self.kernels.why_unsuitable(device, dtype)

    def gaussian_divergence(
        self,
        pred: Tensor,
        target: Tensor,
        divergence: Divergence,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
        reduction: str,
    ) -> Tensor:
        """weight h(s), reduced; differentiable in pred."""
        if _sees_ops(pred):
            numbers = _profile_arguments(divergence, pred.device)
            loss, _ = gaussian_forward(
                pred, target.detach(), *numbers, *_split(sigma), weight, mask, distance, self.name
            )
        elif pred.requires_grad and torch.is_grad_enabled():
            return _Gaussian.apply(pred, target, self.kernels, divergence, sigma, weight, mask, distance, reduction)
        else:
            profile = gaussian_profile(divergence)
            loss, _ = self.kernels.gaussian_forward(pred, target, profile, sigma, weight, mask, distance)
        return reference.reduce(loss, reduction)

    def gaussian_divergence_value_and_grad(
        self,
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
        """The loss and the gradient of its sum, in one pass."""
        if _sees_ops(pred):
            numbers = _profile_arguments(divergence, pred.device)
            value, grad = gaussian_value_and_grad(
                pred.detach(), target.detach(), *numbers, *_split(sigma), weight, mask, distance, reduction,
                *_split(grad_scale), self.name,
            )  # fmt: skip
            return value, grad if grad_out is None else grad_out.copy_(grad)
        return self.kernels.gaussian_value_and_grad(
            pred, target, gaussian_profile(divergence), sigma, weight, mask, distance, reduction, grad_scale, grad_out
        )

    def variational_divergence(
        self,
        log_ratio_p: Tensor | None,
        log_ratio_q: Tensor,
        divergence: Divergence,
        mask: Tensor | None,
        parametrization: str,
        reduction: str,
    ) -> Tensor:
        """E_p[A] - E_q[B], or its second term alone; differentiable in both."""
        gain, loss = _critic(divergence.key, parametrization)
        which = (divergence, parametrization)
        if log_ratio_p is None:
            return self._expectation((log_ratio_q,), (loss,), which, None, mask, reduction)
        return self._expectation((log_ratio_p, log_ratio_q), (gain, loss), which, None, mask, reduction)

    def variational_divergence_value_and_grad(
        self,
        log_ratio_p: Tensor,
        log_ratio_q: Tensor,
        divergence: Divergence,
        mask: Tensor | None,
        parametrization: str,
        reduction: str,
        grad_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The bound, and the gradients of its sum in both."""
        gain, loss = _critic(divergence.key, parametrization)
        first, grad_p = self._expectation_and_grad(log_ratio_p, gain, None, mask, reduction, grad_scale)
        second, grad_q = self._expectation_and_grad(log_ratio_q, loss, None, mask, reduction, grad_scale)
        return first + second, grad_p, grad_q

    def density_ratio_divergence(
        self, log_ratio: Tensor, divergence: Divergence, samples_from: str, weight: Tensor | None, reduction: str
    ) -> Tensor:
        """E_q[weight f(r)] or E_p[weight f(r)/r], differentiable in log_ratio."""
        function = _ratio(divergence.key, samples_from)
        return self._expectation((log_ratio,), (function,), (divergence, samples_from), weight, None, reduction)

    def density_ratio_divergence_value_and_grad(
        self,
        log_ratio: Tensor,
        divergence: Divergence,
        samples_from: str,
        weight: Tensor | None,
        reduction: str,
        grad_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The estimate, and the gradient of its sum."""
        function = _ratio(divergence.key, samples_from)
        return self._expectation_and_grad(log_ratio, function, weight, None, reduction, grad_scale)

    def _expectation(
        self,
        vs: tuple[Tensor, ...],
        functions: tuple[ElementFunction, ...],
        which: tuple[Divergence, str],
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
    ) -> Tensor:
        """The sum of the functions' expectations."""
        if any(map(_sees_ops, vs)):
            terms = [
                expectation(v, list(function.numbers), weight, mask, reduction, self.name)
                for v, function in zip(vs, functions, strict=True)
            ]
        elif torch.is_grad_enabled() and any(v.requires_grad for v in vs):
            value: Tensor = _Expectation.apply(self.kernels, functions, which, weight, mask, reduction, *vs)
            return value
        else:
            terms = [
                self.kernels.expectation(v, function, weight, mask, reduction)
                for v, function in zip(vs, functions, strict=True)
            ]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def _expectation_and_grad(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        grad_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        if _sees_ops(v):
            numbers = list(function.numbers)
            return expectation_value_and_grad(
                v.detach(), numbers, weight, mask, reduction, *_split(grad_scale), self.name
            )
        return self.kernels.expectation_value_and_grad(v, function, weight, mask, reduction, grad_scale)


class _Gaussian(torch.autograd.Function):
    """The loss in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        kernels: Kernels,
        divergence: Divergence,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
        reduction: str,
    ) -> Tensor:
        profile = gaussian_profile(divergence)
        ctx.options = kernels, divergence, distance, reduction
        ctx.grad, coefficient = None, None
        if kernels.FUSES_FORWARD and reduction != "none":
            value, ctx.grad = kernels.gaussian_value_and_grad(
                pred, target, profile, sigma, weight, mask, distance, reduction, 1.0, None
            )
        else:
            loss, coefficient = kernels.gaussian_forward(pred, target, profile, sigma, weight, mask, distance)
            value = reference.reduce(loss, reduction)
        # A tensor goes where a later change of it is noticed.
        ctx.sigma, changing = (None, sigma) if isinstance(sigma, Tensor) else (sigma, None)
        ctx.save_for_backward(pred, target, weight, mask, coefficient, changing)
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = upstreams
        kernels, divergence, distance, reduction = ctx.options
        pred, target, weight, mask, coefficient, changing = ctx.saved_tensors
        sigma = ctx.sigma if changing is None else changing
        ready, ctx.grad = ctx.grad, None
        if torch.is_grad_enabled():  # create_graph
            loss = reference.gaussian_divergence(pred, target, divergence, sigma, weight, mask, distance, reduction)
            (grad,) = torch.autograd.grad(loss, pred, upstream, create_graph=True)
        elif coefficient is not None:
            scale = upstream / len(coefficient) if reduction == "mean" else upstream
            grad = kernels.gaussian_backward(pred, target, mask, coefficient * scale)
        elif ready is not None and _multiplies_exactly(upstream, ready.dtype):
            grad = _multiplied(ready, upstream)
        else:  # scaled before it is rounded, or asked for once more
            profile = gaussian_profile(divergence)
            _, grad = kernels.gaussian_value_and_grad(
                pred, target, profile, sigma, weight, mask, distance, reduction, upstream, ready
            )
        return grad, None, None, None, None, None, None, None, None


class _Expectation(torch.autograd.Function):
    """The sum of means of functions of density-ratio estimates in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        functions: tuple[ElementFunction, ...],
        which: tuple[Divergence, str],
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        *vs: Tensor,
    ) -> Tensor:
        ctx.options = kernels, functions, which, reduction
        ctx.grads = []
        fuses = kernels.FUSES_FORWARD and reduction != "none"
        terms = []
        for v, function, needs in zip(vs, functions, ctx.needs_input_grad[-len(vs) :], strict=True):
            grad = None
            if fuses and needs:
                term, grad = kernels.expectation_value_and_grad(v, function, weight, mask, reduction, 1.0)
            else:
                term = kernels.expectation(v, function, weight, mask, reduction)
            terms.append(term)
            ctx.grads.append(grad)
        ctx.save_for_backward(weight, mask, *vs)
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = upstreams
        kernels, functions, (divergence, form), reduction = ctx.options
        weight, mask, *vs = ctx.saved_tensors
        upstream = upstream.resolve_neg()  # a pointer does not show the negative bit
        ready, ctx.grads = ctx.grads, [None] * len(vs)
        grads: list[Tensor | None] = []
        for v, function, differentiable, needs, grad in zip(
            vs,
            functions,
            _differentiable(divergence, form, len(vs)),
            ctx.needs_input_grad[-len(vs) :],
            ready,
            strict=True,
        ):
            if not needs:
                grad = None
            elif torch.is_grad_enabled():  # create_graph
                value = reference.expectation(differentiable, v, weight, mask, reduction)
                (grad,) = torch.autograd.grad(value, v, upstream, create_graph=True)
            elif grad is not None and _multiplies_exactly(upstream, grad.dtype):
                grad = _multiplied(grad, upstream)
            else:
                grad = kernels.expectation_backward(v, function, weight, mask, reduction, upstream)
            grads.append(grad)
        return *[None] * 6, *grads


def _multiplies_exactly(upstream: Tensor, dtype: torch.dtype) -> bool:
    """Whether what was rounded to ``dtype`` can be multiplied by ``upstream`` without a second rounding.

    A power of two only moves the exponent; in half precision it may have been lost before.
    """
    size = abs(upstream.item())
    return size == 1 or (dtype.itemsize > 2 and math.frexp(size)[0] == 0.5)


def _multiplied(ready: Tensor, upstream: Tensor) -> Tensor:
    return ready if upstream.item() == 1 else ready.mul_(upstream)


@torch.library.custom_op("fdu_kernels::gaussian_forward", mutates_args=())
def gaussian_forward(
    pred: Tensor,
    target: Tensor,
    c: float,
    k: float,
    linear_beyond: float,
    table: Tensor | None,
    sigma: float,
    sigma_tensor: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """weight h(s) [B] and its factor of mask (pred - target) in the gradient [B]; differentiable in pred."""
    profile = GaussianProfile(c, k, linear_beyond, table)
    return KERNELS[backend].gaussian_forward(
        pred, target, profile, _joined(sigma, sigma_tensor), weight, mask, distance
    )


@gaussian_forward.register_fake
def _(pred: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _accumulated(pred, pred.shape[:1]), _accumulated(pred, pred.shape[:1])


@torch.library.custom_op("fdu_kernels::gaussian_backward", mutates_args=())
def gaussian_backward(pred: Tensor, target: Tensor, mask: Tensor | None, coefficient: Tensor, backend: str) -> Tensor:
    """coefficient_b mask (pred - target)."""
    return KERNELS[backend].gaussian_backward(pred, target, mask, coefficient)


@gaussian_backward.register_fake
def _(pred: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(pred)


def _save_gaussian(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pred, target, *_, mask, _, backend = inputs
    _, coefficient = output
    ctx.mark_non_differentiable(coefficient)
    ctx.save_for_backward(pred, target, mask, coefficient)
    ctx.backend = backend


def _gaussian_grad(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    pred, target, mask, coefficient = ctx.saved_tensors
    return gaussian_backward(pred, target, mask, coefficient * upstream, ctx.backend), *[None] * 11


gaussian_forward.register_autograd(_gaussian_grad, setup_context=_save_gaussian)


@torch.library.custom_op("fdu_kernels::gaussian_value_and_grad", mutates_args=())
def gaussian_value_and_grad(
    pred: Tensor,
    target: Tensor,
    c: float,
    k: float,
    linear_beyond: float,
    table: Tensor | None,
    sigma: float,
    sigma_tensor: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
    reduction: str,
    grad_scale: float,
    grad_scale_tensor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of its sum."""
    return KERNELS[backend].gaussian_value_and_grad(
        pred, target, GaussianProfile(c, k, linear_beyond, table), _joined(sigma, sigma_tensor), weight, mask, distance,
        reduction, _joined(grad_scale, grad_scale_tensor), None,
    )  # fmt: skip


@gaussian_value_and_grad.register_fake
def _(
    pred: Tensor,
    target: Tensor,
    c: float,
    k: float,
    linear_beyond: float,
    table: Tensor | None,
    sigma: float,
    sigma_tensor: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    distance: str,
    reduction: str,
    grad_scale: float,
    grad_scale_tensor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _accumulated(pred, pred.shape[:1] if reduction == "none" else ()), torch.empty_like(pred)


@torch.library.custom_op("fdu_kernels::expectation", mutates_args=())
def expectation(
    v: Tensor, numbers: list[float], weight: Tensor | None, mask: Tensor | None, reduction: str, backend: str
) -> Tensor:
    """y(v) times weight or mask, reduced; differentiable in v."""
    return KERNELS[backend].expectation(v, ElementFunction.of(tuple(numbers)), weight, mask, reduction)


@expectation.register_fake
def _(
    v: Tensor, numbers: list[float], weight: Tensor | None, mask: Tensor | None, reduction: str, backend: str
) -> Tensor:
    return _terms(v, reduction)


@torch.library.custom_op("fdu_kernels::expectation_backward", mutates_args=())
def expectation_backward(
    v: Tensor,
    numbers: list[float],
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    upstream: Tensor,
    backend: str,
) -> Tensor:
    """The gradient of :func:`expectation` in v."""
    function = ElementFunction.of(tuple(numbers))
    return KERNELS[backend].expectation_backward(v, function, weight, mask, reduction, upstream)


@expectation_backward.register_fake
def _(v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v)


def _save_expectation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, numbers, weight, mask, reduction, backend = inputs
    ctx.save_for_backward(v, weight, mask)
    ctx.options = numbers, reduction, backend


def _expectation_grad(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    v, weight, mask = ctx.saved_tensors
    numbers, reduction, backend = ctx.options
    upstream = upstream.resolve_neg()
    return expectation_backward(v, numbers, weight, mask, reduction, upstream, backend), *[None] * 5


expectation.register_autograd(_expectation_grad, setup_context=_save_expectation)


@torch.library.custom_op("fdu_kernels::expectation_value_and_grad", mutates_args=())
def expectation_value_and_grad(
    v: Tensor,
    numbers: list[float],
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    grad_scale: float,
    grad_scale_tensor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The value and the gradient of its sum."""
    function = ElementFunction.of(tuple(numbers))
    scale = _joined(grad_scale, grad_scale_tensor)
    return KERNELS[backend].expectation_value_and_grad(v, function, weight, mask, reduction, scale)


@expectation_value_and_grad.register_fake
def _(
    v: Tensor,
    numbers: list[float],
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    grad_scale: float,
    grad_scale_tensor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _terms(v, reduction), torch.empty_like(v)


def _sees_ops(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def _accumulated(tensor: Tensor, shape: Any) -> Tensor:
    return tensor.new_empty(shape, dtype=accumulation_dtype(tensor.dtype))


def _terms(v: Tensor, reduction: str) -> Tensor:
    # As the kernels lay them out: like v.
    return torch.empty_like(v, dtype=accumulation_dtype(v.dtype)) if reduction == "none" else _accumulated(v, ())


def _split(number: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, number.detach()) if isinstance(number, Tensor) else (float(number), None)


def _joined(number: float, tensor: Tensor | None) -> float | Tensor:
    return number if tensor is None else tensor


def _profile_arguments(divergence: Divergence, device: torch.device) -> tuple[float, float, float, Tensor | None]:
    c, k, linear_beyond = _profile_numbers(divergence.key)
    return c, k, linear_beyond, _profile_table(divergence.key, device)


# Compiled code holds what these return as constants. It can hold them for a string, not for a divergence.
@torch.compiler.assume_constant_result
def _profile_numbers(key: str) -> tuple[float, float, float]:
    profile = gaussian_profile(find_divergence(key))
    return profile.c, profile.k, profile.linear_beyond


@torch.compiler.assume_constant_result
def _profile_table(key: str, device: torch.device) -> Tensor | None:
    return gaussian_profile(find_divergence(key)).table_on(device)


@torch.compiler.assume_constant_result
def _critic(key: str, parametrization: str) -> tuple[ElementFunction, ElementFunction]:
    """A and -B, whose expectations add up to the bound."""
    functions = critic_functions(find_divergence(key), parametrization)
    assert functions is not None, "why_unsuitable refuses user generators"
    a, b = functions
    return a, b.negated()


@torch.compiler.assume_constant_result
def _ratio(key: str, samples_from: str) -> ElementFunction:
    function = ratio_function(find_divergence(key), samples_from)
    assert function is not None, "why_unsuitable refuses user generators"
    return function


def _differentiable(divergence: Divergence, form: str, count: int) -> tuple[Scalar, ...]:
    """The functions of an expectation for the reference: a density-ratio term for "q" and "p", else A and -B."""
    if form in ("q", "p"):
        return (ratio_terms(divergence, form),)
    a, b = critic_terms(divergence, form)
    return (a, b.negated())[-count:]
