"""Scalar functions that state their derivative, applied elementwise and continued as straight lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from fdu_kernels.internals import needs_plain_operations

MAX_EXPONENT = 64.0
"""Where exp(k x) occurs, the function continues as a straight line beyond k x = MAX_EXPONENT, in every dtype and
backend. exp(64) = 6e27 leaves the line ten further decades in float32."""


@dataclasses.dataclass(frozen=True)
class Scalar:
    """y(x) with y'(x), both elementwise; outside [low, high] a straight line with the slope of the end.

    Every derivative of y(x), forward or reverse, is ``slope`` or a derivative of it: differentiating ``value`` would
    lose digits in the tails, where the terms of its derivative cancel. NaN gives NaN.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, x: Tensor) -> Tensor:
        """y(x), as often differentiable as ``slope`` is, and once more."""
        if needs_plain_operations():
            return self.value_at(x)
        return (_Evaluate if torch.compiler.is_compiling() else _EvaluateEitherWay).apply(x, self)

    def value_at(self, x: Tensor) -> Tensor:
        """y(x), for use without autograd."""
        if self.low == -math.inf and self.high == math.inf:
            return self.value(x)
        inside = self._inside(x)
        return self.value(inside) + self.slope(inside) * (x - inside)

    def slope_at(self, x: Tensor) -> Tensor:
        """y'(x), differentiable."""
        return self.slope(self._inside(x))

    def _inside(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.low == -math.inf and self.high < math.inf:
            # Compiled code would hold a bound that is a symbol as a constant.
            return (x / self.high).clamp(max=1.0) * self.high
        return x.clamp(self.low, self.high)


def derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x -> y'(x) of an elementwise function of PyTorch operations, differentiable itself."""
    return lambda x: vjp(function, x)[1](torch.ones_like(x))[0]


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, function: Scalar) -> Tensor:
        return function.value_at(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Scalar], output: Tensor) -> None:
        x, ctx.function = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradients[0] * ctx.function.slope_at(x), None


class _EvaluateEitherWay(_Evaluate):
    """The same with what Dynamo does not trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangents[0] * ctx.function.slope_at(x)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, function: Scalar) -> tuple[Tensor, Any]:
        return _EvaluateEitherWay.apply(x, function), in_dims[0]
