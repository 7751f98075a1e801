"""The variational bound D_f >= E_p[A(v)] - E_q[B(v)] in a critic's output v: A and B as rows of numbers.

With v = log(p/q), A(v) = f'(e^v) and B(v) = e^v f'(e^v) - f(e^v), the conjugate f* at A(v). Because A of f is minus B
of the adjoint generator u f(1/u) at -v, one short basis serves both, with B read at v and A at -v.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class CriticTerm(Protocol):
    """A or B: a function of the critic's output, elementwise on tensors of any shape."""

    def value(self, v: Tensor) -> Tensor:
        """The term at v."""

    def slope(self, v: Tensor) -> Tensor:
        """Its derivative, in operations that autograd can differentiate again."""


@dataclasses.dataclass(frozen=True)
class CriticRow:
    """One term as numbers, in x = rate (v - shift):

    constant + linear x + square x^2 + exponential e^(exponent x) + softplus(x) + sigmoid(x) + sigmoid(x)^2 + [x > 0].
    """

    constant: float = 0.0
    linear: float = 0.0
    square: float = 0.0
    exponential: float = 0.0
    exponent: float = 1.0
    softplus: float = 0.0
    sigmoid: float = 0.0
    sigmoid_square: float = 0.0
    step: float = 0.0
    rate: float = 1.0
    shift: float = 0.0

    def value(self, v: Tensor) -> Tensor:
        x = self.rate * (v - self.shift)
        total = torch.zeros_like(x) + self.constant
        if self.linear:
            total = total + self.linear * x
        if self.square:
            total = total + self.square * x.square()
        if self.exponential:
            total = total + self.exponential * torch.exp(self.exponent * x)
        if self.softplus:
            total = total + self.softplus * (F.relu(x) + torch.log1p(torch.exp(-x.abs())))
        if self.sigmoid:
            total = total + self.sigmoid * torch.sigmoid(x)
        if self.sigmoid_square:
            total = total + self.sigmoid_square * torch.sigmoid(x).square()
        if self.step:
            total = total + self.step * torch.heaviside(x, torch.full_like(x, 0.5))
        return torch.where(torch.isnan(v), v, total)

    def slope(self, v: Tensor) -> Tensor:
        x = self.rate * (v - self.shift)
        up, down = torch.sigmoid(x), torch.sigmoid(-x)
        total = self.linear + 2 * self.square * x
        if self.exponential:
            total = total + self.exponential * self.exponent * torch.exp(self.exponent * x)
        # With 1 = up + down no two terms cancel, so that the tails keep all their digits.
        total = total + self.softplus * up.square() + (self.softplus + self.sigmoid) * up * down
        return self.rate * (total + 2 * self.sigmoid_square * up.square() * down)


@dataclasses.dataclass(frozen=True)
class GeneratedTerm:
    """A or B of a generator that only its user knows, by automatic differentiation of f."""

    f: Callable[[Tensor], Tensor]
    conjugate: bool
    """B if true, else A."""

    def value(self, v: Tensor) -> Tensor:
        u = torch.exp(v)
        first = derivative(self.f, u)
        return u * first - self.f(u) if self.conjugate else first

    def slope(self, v: Tensor) -> Tensor:
        u = torch.exp(v)
        second = derivative(lambda w: derivative(self.f, w), u)
        return u * u * second if self.conjugate else u * second


def derivative(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """The elementwise derivative of ``function`` at u, itself differentiable."""
    with torch.enable_grad():
        point = u if u.requires_grad else u.detach().requires_grad_(True)
        output = function(point)
        if not output.requires_grad:
            return torch.zeros_like(u)
        (result,) = torch.autograd.grad(output.sum(), point, create_graph=True, allow_unused=True)
    if result is None:
        return torch.zeros_like(u)
    return result if u.requires_grad else result if torch.is_grad_enabled() else result.detach()


class _Evaluate(torch.autograd.Function):
    """A term with its slope as exact derivative: autograd through the sum would lose digits in the tails."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, term: CriticTerm) -> Tensor:
        ctx.save_for_backward(v)
        ctx.term = term
        return term.value(v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return gradients[0] * ctx.term.slope(v), None


def value(term: CriticTerm, v: Tensor) -> Tensor:
    """A or B at v of any shape, differentiable twice. NaN gives NaN."""
    result: Tensor = _Evaluate.apply(v, term)
    return result
