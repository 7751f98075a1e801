"""The critic terms A(v), B(v) of the variational bound, as rows of numbers over one small basis.

With v = log p/q the log density ratio, D_f(p || q) >= E_p[A(v)] - E_q[B(v)], where A(v) = f'(e^v) and
B(v) = f*(A(v)) = e^v f'(e^v) - f(e^v); equality holds at the true ratio (Nowozin et al. 2016, f-GAN, eq. 4-6;
Novello et al. 2026, arXiv 2509.21167). The estimators follow from the same two rows, since

    f(r) = e^v A(v) - B(v)      with derivative  e^v A(v)   in v      (samples from q)
    f(r)/r = A(v) - e^-v B(v)   with derivative  e^-v B(v)  in v      (samples from p)
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from fdu_kernels.scalar import MAX_EXPONENT, Scalar

DERIVATIVE, FIRST, SECOND = 0.0, 1.0, 2.0
"""What the slope of an :class:`ElementFunction` is."""


@dataclasses.dataclass(frozen=True)
class CriticRow:
    """Coefficients of one function of v over the basis; x = scale v, sigma = sigmoid(x + logit), T = 2 sigma - 1.

    row(v) = const + linear v + square v^2 + exp e^(exp_rate v) + expm1 (e^(expm1_rate v) - 1)
             + softplus log(1 - mix + mix e^x) + sigmoid sigma + tanh T + tanh_squared T^2 + step [v > threshold]

    mix is sigmoid(logit): so neither mix nor 1 - mix loses digits where it is small. The softplus is shifted to vanish
    at v = 0, the step is 1/2 at its threshold. exp loses digits near v = 0, expm1 where e^v
    is small, so both are there. The same holds for a sigmoid and T, which is exact near 0.
    """

    const: float = 0.0
    linear: float = 0.0
    square: float = 0.0
    exp: float = 0.0
    exp_rate: float = 0.0
    expm1: float = 0.0
    expm1_rate: float = 0.0
    softplus: float = 0.0
    sigmoid: float = 0.0
    tanh: float = 0.0
    tanh_squared: float = 0.0
    scale: float = 1.0
    logit: float = 0.0
    step: float = 0.0
    threshold: float = 0.0

    @property
    def rate(self) -> float:
        """The largest rate of growth of its exponentials, 0 without any."""
        return max(abs(self.exp_rate) if self.exp else 0.0, abs(self.expm1_rate) if self.expm1 else 0.0)

    def value(self, v: Tensor, tilt: float = 0.0) -> Tensor:
        """e^(tilt v) row(v). The factor joins each exponential's exponent, so that 0 times inf never arises."""
        # A term without a coefficient is none, also at infinity; a NaN stays one, whatever the terms.
        factor = torch.exp(tilt * v) if tilt else 1.0
        result = self.const + torch.where(v == v, 0.0, v)
        if self.linear or self.square:
            result = result + v * (self.linear + self.square * v)
        result = result * factor
        if self.exp:
            result = result + self.exp * torch.exp((self.exp_rate + tilt) * v)
        if self.expm1:
            x = self.expm1_rate * v
            positive = -torch.expm1(-x.clamp(min=0)) * torch.exp(tilt * v + x.clamp(min=0))
            result = result + self.expm1 * torch.where(x > 0, positive, torch.expm1(x.clamp(max=0)) * factor)
        if self.softplus:
            result = result + self.softplus * _shifted_softplus(self.scale * v, self.logit) * factor
        if self.sigmoid:
            result = result + self.sigmoid * torch.sigmoid(self.scale * v + self.logit) * factor
        if self.tanh or self.tanh_squared:
            tanh = torch.tanh((self.scale * v + self.logit) / 2)
            result = result + tanh * (self.tanh + self.tanh_squared * tanh) * factor
        if self.step:
            result = result + self.step * (0.5 + 0.5 * torch.sign(v - self.threshold)) * factor
        return result

    def slope(self, v: Tensor) -> Tensor:
        """row'(v). The step counts for nothing, as in autograd."""
        result = self.linear + torch.where(v == v, 0.0, v)
        if self.square:
            result = result + 2 * self.square * v
        if self.exp:
            result = result + self.exp * self.exp_rate * torch.exp(self.exp_rate * v)
        if self.expm1:
            result = result + self.expm1 * self.expm1_rate * torch.exp(self.expm1_rate * v)
        if self.softplus or self.sigmoid or self.tanh or self.tanh_squared:
            x = self.scale * v + self.logit
            sigma, rest = torch.sigmoid(x), torch.sigmoid(-x)
            # softplus' = sigma (sigma + rest): written so, the softplus and the sigmoid of shifted_log cancel exactly.
            inner = self.softplus * sigma + (self.softplus + self.sigmoid) * rest
            # T' = 2 sigma rest and T = sigma - rest: so the two terms of le_cam's A and B cancel exactly.
            above, below = self.tanh + 2 * self.tanh_squared, self.tanh - 2 * self.tanh_squared
            result = result + self.scale * sigma * (inner + 2 * rest * (above * sigma + below * rest))
        return result


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), to full relative accuracy."""
    small = math.exp(-abs(x))
    return (1 if x > 0 else small) / (1 + small)


def _shifted_softplus(x: Tensor, logit: float) -> Tensor:
    """log(1 - mix + mix e^x), to full relative accuracy also near x = 0."""
    mix, rest = sigmoid(logit), sigmoid(-logit)
    # Where mix e^x is the larger summand, it is taken out of the logarithm: elsewhere x and the logarithm would cancel.
    falling, rising = -x.clamp(min=-logit), x.clamp(max=-logit)
    above = x + _logarithm(mix + rest * torch.exp(falling), rest * torch.expm1(falling))
    return torch.where(x > -logit, above, _logarithm(rest + mix * torch.exp(rising), mix * torch.expm1(rising)))


def _logarithm(u: Tensor, less_one: Tensor) -> Tensor:
    """log(u), given u - 1 as well, which is the more accurate one where u is near 1."""
    return torch.where(less_one.abs() < 0.5, torch.log1p(less_one), torch.log(u))


ROW_FIELDS = tuple(field.name for field in dataclasses.fields(CriticRow))
"""The order in which a row's numbers are packed."""
_COEFFICIENTS = ("const", "linear", "square", "exp", "expm1", "softplus", "sigmoid", "tanh", "tanh_squared", "step")


