"""Gaussian profiles: the divergence of two Gaussians of one covariance as a function h of their distance s.

With s the squared Mahalanobis distance, every f-divergence between N(a, C) and N(b, C) is

    h(s) = E[f(exp(sqrt(s) z - s/2))],    z ~ N(0, 1),

because log(p/q) is itself normal. Differentiating under the integral and completing the square,

    h'(s) = exp(-s/8) / 2 * E[g(sqrt(s) z)],    g(v) = exp(3v/2) f''(exp(v)).

Three kinds of profile: elementary (two numbers), kinked (f piecewise linear, one number), and tabulated (any other f).
All of them take tensors of any shape, give values and slopes of the same shape, and continue as a straight line
beyond ``end``, so that neither value nor gradient overflows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_EXPONENT = 80.0
"""A profile that grows like exp(k s) is a straight line from k s = MAX_EXPONENT on: exp(80) = 5.5e34 still fits fp32."""

LARGEST_TABULATED_S = 1000.0
"""Where tables end: there h' of the saturating divergences is below exp(-125), nothing even in float64 gradients."""


class Profile(Protocol):
    """h and h' on tensors of s >= 0; ``end`` is where the straight line begins (inf: never)."""

    end: float

    def value(self, s: Tensor) -> Tensor:
        """h(s)."""

    def slope(self, s: Tensor) -> Tensor:
        """h'(s), in operations that autograd can differentiate again."""


class _Evaluate(torch.autograd.Function):
    """h with h' as its exact derivative: autograd through the formula of h would lose digits in the tails."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, profile: Profile) -> Tensor:
        ctx.save_for_backward(s)
        ctx.profile = profile
        inside = s.clamp(max=profile.end)
        value = profile.value(inside)
        return value if math.isinf(profile.end) else value + profile.slope(inside) * (s - inside)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        return gradients[0] * slope(ctx.profile, s), None


def value(profile: Profile, s: Tensor) -> Tensor:
    """h(s) for s >= 0 of any shape, differentiable twice. NaN gives NaN."""
    result: Tensor = _Evaluate.apply(s, profile)
    return result


def slope(profile: Profile, s: Tensor) -> Tensor:
    """h'(s) for s >= 0 of any shape, differentiable. NaN gives NaN."""
    return profile.slope(s.clamp(max=profile.end))


@dataclasses.dataclass(frozen=True)
class ElementaryProfile:
    """h(s) = c expm1(k s) / k, and c s where k = 0: two numbers for every elementary closed form."""

    c: float
    k: float

    @property
    def end(self) -> float:
        return MAX_EXPONENT / self.k if self.k > 0 else math.inf

    def value(self, s: Tensor) -> Tensor:
        return self.c * s if self.k == 0 else torch.expm1(self.k * s) * (self.c / self.k)

    def slope(self, s: Tensor) -> Tensor:
        # 0 s keeps a NaN a NaN where k = 0, and gives autograd its zero second derivative.
        return self.c * torch.exp(self.k * s) if self.k else self.c + 0 * s


@dataclasses.dataclass(frozen=True)
class KinkedProfile:
    """f(u) = max(u - g, 0) - max(1 - g, 0): h is a Black-Scholes price, h' = phi(d) / (2 sqrt(s)).

    g = 1 is total variation, h(s) = erf(sqrt(s / 8)). There h' is infinite at 0 and the subgradient 0 is returned.
    """

    threshold: float
    end: float = math.inf

    def value(self, s: Tensor) -> Tensor:
        if self.threshold == 1:
            return torch.erf(torch.sqrt(s / 8))
        root, distance = self._distance(s)
        sign = 1.0 if self.threshold > 1 else -1.0
        # Below 1 the price of the put, which equals it, needs no constant subtracted.
        price = _normal_cdf(sign * distance) - self.threshold * _normal_cdf(sign * (distance - root))
        return torch.where(s == 0, torch.zeros_like(s), sign * price)

    def slope(self, s: Tensor) -> Tensor:
        root, distance = self._distance(s)
        density = torch.exp(-distance.square() / 2) / (2 * math.sqrt(2 * math.pi) * root)
        return torch.where(s == 0, torch.zeros_like(s), density)

    def _distance(self, s: Tensor) -> tuple[Tensor, Tensor]:
        root = torch.sqrt(torch.where(s == 0, torch.ones_like(s), s))
        return root, root / 2 - math.log(self.threshold) / root


def _normal_cdf(x: Tensor) -> Tensor:
    return torch.erfc(-x / math.sqrt(2)) / 2


