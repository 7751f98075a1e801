"""The critic terms A(v), B(v) of the variational bound, as rows of numbers over one small basis.

With v = log p/q the log density ratio, D_f(p || q) >= E_p[A(v)] - E_q[B(v)], where A(v) = f'(e^v) and
B(v) = f*(A(v)) = e^v f'(e^v) - f(e^v); equality holds at the true ratio (Nowozin et al. 2016, f-GAN, eq. 4-6;
Novello et al. 2026, arXiv 2509.21167). The estimators follow from the same two rows, since

    f(r) = e^v A(v) - B(v)      with derivative  e^v A(v)   in v      (samples from q)
    f(r)/r = A(v) - e^-v B(v)   with derivative  e^-v B(v)  in v      (samples from p)
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdu_kernels.scalar import MAX_EXPONENT, Scalar

if TYPE_CHECKING:
    from fdu_kernels.divergence import Divergence


@dataclasses.dataclass(frozen=True)
class CriticRow:
    """Coefficients of one function of v over the basis; x = scale v, sigma = sigmoid(x + logit), T = 2 sigma - 1.

    row(v) = const + linear v + square v^2 + exp e^(exp_rate v) + expm1 (e^(expm1_rate v) - 1)
             + softplus log(1 - mix + mix e^x) + sigmoid sigma + tanh T + tanh_squared T^2 + step [v > threshold]

    mix is sigmoid(logit): so neither mix nor 1 - mix loses digits where it is small. The softplus is shifted to
    vanish at v = 0, the step is 1/2 at its threshold. Both an exponential and one less 1
    are there because either alone loses its digits: the first near v = 0, the second where e^v is small. So are both
    a sigmoid and T = tanh((x + logit)/2), which keeps its digits near 0.
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
    def mix(self) -> float:
        """sigmoid(logit)."""
        return _sigmoid(self.logit)

    @property
    def rest_of_mix(self) -> float:
        """1 - mix."""
        return _sigmoid(-self.logit)

    @property
    def rate(self) -> float:
        """The largest rate of growth of its exponentials, 0 without any."""
        return max(abs(self.exp_rate) if self.exp else 0.0, abs(self.expm1_rate) if self.expm1 else 0.0)

    def value(self, v: Tensor, tilt: float = 0.0) -> Tensor:
        """e^(tilt v) row(v). The factor joins each exponential's exponent, so that 0 times inf never arises."""
        # A term without a coefficient is none, also at infinity.
        factor = torch.exp(tilt * v) if tilt else 1.0
        result = self.const + _nothing(v)
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
        result = self.linear + _nothing(v)
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


def _nothing(v: Tensor) -> Tensor:
    """0, and NaN for NaN: a NaN stays one, whatever the terms."""
    return torch.where(v == v, 0.0, v)


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))
    return (1 if x > 0 else small) / (1 + small)


def _shifted_softplus(x: Tensor, logit: float) -> Tensor:
    """log(1 - mix + mix e^x), to full relative accuracy also near x = 0."""
    mix, rest = _sigmoid(logit), _sigmoid(-logit)
    # Where mix e^x is the larger summand, it is taken out of the logarithm: elsewhere x and the logarithm would cancel.
    falling, rising = -x.clamp(min=-logit), x.clamp(max=-logit)
    above = x + _logarithm(mix + rest * torch.exp(falling), rest * torch.expm1(falling))
    return torch.where(x > -logit, above, _logarithm(rest + mix * torch.exp(rising), mix * torch.expm1(rising)))


def _logarithm(u: Tensor, less_one: Tensor) -> Tensor:
    """log(u), given u - 1 as well, which is the more accurate one where u is near 1."""
    return torch.where(less_one.abs() < 0.5, torch.log1p(less_one), torch.log(u))


def critic_terms(divergence: Divergence, parametrization: str) -> tuple[Scalar, Scalar]:
    """A and B of a divergence as functions of the critic output v.

    Args:
        divergence: any but "mse".
        parametrization: "log_ratio" (v estimates log p/q) or "fgan" (v passes f-GAN's output activation, table 6).

    Raises:
        ValueError: the divergence has no critic, or the parametrization is unknown.
    """
    if divergence.generator is None:
        raise ValueError(
            f"divergence {str(divergence)!r} is a Gaussian profile without a generator f, so it has no variational "
            'form and no density-ratio estimate; use "kl" or "jeffreys", whose Gaussian profiles are proportional to it'
        )
    if parametrization not in ("log_ratio", "fgan"):
        raise ValueError(f'parametrization must be "log_ratio" or "fgan", not {parametrization!r}')
    rows = divergence.critic_rows(parametrization)
    if rows is None:
        return _terms_by_autograd(divergence)
    rate = max(row.rate for row in rows)
    limit = MAX_EXPONENT / rate if rate else math.inf
    a, b = (Scalar(row.value, row.slope, -limit, limit) for row in rows)
    return a, b


def ratio_terms(divergence: Divergence, samples_from: str) -> Scalar:
    """The density-ratio estimator's integrand as a function of v = log p/q: f(r) for "q", f(r)/r for "p".

    Raises:
        ValueError: the divergence has no generator, or samples_from is neither "q" nor "p".
    """
    if samples_from not in ("q", "p"):
        raise ValueError(f'samples_from must be "q" (E_q[f(r)]) or "p" (E_p[f(r)/r]), not {samples_from!r}')
    a, b = critic_terms(divergence, "log_ratio")
    rows = divergence.critic_rows("log_ratio")
    if rows is None:
        if samples_from == "q":
            return Scalar(lambda v: divergence.f(torch.exp(v)), lambda v: torch.exp(v) * a.value(v), a.low, a.high)
        return Scalar(
            lambda v: torch.exp(-v) * divergence.f(torch.exp(v)), lambda v: torch.exp(-v) * b.value(v), a.low, a.high
        )
    row_a, row_b = rows
    limit = MAX_EXPONENT / max(1.0, row_a.rate, row_b.rate)
    if samples_from == "q":
        return Scalar(lambda v: row_a.value(v, 1.0) - row_b.value(v), lambda v: row_a.value(v, 1.0), -limit, limit)
    return Scalar(lambda v: row_a.value(v) - row_b.value(v, -1.0), lambda v: row_b.value(v, -1.0), -limit, limit)


def _terms_by_autograd(divergence: Divergence) -> tuple[Scalar, Scalar]:
    """A and B of a user's generator, for |v| up to half of MAX_EXPONENT: u^2 still fits there."""

    def a_value(v: Tensor) -> Tensor:
        return divergence.derivative(torch.exp(v))

    def a_slope(v: Tensor) -> Tensor:
        u = torch.exp(v)
        return u * divergence.second_derivative(u)

    def b_value(v: Tensor) -> Tensor:
        u = torch.exp(v)
        return u * divergence.derivative(u) - divergence.f(u)

    def b_slope(v: Tensor) -> Tensor:
        return torch.exp(v) * a_slope(v)

    limit = MAX_EXPONENT / 2
    return Scalar(a_value, a_slope, -limit, limit), Scalar(b_value, b_slope, -limit, limit)
