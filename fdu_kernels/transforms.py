"""The kernels of fused backends under torch.func: vmap, grad, jvp and their compositions.

vmap folds its dimension into the batch, so that many calls are one launch. Values and first derivatives are those of
the kernels, higher ones those of fdu_kernels.formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fdu_kernels import formulas
from fdu_kernels.calls import ExpectationCall, GaussianCall, in_memory
from fdu_kernels.divergence import Function
from fdu_kernels.profiles import GaussianProfile
from fdu_kernels.registry import Backend, backend_named
from fdu_kernels.scalar import Scalar, derivative


def gaussian(call: GaussianCall, backend: Backend) -> Tensor:
    """The loss, differentiable in pred."""
    _note(call)
    return formulas.reduce(_Losses.apply(*_Settings.of(call, backend, 1.0)), call.reduction)


def gaussian_value_and_grad(call: GaussianCall, backend: Backend) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of its sum times grad_scale, both differentiable in pred."""
    _note(call)
    if not isinstance(call.grad_scale, Tensor):
        losses, grad = _LossesAndGrad.apply(*_Settings.of(call, backend, call.grad_scale / call.divisor))
        return formulas.reduce(losses, call.reduction), grad
    # A scale that is a tensor may differ from call to call: as a weight it enters before the gradient is rounded.
    value, one = gaussian(call, backend), call.pred.new_ones(len(call.pred), dtype=call.accumulation)
    call.weight = call.grad_scale * (one if call.weight is None else one * call.weight)
    return value, _LossesAndGrad.apply(*_Settings.of(call, backend, 1.0 / call.divisor))[1]


def _note(call: GaussianCall) -> None:
    if call.return_distance:
        call.note(formulas.distance_terms(call)[0])


class _Settings(NamedTuple):
    """The parts of a call that are not tensors."""

    profile: GaussianProfile
    sigma: float | None
    distance: str
    grad_scale: float
    backend: Backend

    @staticmethod
    def of(call: GaussianCall, backend: Backend, grad_scale: float) -> tuple[Any, ...]:
        """The arguments of the functions below: the tensors of a call, each or None, and these."""
        sigma, number = (call.sigma, None) if isinstance(call.sigma, Tensor) else (None, call.sigma)
        settings = _Settings(call.profile, number, call.distance, grad_scale, backend)
        return call.pred, call.target, sigma, call.weight, call.mask, settings

    def backend_for(self, pred: Tensor) -> Backend:
        """Kernels take no empty batch, which vmap over no calls makes."""
        return self.backend if len(pred) else backend_named("torch")

    def call(self, pred: Tensor, target: Tensor, sigma: Any, weight: Any, mask: Any) -> GaussianCall:
        """The call again, of losses that are not reduced."""
        pred, target, sigma, weight, mask = (in_memory(tensor) for tensor in (pred, target, sigma, weight, mask))
        sigma = self.sigma if sigma is None else sigma
        return GaussianCall(pred, target, self.profile, sigma, weight, mask, self.distance, "none", self.grad_scale)


