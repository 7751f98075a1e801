"""Gaussian profiles: the divergence of two Gaussians of one covariance as a function h of their distance s.

With s the squared Mahalanobis distance, log(p/q) under q is normal with mean -s/2 and variance s, hence for every f

    h(s) = E[f(e^v)],    h'(s) = E[kappa(v)] / 2,    v ~ N(-s/2, s),    kappa(v) = r^2 f''(r),  r = e^v

(differentiate under the integral and use that N(-s/2, s) solves the heat equation with drift). Completing the square,

    h'(s) = e^(-s/8) / 2 * E[e^(-v/2) kappa(v)],    v ~ N(0, s):

a positive integrand, so nothing cancels. A kink of f at u = g, where f' jumps by j, adds j g n(log g) / 2 with n the
density of N(-s/2, s): so total variation and the hockey stick need no case of their own.

Where h is elementary, (c, k) give h(s) = c expm1(k s)/k. Everything else is tabulated once, in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fdu_kernels.scalar import MAX_EXPONENT, Scalar, on_the_cpu

Curvature = Callable[[Tensor], Tensor]
"""v -> log kappa(v), without the kinks."""
Kinks = tuple[tuple[float, float], ...]
"""(u, jump of f' there)."""

HEADER_ROWS = 4
"""Rows of a table before its first entry."""
FIRST_S = 1e-12
"""The table begins here; below, h and h' follow the power of s that they have here (exact to first order)."""
LAST_S = 1e4
"""And ends here, where h' of every saturating divergence is below e^(-1250)."""
STEP = 1 / 32
"""In log s. The polynomial through 8 neighbours then errs by less than 1e-12 also where log h' falls like -s/8."""
NEIGHBOURS = 8
SHORT = 1e-13
"""Share of the largest term that the outermost usable term of the quadrature may have."""
SMALLEST_S = 1e-30
"""h' is not evaluated closer to 0: where f has a kink at 1 it is infinite there, and 0 times inf would be NaN."""


class Grid(NamedTuple):
    """Where the rows of a table lie, and how it goes on beyond them.

    Row i is at t = log s = first + i step. Between the rows bottom and top all 8 neighbours of a place are there. powers:
    d log h/dt and d log h'/dt at ``bottom``. linear_beyond: the s beyond which h is a straight line; inf where h' has
    vanished instead. smallest: the s below which h' is not evaluated.
    """

    first: float
    step: float
    bottom: int
    top: int
    powers: tuple[float, float]
    linear_beyond: float
    smallest: float


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianProfile:
    """h(s) = c expm1(k s)/k, and c s for k = 0, continued as a straight line beyond ``linear_beyond``; or a table.

    table: None, or float64 [HEADER_ROWS + n, 2] on the CPU, for kernels to read: the numbers of the grid in the rows
    (first, step), (bottom, top), powers, (linear_beyond, smallest s); then log h and log h' by row. Power laws at s -> 0
    are straight lines in these variables.
    """

    c: float
    k: float
    linear_beyond: float
    table: Tensor | None = None
    grid: Grid | None = None

    @staticmethod
    def exponential(c: float, k: float) -> GaussianProfile:
        """An elementary profile."""
        return GaussianProfile(c, k, MAX_EXPONENT / k if k > 0 else math.inf)

    def table_on(self, device: torch.device) -> Tensor | None:
        """The table on a device, moved there once."""
        return self.table if self.table is None or self.table.device == device else _moved(self, device)

    def scalar(self) -> Scalar:
        """h in PyTorch operations: twice differentiable at s >= 0 of any shape, in float32 or float64."""
        c, k = self.c, self.k
        if self.grid is not None:
            return Scalar(lambda s: self._read(s, 0), lambda s: self._read(s, 1), high=self.linear_beyond)
        if k == 0:
            return Scalar(lambda s: c * s, lambda s: c + 0 * s.clamp(0, 1))
        return Scalar(lambda s: torch.expm1(k * s) * (c / k), lambda s: c * torch.exp(k * s), high=self.linear_beyond)

    def _read(self, s: Tensor, column: int) -> Tensor:
        """h (column 0) or h' (column 1), interpolated in float64 where there is one, and returned in the dtype of s."""
        table, grid = self.table_on(s.device), self.grid
        assert table is not None and grid is not None
        wide = s.to(table.dtype)
        inside = wide.clamp(min=grid.smallest)
        t = (torch.log(inside) - grid.first) / grid.step
        position = t.clamp(grid.bottom, grid.top)
        # A NaN has no place in the table: it takes the first one and stays NaN through its offset.
        index = torch.nan_to_num(position.detach(), nan=grid.bottom).floor().long().clamp(max=grid.top - 1)
        neighbours = torch.arange(1 - NEIGHBOURS // 2, NEIGHBOURS // 2 + 1, device=s.device) + HEADER_ROWS
        rows = table[index[..., None] + neighbours, column]
        result = torch.exp((_lagrange_weights(position - index) * rows).sum(-1))
        below = torch.exp(grid.powers[column] * grid.step * (t - grid.bottom).clamp(max=0))
        result = result * below
        if column == 0:
            # Not s / inside, which is inf / inf for the largest s.
            result = result * (wide.clamp(max=grid.smallest) / grid.smallest)
        return result.to(s.dtype)


def _lagrange_weights(x: Tensor) -> Tensor:
    """Weights [..., 8] of the polynomial through the nodes -3 ... 4, at x in [0, 1]."""
    nodes = range(1 - NEIGHBOURS // 2, NEIGHBOURS // 2 + 1)
    weights = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        product = (x - others[0]) / (node - others[0])
        for other in others[1:]:
            product = product * (x - other) / (node - other)
        weights.append(product)
    return torch.stack(weights, -1)


@functools.cache
def _moved(profile: GaussianProfile, device: torch.device) -> Tensor:
    # For good: a captured graph may read it. The dtype first: the device may not have that of the table.
    assert profile.table is not None
    with on_the_cpu():
        return profile.table.to(_reading_dtype(device)).to(device)


def _reading_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it: to a relative error of about 1e-5."""
    if device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        return torch.float32
    return torch.float64


def tabulated_profile(name: str, log_curvature: Curvature | None, kinks: Kinks) -> GaussianProfile:
    """Tabulate h and h' from log kappa (None: f is piecewise linear) and the kinks, on the CPU. ``name`` is for messages.

    Raises:
        ValueError: the curvature is not finite where the quadrature needs it, or f has none at all.
    """
    with on_the_cpu():
        return _tabulate(name, log_curvature, kinks)


def _tabulate(name: str, log_curvature: Curvature | None, kinks: Kinks) -> GaussianProfile:
    margin = NEIGHBOURS // 2
    first = math.log(FIRST_S) - margin * STEP
    count = math.ceil((math.log(LAST_S) - first) / STEP) + margin + 1
    t = first + STEP * torch.arange(count, dtype=torch.float64)
    log_slopes = log_slope_by_quadrature(log_curvature, kinks, torch.exp(t))
    # Grid points beyond the straight line's beginning serve as neighbours only.
    growing = torch.nonzero(log_slopes > MAX_EXPONENT)
    if len(growing):
        count = min(count, int(growing[0]) + margin + 1)
    unknown = torch.nonzero(log_slopes.isnan())
    if len(unknown):
        count = min(count, int(unknown[0]))
    t, log_slopes = t[:count], log_slopes[:count]
    if count <= 2 * margin:
        raise ValueError(f"the generator of {name!r} has no finite, positive curvature on which to build h")
    if not bool(torch.isfinite(log_slopes).all()):
        raise ValueError(f"the generator of {name!r} has no finite, positive curvature on which to build h")

    power = float(log_slopes[1] - log_slopes[0]) / STEP
    at_first = log_slopes[0] + t[0] - math.log1p(power)
    panels = _log_integrals(log_curvature, kinks, t)
    log_values = torch.logcumsumexp(torch.cat([at_first[None], panels]), 0)

    top = count - 1 - margin
    last_s = math.exp(float(t[top]))
    saturated = float(log_slopes[top]) < math.log(torch.finfo(torch.float64).tiny)
    grid = Grid(first, STEP, margin, top, (power + 1, power), math.inf if saturated else last_s, SMALLEST_S)
    header = [[first, STEP], [margin, top], list(grid.powers), [grid.linear_beyond, SMALLEST_S]]
    table = torch.cat([torch.tensor(header, dtype=torch.float64), torch.stack([log_values, log_slopes], -1)])
    return GaussianProfile(0.0, 0.0, grid.linear_beyond, table.contiguous(), grid)


def _log_integrals(log_curvature: Curvature | None, kinks: Kinks, t: Tensor) -> Tensor:
    """log of the integral of h' over each interval of the grid, by 5 Gauss-Legendre points in log s."""
    root = math.sqrt(10 / 7)
    outer, inner = math.sqrt(5 + 2 * root) / 3, math.sqrt(5 - 2 * root) / 3
    outer_weight, inner_weight = (322 - 13 * math.sqrt(70)) / 900, (322 + 13 * math.sqrt(70)) / 900
    rule = [
        (-outer, outer_weight), (-inner, inner_weight), (0.0, 128 / 225), (inner, inner_weight), (outer, outer_weight),
    ]  # fmt: skip
    terms = []
    for node, weight in rule:
        points = t[:-1] + STEP * (1 + node) / 2
        log_slopes = log_slope_by_quadrature(log_curvature, kinks, torch.exp(points))
        terms.append(log_slopes + points + math.log(weight * STEP / 2))
    return torch.logsumexp(torch.stack(terms), 0)


def log_slope_by_quadrature(log_curvature: Curvature | None, kinks: Kinks, s: Tensor) -> Tensor:
    """log h'(s) for ascending float64 s [n] by the trapezoidal rule, exponentially exact for analytic integrands.

    The step in v resolves both the normal density (half a standard deviation) and the poles of kappa, which
    lie at a distance of pi from the real line for every smooth entry of the catalogue (0.4). Where kappa grows like
    e^(a v) the integrand's mass is at v = (a - 1/2) s, and the grid reaches 12 standard deviations beyond it.

    NaN where the mass lies in part beyond what is known of a user's kappa; inf far beyond MAX_EXPONENT.
    """
    if log_curvature is None:
        return _log_slope_of_kinks(kinks, s)
    growth = _growth(log_curvature)
    parts = []
    for rows in s.split(32):
        steps = torch.clamp(torch.sqrt(rows) / 2, max=0.4)[:, None]
        if bool((steps == steps[0]).all()):
            steps = steps[:1]
        reach = growth * rows.max() + 12 * torch.sqrt(rows.max())
        count = max(500, math.ceil(float(reach / steps.min())))
        v = steps * torch.arange(-count, count + 1, dtype=torch.float64)
        log_terms = log_curvature(v) - v / 2 - v.square() / (2 * rows[:, None])
        log_mean = torch.logsumexp(torch.where(log_terms.isnan(), -math.inf, log_terms), -1)
        log_mean = log_mean + torch.log(steps[:, 0] / torch.sqrt(2 * math.pi * rows))
        log_mean = torch.where(_falls_short(log_terms), math.nan, log_mean)
        parts.append(log_mean - rows / 8 - math.log(2))
        if bool((parts[-1] > MAX_EXPONENT).all()):
            break
    parts.append(s.new_full((len(s) - sum(map(len, parts)),), math.inf))
    return torch.logaddexp(torch.cat(parts), _log_slope_of_kinks(kinks, s))


def _growth(log_curvature: Callable[[Tensor], Tensor]) -> float:
    """The largest |v| / s at which the integrand has a maximum, from the slopes of log kappa far out."""
    left, left_end, right_end, right = log_curvature(torch.tensor([-200.0, -190.0, 190.0, 200.0], dtype=torch.float64))
    slopes = torch.stack([0.5 - (left_end - left) / 10, (right - right_end) / 10 - 0.5])
    return float(slopes.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0).max())


def _falls_short(log_terms: Tensor) -> Tensor:
    """Which rows [n] have a NaN beside a term that counts."""
    unknown = log_terms.isnan()
    beside = torch.zeros_like(unknown)
    beside[:, 1:] |= unknown[:, :-1]
    beside[:, :-1] |= unknown[:, 1:]
    outermost = torch.where(beside & ~unknown, log_terms, -math.inf).amax(-1)
    largest = torch.where(unknown, -math.inf, log_terms).amax(-1)
    return unknown.any(-1) & (outermost > largest + math.log(SHORT))


def _log_slope_of_kinks(kinks: Kinks, s: Tensor) -> Tensor:
    result = torch.full_like(s, -math.inf)
    for location, jump in kinks:
        deviation = math.log(location) + s / 2
        log_density = -deviation.square() / (2 * s) - torch.log(2 * math.pi * s) / 2
        result = torch.logaddexp(result, math.log(jump * location / 2) + log_density)
    return result
