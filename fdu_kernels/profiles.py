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
SMALLEST_STEP = STEP / 4
"""Where h' bends more sharply (skew_jensen_shannon near s = -2 log w for a tiny w) the step is halved, up to twice."""
LARGEST_ERROR = 1e-12
"""Of log h' between two points of the grid: what halving the step brings down."""
FINEST_STEP = STEP / 16
"""Where a kink at u != 1 takes over from something flatter, the step is halved, but not below this."""
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
    apart = [kink for kink in divergence.kinks if kink[0] != 1]
    if not apart:
        return _tabulate_rest(divergence, divergence.kinks)
    at_one = [kink for kink in divergence.kinks if kink[0] == 1]
    return _add_kinks(None if _is_straight(divergence) and not at_one else _tabulate_rest(divergence, at_one), apart)


def _is_straight(divergence: Divergence) -> bool:
    """Whether f is straight between its kinks."""
    if divergence.log_curvature is None:
        return True
    return not bool((divergence.log_curvature(torch.linspace(-20, 20, 401, dtype=torch.float64)) > -math.inf).any())


def _tabulate_rest(divergence: Divergence, kinks: Sequence[tuple[float, float]]) -> ProfileTable:
    """What the curvature and these kinks, at u = 1, make: a power law at s -> 0."""
    step = STEP
    t, log_slopes = _log_slopes_from_first(divergence, kinks, step)
    if divergence.custom is None:
        # A user's curvature has rounding, which looks like error and which no step mends.
        error = _error_of_reading(log_slopes)
        while error > LARGEST_ERROR and step > SMALLEST_STEP:
            step, error = step / 2, error / 2**NEIGHBOURS
        if step < STEP:
            t, log_slopes = _log_slopes_from_first(divergence, kinks, step)
    margin, count = NEIGHBOURS // 2, len(t)
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
    # Down there a rounding of the power would be multiplied by up to log(FIRST_S / SMALLEST_S).
    power = round(2 * power) / 2 if abs(2 * power - round(2 * power)) < 1e-9 else power
    at_first = log_slopes[0] + t[0] - math.log1p(power)
    panels = _log_integrals(lambda s: log_slope_by_quadrature(divergence, s, kinks), t, step)
    log_values = torch.logcumsumexp(torch.cat([at_first[None], panels]), 0)
    return _table_of(t, step, log_values, log_slopes, (power + 1, power))


def _log_slopes_from_first(
    divergence: Divergence, kinks: Sequence[tuple[float, float]], step: float
) -> tuple[Tensor, Tensor]:
    """The grid from FIRST_S to LAST_S, as log s, and log h' there."""
    first = _first(math.log(FIRST_S), step)
    count = math.ceil((math.log(LAST_S) - first) / step) + NEIGHBOURS // 2 + 1
    t = first + step * torch.arange(count, dtype=torch.float64)
    return t, log_slope_by_quadrature(divergence, torch.exp(t), kinks)


def _error_of_reading(log_slopes: Tensor) -> float:
    """By how much log h', as far as h' is a number, errs between the grid's points: from every second point alone."""
    known = log_slopes[log_slopes > math.log(torch.finfo(torch.float64).tiny)]
    if len(known) < 2 * NEIGHBOURS:
        return 0.0
    weights = _lagrange_weights(torch.tensor(0.5, dtype=torch.float64))
    read = (known[::2].unfold(0, NEIGHBOURS, 1) * weights).sum(-1)
    between = known[NEIGHBOURS - 1 :: 2][: len(read)]
    return float((read[: len(between)] - between).abs().max()) / 2**NEIGHBOURS


def _table_of(
    t: Tensor, step: float, log_values: Tensor, log_slopes: Tensor, powers: tuple[float, float]
) -> ProfileTable:
    top = len(t) - 1 - NEIGHBOURS // 2
    saturated = float(log_slopes[top]) < math.log(torch.finfo(torch.float64).tiny)
    return ProfileTable(
        first=float(t[0]),
        step=step,
        log_values=torch.stack([log_values, log_slopes], -1),
        bottom=NEIGHBOURS // 2,
        top=top,
        powers=powers,
        linear_beyond=math.inf if saturated else math.exp(float(t[top])),
    )


