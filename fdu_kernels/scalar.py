"""Scalar functions that state their derivative, applied elementwise and continued as straight lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_EXPONENT = 64.0
"""Where exp(k x) occurs, the function continues as a straight line beyond k x = MAX_EXPONENT, in every dtype and
backend. exp(64) = 6e27 leaves the line ten further decades in float32."""


@dataclasses.dataclass(frozen=True)
class Scalar:
    """y(x) with y'(x), both elementwise; outside [low, high] a straight line with the slope of the end.

    Autograd uses ``slope`` for the derivative and differentiates ``slope`` itself for the second one: differentiating
    ``value`` would lose digits in the tails, where the terms of its derivative cancel. NaN gives NaN.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, x: Tensor) -> Tensor:
        """y(x), twice differentiable."""
        result: Tensor = _Evaluate.apply(x, self)
        return result

    def negated(self) -> Scalar:
        """-y(x)."""
        value, slope = self.value, self.slope
        return Scalar(lambda x: -value(x), lambda x: -slope(x), self.low, self.high)

    def value_at(self, x: Tensor) -> Tensor:
        """y(x), for use without autograd."""
        if math.isinf(self.low) and math.isinf(self.high):
            return self.value(x)
        inside = x.clamp(self.low, self.high)
        return self.value(inside) + self.slope(inside) * (x - inside)

    def slope_at(self, x: Tensor) -> Tensor:
        """y'(x), once differentiable."""
        return self.slope(x.clamp(self.low, self.high))


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Scalar) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function.value_at(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradients[0] * ctx.function.slope_at(x), None
