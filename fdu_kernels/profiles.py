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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdu_kernels.scalar import MAX_EXPONENT, Scalar

if TYPE_CHECKING:
    from fdu_kernels.divergence import Divergence

FIRST_S = 1e-12
"""The table begins here; below, h and h' follow the power of s that they have here (exact to first order)."""
LAST_S = 1e4
"""And ends here, where h' of every saturating divergence is below e^(-1250)."""
STEP = 1 / 32
"""In log s. The polynomial through 8 neighbours then errs by less than 1e-12 also where log h' falls like -s/8."""
FINER = 2
"""Divides the step where a kink at u != 1 meets a smooth curvature, as far as LARGEST_COUNT allows."""
LARGEST_COUNT = 2900
"""Rows that a finer step may lead to."""
NEIGHBOURS = 8
VANISHED, NEGLIGIBLE = 760.0, 120.0
"""Of (log g)^2/(2 s): what a kink at u = g adds to h' is then below the smallest number, or nothing beside others."""
SHORT = 1e-13
"""Share of the largest term that the outermost usable term of the quadrature may have."""
NO_FLOAT64 = ("mps",)
"""Device types without float64: tables are read there in float32, to a relative error of about 1e-5."""
SMALLEST_S = 1e-30
"""h' is not evaluated closer to 0: where f has a kink at 1 it is infinite there, and 0 times inf would be NaN."""


@dataclasses.dataclass(frozen=True, eq=False)
class ProfileTable:
    """log h and log h' on a uniform grid of t = log s. Power laws at s -> 0 are straight lines in these variables.

    log_values: float64 [n, 2], columns log h and log h', row i at t = first + i step.
    bottom, top: the rows between which every sample's 8 neighbours are centred.
    powers: d log h/dt and d log h'/dt at ``bottom``.
    linear_beyond: the s beyond which h is a straight line; inf where h' has vanished instead.
    """

    first: float
    step: float
    log_values: Tensor
    bottom: int
    top: int
    powers: tuple[float, float]
    linear_beyond: float


def profile(divergence: Divergence) -> Scalar:
    """h of a divergence as a twice differentiable function of s >= 0, float32 or float64, of any shape."""
    if divergence.exponential is not None:
        return _exponential_profile(*divergence.exponential)
    table = profile_table(divergence)
    return Scalar(lambda s: _read(table, s, 0), lambda s: _read(table, s, 1), high=table.linear_beyond)


def _exponential_profile(c: float, k: float) -> Scalar:
    if k == 0:
        return Scalar(lambda s: c * s, lambda s: c + 0 * s.clamp(0, 1))
    return Scalar(
        lambda s: torch.expm1(k * s) * (c / k),
        lambda s: c * torch.exp(k * s),
        high=MAX_EXPONENT / k if k > 0 else math.inf,
    )