@dataclasses.dataclass(frozen=True)
class ElementFunction:
    """y(v) = e^(first_tilt v) first(v) - e^(second_tilt v) second(v), and its slope, for one element v.

    slope: DERIVATIVE (first'(v); there is no second row and no tilt then), or the tilted FIRST or SECOND row itself.
    Beyond |v| = limit, y is a straight line with the slope of the end. Every divergence of the catalogue has this form.
    """

    first: CriticRow
    first_tilt: float
    second: CriticRow
    second_tilt: float
    slope: float
    limit: float
    numbers: tuple[float, ...] = dataclasses.field(init=False, repr=False, compare=False)
    """[limit, slope, first_tilt, *first, second_tilt, *second], rows in the order of ROW_FIELDS: what kernels get."""

    def __post_init__(self) -> None:
        first, second = (tuple(getattr(row, name) for name in ROW_FIELDS) for row in (self.first, self.second))
        numbers = (self.limit, self.slope, self.first_tilt, *first, self.second_tilt, *second)
        object.__setattr__(self, "numbers", tuple(map(float, numbers)))
        for row, tilt in ((self.first, self.first_tilt), (self.second, self.second_tilt)):
            exponents = (tilt, row.exp_rate + tilt if row.exp else 0.0, row.expm1_rate if row.expm1 else 0.0)
            largest = max(map(abs, exponents))
            # e^87 and e^-87 are normal numbers of float32.
            assert largest == 0 or largest * self.limit <= 87, "kernels trust the limit"

    @staticmethod
    def of(numbers: tuple[float, ...]) -> ElementFunction:
        """The function whose ``numbers`` these are."""
        limit, slope, first_tilt, *rest = numbers
        count = len(ROW_FIELDS)
        first, second_tilt, second = CriticRow(*rest[:count]), rest[count], CriticRow(*rest[count + 1 :])
        return ElementFunction(first, first_tilt, second, second_tilt, slope, limit)

    def scalar(self) -> Scalar:
        """The same in PyTorch operations."""
        first = functools.partial(self.first.value, tilt=self.first_tilt)
        second = functools.partial(self.second.value, tilt=self.second_tilt)
        if self.slope == DERIVATIVE:
            return Scalar(first, self.first.slope, -self.limit, self.limit)
        slope = first if self.slope == FIRST else second
        return Scalar(lambda v: first(v) - second(v), slope, -self.limit, self.limit)

    def negated(self) -> ElementFunction:
        """-y(v), of a function that is one row."""
        assert self.slope == DERIVATIVE
        negative = {name: -getattr(self.first, name) for name in _COEFFICIENTS}
        return dataclasses.replace(self, first=dataclasses.replace(self.first, **negative))


def critic_functions(rows: tuple[CriticRow, CriticRow]) -> tuple[ElementFunction, ElementFunction]:
    """A(v) and B(v)."""
    rate = max(row.rate for row in rows)
    limit = MAX_EXPONENT / rate if rate else math.inf
    a, b = (ElementFunction(row, 0.0, CriticRow(), 0.0, DERIVATIVE, limit) for row in rows)
    return a, b


def ratio_function(rows: tuple[CriticRow, CriticRow], samples_from: str) -> ElementFunction:
    """The density-ratio estimator's integrand as a function of v = log p/q: f(r) for "q", f(r)/r for "p"."""
    a, b = rows
    limit = MAX_EXPONENT / max(1.0, a.rate, b.rate)
    if samples_from == "q":
        return ElementFunction(a, 1.0, b, 0.0, FIRST, limit)
    return ElementFunction(a, 0.0, b, -1.0, SECOND, limit)