class TabulatedProfile:
    """h and h' of any twice differentiable f, as piecewise polynomials computed once in float64.

    With x = log(1 + s), log(h(s) / s) and log h'(s) are smooth from s = 0 on, so an absolute error of the table is a
    relative error of h and h'. Panels of width 1/8 in x hold one polynomial of degree 9 each: 10 reads a sample. The
    error is below 1e-12 where g is analytic in a strip of width pi, as it is for every divergence of the catalogue.
    """

    PANEL_WIDTH = 0.125
    DEGREE = 9

    def __init__(self, tilted_curvature: Callable[[Tensor], Tensor], spread: float = 0.0) -> None:
        """Tabulate.

        Args:
            tilted_curvature: v -> g(v) = exp(3v/2) f''(exp(v)), float64 of any shape, >= 0.
            spread: how fast g may grow: at most like exp(spread |v|).
        """
        self.log_values, self.log_slopes, self.end = _tabulate(tilted_curvature, spread, self.PANEL_WIDTH, self.DEGREE)
        self._copies: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def value(self, s: Tensor) -> Tensor:
        return s * torch.exp(self._interpolate(s, 0))

    def slope(self, s: Tensor) -> Tensor:
        return torch.exp(self._interpolate(s, 1))

    def _interpolate(self, s: Tensor, which: int) -> Tensor:
        key = (s.dtype, s.device)
        if key not in self._copies:
            self._copies[key] = (self.log_values.to(s), self.log_slopes.to(s))
        table = self._copies[key][which]
        x = torch.log1p(s)
        position = x / self.PANEL_WIDTH
        # A NaN has no panel; it takes the first one and stays NaN through x.
        panel = torch.nan_to_num(position.detach()).long().clamp(0, len(table) - 1)
        t = 2 * (position - panel) - 1
        coefficients = table[panel]
        result = coefficients[..., -1]
        for power in range(table.shape[1] - 2, -1, -1):
            result = result * t + coefficients[..., power]
        return result


def _tabulate(
    tilted_curvature: Callable[[Tensor], Tensor], spread: float, width: float, degree: int
) -> tuple[Tensor, Tensor, float]:
    """Coefficients [panels, degree + 1] of log(h/s) and of log h', ascending powers of t in [-1, 1], and the end."""
    nodes = torch.cos(math.pi * (torch.arange(degree + 1, dtype=torch.float64) + 0.5) / (degree + 1))
    to_coefficients = torch.linalg.inv(nodes[:, None] ** torch.arange(degree + 1, dtype=torch.float64))
    points, weights = _gauss_legendre(16)
    values, slopes = [], []
    panels = math.ceil(math.log1p(LARGEST_TABULATED_S) / width)
    height, start = torch.zeros((), dtype=torch.float64), 0.0
    for panel in range(panels):
        stop = math.expm1((panel + 1) * width)
        s = torch.expm1((panel + (nodes + 1) / 2) * width)
        ends = torch.cat([s, torch.tensor([stop], dtype=torch.float64)])
        # h at each node: h at the panel's start plus the integral of h' from there, by 16 points each.
        inner = start + (ends - start)[:, None] * points
        h_slope = slope_by_quadrature(tilted_curvature, s, spread)
        h = height + (ends - start) * (slope_by_quadrature(tilted_curvature, inner, spread) @ weights)
        usable = torch.isfinite(h_slope).all() and bool((h_slope > 0).all()) and bool((h > 0).all())
        if not usable or h_slope.max() > math.exp(MAX_EXPONENT):
            break
        slopes.append(to_coefficients @ torch.log(h_slope))
        values.append(to_coefficients @ torch.log(h[:-1] / s))
        height, start = h[-1], stop
    if not slopes:
        raise ValueError("f has no finite, positive second derivative near u = 1, so its Gaussian profile has no table")
    return torch.stack(values), torch.stack(slopes), start


def slope_by_quadrature(tilted_curvature: Callable[[Tensor], Tensor], s: Tensor, spread: float) -> Tensor:
    """h'(s) in float64 by the trapezoidal rule, which converges exponentially for analytic integrands.

    The step is at most 1/2 in v, which resolves poles of g at a distance of pi, and s^(1/2)/8; the range covers nine
    standard deviations around the places to which a factor exp(spread |v|) can move the mass.
    """
    largest = float(s.max())
    # Without a spread g falls off like exp(-|v|/2) at least, and exp(-45) is nothing in float64.
    reach = 9 * math.sqrt(largest) + spread * largest if spread else min(9 * math.sqrt(largest), 90.0)
    smallest_root = math.sqrt(float(s.min()))
    if smallest_root < 0.25 * math.sqrt(largest):
        return torch.stack([slope_by_quadrature(tilted_curvature, part, spread) for part in s.unbind(0)])
    if reach > 690:
        return torch.full_like(s, math.nan)
    step = min(0.5, smallest_root / 8)
    count = math.ceil(reach / step)
    v = torch.arange(-count, count + 1, dtype=torch.float64) * step
    normal = torch.exp(-v.square() / (2 * s[..., None])) / torch.sqrt(2 * math.pi * s)[..., None]
    integrand = torch.where(normal > 0, normal * tilted_curvature(v), torch.zeros_like(normal))
    return torch.exp(-s / 8) / 2 * step * integrand.sum(-1)


def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and weights, by the eigenvalues of the Jacobi matrix (Golub and Welsch 1969)."""
    index = torch.arange(1, count, dtype=torch.float64)
    off_diagonal = index / torch.sqrt(4 * index.square() - 1)
    points, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return (points + 1) / 2, vectors[0].square()