def _read(table: ProfileTable, s: Tensor, column: int) -> Tensor:
    """h (column 0) or h' (column 1), interpolated in float64 where there is one, and returned in the dtype of s."""
    wide = s.to(_reading_dtype(s.device))
    inside = wide.clamp(min=SMALLEST_S)
    t = (torch.log(inside) - table.first) / table.step
    position = t.clamp(table.bottom, table.top)
    # A NaN has no place in the table: it takes the first one and stays NaN through its offset.
    index = torch.nan_to_num(position.detach(), nan=table.bottom).floor().long().clamp(max=table.top - 1)
    neighbours = torch.arange(1 - NEIGHBOURS // 2, NEIGHBOURS // 2 + 1, device=s.device)
    rows = _on_device(table, s.device, wide.dtype)[index[..., None] + neighbours, column]
    result = torch.exp((_lagrange_weights(position - index) * rows).sum(-1))
    below = torch.exp(table.powers[column] * table.step * (t - table.bottom).clamp(max=0))
    result = result * below
    if column == 0:
        # Not s / inside, which is inf / inf for the largest s.
        result = result * (wide.clamp(max=SMALLEST_S) / SMALLEST_S)
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


@functools.lru_cache(maxsize=256)
def _on_device(table: ProfileTable, device: torch.device, dtype: torch.dtype) -> Tensor:
    # The dtype first: the device may not have that of the table.
    return table.log_values.to(dtype).to(device)


def _reading_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


@functools.lru_cache(maxsize=256)
def profile_table(divergence: Divergence) -> ProfileTable:
    """Tabulate h and h' of a divergence that has a generator, from its curvature and its kinks. On the CPU.

    Raises:
        ValueError: the curvature is not finite where the quadrature needs it, or f has none at all.
    """
    if divergence.generator is None:
        raise ValueError(f"divergence {str(divergence)!r} has no generator f to tabulate")
    # Whatever torch.set_default_device says: the table needs float64.
    with torch.device("cpu"):
        return _tabulate(divergence)


def _tabulate(divergence: Divergence) -> ProfileTable:
    margin = NEIGHBOURS // 2
    first, step = _grid(divergence)
    count = math.ceil((math.log(LAST_S) - first) / step) + margin + 1
    t = first + step * torch.arange(count, dtype=torch.float64)
    log_slopes = log_slope_by_quadrature(divergence, torch.exp(t))
    # Grid points beyond the straight line's beginning serve as neighbours only.
    growing = torch.nonzero(log_slopes > MAX_EXPONENT)
    if len(growing):
        count = min(count, int(growing[0]) + margin + 1)
    unknown = torch.nonzero(log_slopes.isnan())
    if len(unknown):
        count = min(count, int(unknown[0]))
    t, log_slopes = t[:count], log_slopes[:count]
    if count <= 2 * margin:
        raise ValueError(f"the generator of {str(divergence)!r} has no finite, positive curvature on which to build h")
    if not bool(torch.isfinite(log_slopes).all()):
        raise ValueError(f"the generator of {str(divergence)!r} has no finite, positive curvature on which to build h")

    power = float(log_slopes[1] - log_slopes[0]) / step
    log_values = torch.logaddexp(_log_values_of_rest(divergence, t, step), _log_values_of_kinks(divergence, t, step))

    top = count - 1 - margin
    last_s = math.exp(float(t[top]))
    saturated = float(log_slopes[top]) < math.log(torch.finfo(torch.float64).tiny)
    values = torch.stack([log_values, log_slopes], -1)
    return ProfileTable(
        first=first,
        step=step,
        log_values=values,
        bottom=margin,
        top=top,
        powers=(power + 1, power),
        linear_beyond=math.inf if saturated else last_s,
    )


def _grid(divergence: Divergence) -> tuple[float, float]:
    """Where the table of a divergence begins, as log s, and its step.

    Below the first row h and h' are power laws. Beside a kink at u = g != 1, whose density falls like
    e^(-(log g)^2/(2 s)), they are so only where it has vanished, or adds nothing to what else there is.
    """
    distances = [abs(math.log(place)) for place, _ in divergence.kinks if place != 1]
    alone = divergence.log_curvature is None and len(distances) == len(divergence.kinks)
    start, step = math.log(FIRST_S), STEP
    if distances:
        begins = 2 * math.log(min(distances)) - math.log(2 * (VANISHED if alone else NEGLIGIBLE))
        start = max(begins if alone else min(begins, start), math.log(SMALLEST_S))
    if distances and divergence.log_curvature is not None:
        step = max(STEP / FINER, (math.log(LAST_S) - start) / LARGEST_COUNT)
    # A multiple of the step: then every t of the grid is exact, if the step is a power of 2.
    return (math.floor(start / step) - NEIGHBOURS // 2) * step, step


def _log_values_of_rest(divergence: Divergence, t: Tensor, step: float) -> Tensor:
    """log of what the curvature and kinks at u = 1 make of h: a power law up to the first t, and the integral of h'."""
    kinks = [kink for kink in divergence.kinks if kink[0] == 1]
    if divergence.log_curvature is None and not kinks:
        return torch.full_like(t, -math.inf)

    def log_slope(s: Tensor) -> Tensor:
        return log_slope_by_quadrature(divergence, s, kinks)

    beginning = log_slope(torch.exp(t[:2]))
    at_first = beginning[:1] + t[:1] - torch.log1p((beginning[1:] - beginning[:1]) / step)
    return torch.logcumsumexp(torch.cat([at_first, _log_integrals(log_slope, t, step)]), 0)


def _log_values_of_kinks(divergence: Divergence, t: Tensor, step: float) -> Tensor:
    """log of what kinks at u != 1 make of h, integrated from where they have vanished; -inf without any."""
    kinks = [kink for kink in divergence.kinks if kink[0] != 1]
    if not kinks:
        return torch.full_like(t, -math.inf)
    vanished = 2 * math.log(min(abs(math.log(place)) for place, _ in kinks)) - math.log(2 * VANISHED)
    # Some at least, so that the sum has begun well below the first row.
    before = max(2 * NEIGHBOURS, math.ceil((float(t[0]) - vanished) / step))
    wider = torch.cat([t[0] - step * torch.arange(before, 0, -1, dtype=torch.float64), t])
    # h' may grow by e^24 over a step of the grid.
    panels = _log_integrals(lambda s: _log_slope_of_kinks(kinks, s), wider, step, parts=32)
    return torch.logcumsumexp(panels, 0)[before - 1 :]


def _log_integrals(log_slope: Callable[[Tensor], Tensor], t: Tensor, step: float, parts: int = 1) -> Tensor:
    """log of the integral of h' over each interval of the grid, by 5 Gauss-Legendre points in log s on each part."""
    root = math.sqrt(10 / 7)
    outer, inner = math.sqrt(5 + 2 * root) / 3, math.sqrt(5 - 2 * root) / 3
    outer_weight, inner_weight = (322 - 13 * math.sqrt(70)) / 900, (322 + 13 * math.sqrt(70)) / 900
    rule = [
        (-outer, outer_weight), (-inner, inner_weight), (0.0, 128 / 225), (inner, inner_weight), (outer, outer_weight),
    ]  # fmt: skip
    beginnings = torch.exp(t[:-1])
    terms = []
    for part in range(parts):
        for node, weight in rule:
            # From where the interval begins: the logarithm of a small s has fewer digits than s.
            offset = step / parts * (part + (1 + node) / 2)
            log_slopes = log_slope(beginnings * math.exp(offset))
            terms.append(log_slopes + t[:-1] + (offset + math.log(weight * step / parts / 2)))
    return torch.logsumexp(torch.stack(terms), 0)


def log_slope_by_quadrature(
    divergence: Divergence, s: Tensor, kinks: Sequence[tuple[float, float]] | None = None
) -> Tensor:
    """log h'(s) for ascending float64 s [n] by the trapezoidal rule, exponentially exact for analytic integrands.

    The step in v resolves both the normal density (half a standard deviation) and the poles of kappa, which
    lie at a distance of pi from the real line for every smooth entry of the catalogue (0.4). Where kappa grows like
    e^(a v) the integrand's mass is at v = (a - 1/2) s, and the grid reaches 12 standard deviations beyond it.

    kinks: those that count; None: all of the divergence.

    NaN where the mass lies in part beyond what is known of a user's kappa; inf far beyond MAX_EXPONENT.
    """
    of_kinks = _log_slope_of_kinks(divergence.kinks if kinks is None else kinks, s)
    if divergence.log_curvature is None:
        return of_kinks
    growth = _growth(divergence.log_curvature)
    parts = []
    for rows in s.split(32):
        steps = torch.clamp(torch.sqrt(rows) / 2, max=0.4)[:, None]
        if bool((steps == steps[0]).all()):
            steps = steps[:1]
        reach = growth * rows.max() + 12 * torch.sqrt(rows.max())
        count = max(500, math.ceil(float(reach / steps.min())))
        v = steps * torch.arange(-count, count + 1, dtype=torch.float64)
        log_terms = divergence.log_curvature(v) - v / 2 - v.square() / (2 * rows[:, None])
        log_mean = torch.logsumexp(torch.where(log_terms.isnan(), -math.inf, log_terms), -1)
        log_mean = log_mean + torch.log(steps[:, 0] / torch.sqrt(2 * math.pi * rows))
        log_mean = torch.where(_falls_short(log_terms), math.nan, log_mean)
        parts.append(log_mean - rows / 8 - math.log(2))
        if bool((parts[-1] > MAX_EXPONENT).all()):
            break
    parts.append(s.new_full((len(s) - sum(map(len, parts)),), math.inf))
    return torch.logaddexp(torch.cat(parts), of_kinks)


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


def _log_slope_of_kinks(kinks: Sequence[tuple[float, float]], s: Tensor) -> Tensor:
    result = torch.full_like(s, -math.inf)
    for location, jump in kinks:
        deviation = math.log(location) + s / 2
        log_density = -deviation.square() / (2 * s) - torch.log(2 * math.pi * s) / 2
        result = torch.logaddexp(result, math.log(jump * location / 2) + log_density)
    return result