def _first(start: float, step: float) -> float:
    """Where a grid begins that is to be read from ``start`` on: at a multiple of the step, so that each t is exact."""
    return (math.floor(start / step) - NEIGHBOURS // 2) * step


def _add_kinks(rest: ProfileTable | None, kinks: Sequence[tuple[float, float]]) -> ProfileTable:
    """The table of a divergence with kinks at u = g != 1, from that of what else it has.

    Their densities fall like e^(-y), y = (log g)^2/(2 s), and not like a power: so the table begins where the last of
    them has vanished, or adds nothing to the rest.
    """
    squares = [math.log(place) ** 2 / 2 for place, _ in kinks]
    vanished = math.log(min(squares) / VANISHED)
    start = vanished if rest is None else min(math.log(FIRST_S), math.log(min(squares) / NEGLIGIBLE))
    start = max(start, math.log(SMALLEST_S))
    last = math.log(LAST_S) + NEIGHBOURS // 2 * STEP if rest is None else rest.first + rest.step * rest.top

    def grid(step: float) -> Tensor:
        first = _first(start, step)
        return first + step * torch.arange(math.floor((last - first) / step) + 1, dtype=torch.float64)

    def log_slopes_on(t: Tensor) -> list[Tensor]:
        each = [_log_slope_of_kinks([kink], torch.exp(t)) for kink in kinks]
        return each if rest is None else [*each, _log_on(rest, t, 1)]

    step, t = STEP, grid(STEP)
    each = torch.stack(log_slopes_on(t))
    shares = torch.softmax(each, 0)[: len(kinks)]
    # Interpolating log(1 + e^-y) errs by about the eighth derivative's y^8, times this.
    falls = torch.tensor(squares, dtype=torch.float64)[:, None] * torch.exp(-t) * step
    error = float((1e-3 * shares * (1 - shares) * falls**8).amax())
    while error > LARGEST_ERROR and step > FINEST_STEP:
        step, error = step / 2, error / 2**8
    t = grid(step)
    log_slopes = torch.logsumexp(torch.stack(log_slopes_on(t)), 0)

    # Their integral begins well below the first row.
    before = max(2 * NEIGHBOURS, math.ceil((float(t[0]) - vanished) / step))
    wider = torch.cat([t[0] - step * torch.arange(before, 0, -1, dtype=torch.float64), t])
    # h' may grow by e^24 over an interval of STEP.
    parts = round(32 * step / STEP)
    panels = _log_integrals(lambda s: _log_slope_of_kinks(kinks, s), wider, step, parts)
    log_values = torch.logcumsumexp(panels, 0)[before - 1 :]
    if rest is None:
        power = float(log_slopes[1] - log_slopes[0]) / step
        return _table_of(t, step, log_values, log_slopes, (power + 1, power))
    return _table_of(t, step, torch.logaddexp(log_values, _log_on(rest, t, 0)), log_slopes, rest.powers)


def _log_on(table: ProfileTable, t: Tensor, column: int) -> Tensor:
    """log h (column 0) or log h' (column 1) at t = log s up to the table's top."""
    place = (t - table.first) / table.step
    index = place.clamp(min=table.bottom).floor().clamp(max=table.top - 1)
    neighbours = torch.arange(1 - NEIGHBOURS // 2, NEIGHBOURS // 2 + 1)
    rows = table.log_values[index.long()[:, None] + neighbours, column]
    read = (_lagrange_weights(place.clamp(min=table.bottom) - index) * rows).sum(-1)
    return read + table.powers[column] * table.step * (place - table.bottom).clamp(max=0)


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
        # 30 standard deviations at least, or 200 in v.
        count = max(100 if float(rows.max()) < 0.64 else 500, math.ceil(float(reach / steps.min())))
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