class _Function(torch.autograd.Function):
    """A function of the tensors of a call and its settings, which are saved for either direction."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.settings = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


class _Losses(_Function):
    """weight h(s) [B]."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        *tensors, settings = arguments
        return settings.backend_for(tensors[0]).gaussian_forward(settings.call(*tensors))[0]

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        pred, target, sigma, weight, mask = ctx.saved_tensors
        weight = upstreams[0] if weight is None else weight * upstreams[0]
        grad: Tensor = _LossesAndGrad.apply(pred, target, sigma, weight, mask, ctx.settings)[1]
        return grad, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, coefficient, masked = formulas.gaussian_terms(ctx.settings.call(*ctx.saved_tensors))
        return coefficient * (masked * tangents[0]).reshape(len(masked), -1).sum(-1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        *tensors, settings = arguments
        folded, shape = _folded(info.batch_size, in_dims, *tensors)
        losses = _Losses.apply(*folded, settings)
        return losses.reshape(shape), 0


class _LossesAndGrad(_Function):
    """weight h(s) [B], and the gradient of its sum times the settings' scale; differentiable in weight too."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, settings = arguments
        return settings.backend_for(tensors[0]).gaussian_value_and_grad(settings.call(*tensors), None)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        pred, weight, formula = _formula(ctx)
        grads = vjp(formula, pred, weight)[1](upstreams)
        return grads[0], None, None, grads[1] if ctx.needs_input_grad[3] else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        pred, weight, formula = _formula(ctx)
        both = (torch.zeros_like(x) if t is None else t for x, t in ((pred, tangents[0]), (weight, tangents[3])))
        return jvp(formula, (pred, weight), tuple(both))[1]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        *tensors, settings = arguments
        folded, shape = _folded(info.batch_size, in_dims, *tensors)
        losses, grad = _LossesAndGrad.apply(*folded, settings)
        return (losses.reshape(shape), grad.reshape(*shape, *grad.shape[1:])), (0, 0)


def _formula(ctx: Any) -> tuple[Tensor, Tensor, Any]:
    """pred, weight, and what _LossesAndGrad computes of them, in PyTorch operations."""
    pred, target, sigma, weight, mask = ctx.saved_tensors
    settings = ctx.settings
    if weight is None:
        weight = pred.new_ones(pred.shape[:1], dtype=settings.call(pred, target, sigma, None, None).accumulation)

    def formula(pred: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        losses, coefficient, masked = formulas.gaussian_terms(settings.call(pred, target, sigma, None, mask))
        coefficient = weight * coefficient * settings.grad_scale
        return weight * losses, (formulas.per_sample(coefficient, masked) * masked).to(pred.dtype)

    return pred, weight, formula


def _folded(size: int, dims: tuple[Any, ...], *tensors: Any) -> tuple[list[Tensor | None], tuple[int, int]]:
    """pred, target, sigma, weight and mask of ``size`` calls as those of one, and how its batch unfolds."""
    pred, _, _, _, mask = tensors
    shape = list(pred.shape)
    if dims[0] is not None:
        shape.pop(dims[0])
    wanted = (shape, shape, shape[:1], shape[:1], shape)  # of a single call
    folded: list[Tensor | None] = []
    for place, (tensor, dim, full) in enumerate(zip(tensors, dims, wanted, strict=False)):
        shared = place == 4 and mask is not None and (mask.ndim < len(shape) or mask.shape[0] == 1)
        if tensor is None or (dim is None and (tensor.ndim == 0 or shared)):
            folded.append(tensor)
            continue
        tensor = tensor[None] if dim is None else tensor.movedim(dim, 0)
        own = tensor.shape[1:]
        tensor = tensor.reshape(len(tensor), *[1] * (len(full) - len(own)), *own)
        # A mask keeps the dimensions along which it broadcasts.
        each = [full[0], *(tensor.shape[2:] if len(full) > 1 else ())]
        folded.append(tensor.expand(size, *each).reshape(-1, *each[1:]))
    return folded, (size, shape[0])


class _Kernels(NamedTuple):
    """A function of the density ratio whose PyTorch operations are a backend's kernels."""

    function: Function
    backend: Backend

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The numbers of the function."""
        return self.function.numbers

    def scalar(self) -> Scalar:
        """The kernels, differentiable as often as the function is."""

        def each(v: Tensor) -> ExpectationCall:
            return ExpectationCall(in_memory(v), self.function, reduction="none")

        plain = self.function.scalar()
        slope = Scalar(lambda v: self.backend.expectation_value_and_grad(each(v))[1], derivative(plain.slope_at))
        return Scalar(lambda v: self.backend.expectation_forward(each(v)), slope)


def by_kernels(call: ExpectationCall, backend: Backend) -> ExpectationCall:
    """The same call for fdu_kernels.formulas, with y(v) and its slope by kernels."""
    function: Any = _Kernels(call.function, backend)
    return ExpectationCall(call.v, function, call.weight, call.mask, call.reduction, call.grad_scale)
