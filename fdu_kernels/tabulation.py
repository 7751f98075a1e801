"""How a Gaussian profile is tabulated, once, in float64: quadrature for h', then the integral of h'.

With v = log(p/q) under q normal of mean -s/2 and variance s, kappa(v) = r^2 f''(r), r = e^v (docs/mathematics.md,
fact 1),

    h'(s) = e^(-s/8) / 2 * E[e^(-v/2) kappa(v)],    v ~ N(0, s):

a positive integrand, so nothing cancels. A kink of f at u = g, where f' jumps by j, adds j g n(log g) / 2 with n the
density of N(-s/2, s): so total variation and the hockey stick need no case of their own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fdu_kernels.internals import on_the_cpu
from fdu_kernels.profiles import NEIGHBOURS, SMALLEST_S, GaussianProfile, Grid, lagrange_weights
from fdu_kernels.scalar import MAX_EXPONENT

Curvature = Callable[[Tensor], Tensor]
"""v -> log kappa(v), without the kinks."""
Kinks = tuple[tuple[float, float], ...]
"""(u, jump of f' there)."""

FIRST_S, LAST_S = 1e-12, 1e4
"""Where the table begins (below, h and h' follow the power of s that they have there, exact to first order) and ends
(where h' of every saturating divergence is below e^(-1250))."""
STEP, SMALLEST_STEP, FINEST_STEP = 1 / 32, 1 / 128, 1 / 512
"""Steps in log s. The polynomial through 8 neighbours then errs by less than 1e-12, even where log h' falls like -s/8.
The step is halved, down to the smallest, where h' bends more sharply, and to the finest where a kink at u != 1 takes
over."""
MARGIN = NEIGHBOURS // 2
"""Rows at either end that serve as neighbours only."""


def _profile(t: Tensor, step: float, logs: tuple[Tensor, Tensor], power: float) -> GaussianProfile:
    """From log h and log h' at the equally spaced t = log s; at s -> 0 h' is like s^power."""
    top = len(t) - 1 - MARGIN
    saturated = float(logs[1][top]) < math.log(torch.finfo(torch.float64).tiny)
    beyond = math.inf if saturated else math.exp(float(t[top]))
    grid = Grid(float(t[0]), step, MARGIN, top, (power + 1, power), beyond)
    return GaussianProfile.tabulated(grid, torch.stack(logs, -1))


@on_the_cpu()
def tabulated_profile(name: str, log_curvature: Curvature | None, kinks: Kinks, exact: bool) -> GaussianProfile:
    """Tabulate h and h' from log kappa (None: f is piecewise linear) and the kinks, on the CPU.

    exact: whether log_curvature is, or has the rounding of a user's generator, which looks like error and which no step
    mends. Raises ValueError where the curvature is not finite although the quadrature needs it, or f has none at all.
    """
    at_one, apart = (tuple(kink for kink in kinks if (kink[0] == 1) is one) for one in (True, False))
    if log_curvature is not None and apart:
        between = log_curvature(torch.linspace(-20, 20, 401, dtype=torch.float64))
        log_curvature = log_curvature if bool((between > -math.inf).any()) else None
    rest = None
    if not apart or at_one or log_curvature is not None:
        rest = _tabulate_rest(name, log_curvature, at_one, exact)
    return rest if rest is not None and not apart else _add_kinks(rest, apart)


def _tabulate_rest(name: str, log_curvature: Curvature | None, kinks: Kinks, exact: bool) -> GaussianProfile:
    """The profile of the curvature and these kinks at u = 1: a power law at s -> 0."""
    log_slope = functools.partial(log_slope_by_quadrature, log_curvature, kinks)
    step, t = STEP, _grid(math.log(FIRST_S), STEP)
    log_slopes = log_slope(torch.exp(t))
    if exact and (step := _step_for(_error_of_reading(log_slopes), SMALLEST_STEP)) < STEP:
        t = _grid(math.log(FIRST_S), step)
        log_slopes = log_slope(torch.exp(t))
    # Grid points beyond the straight line's beginning serve as neighbours only; none is beyond what is known.
    for bad, kept in ((log_slopes > MAX_EXPONENT, MARGIN + 1), (log_slopes.isnan(), 0)):
        if bool(bad.any()):
            count = int(torch.nonzero(bad)[0]) + kept
            t, log_slopes = t[:count], log_slopes[:count]
    if len(t) <= 2 * MARGIN or not bool(torch.isfinite(log_slopes).all()):
        raise ValueError(f"the generator of {name!r}: h cannot be built: f'' must be finite and positive")

    power = float(log_slopes[1] - log_slopes[0]) / step
    # Down there a rounding of the power would be multiplied by up to log(FIRST_S / SMALLEST_S).
    power = round(2 * power) / 2 if abs(2 * power - round(2 * power)) < 1e-9 else power
    panels = [(log_slopes[0] + t[0] - math.log1p(power))[None], _log_integrals(log_slope, t, step)]
    return _profile(t, step, (torch.logcumsumexp(torch.cat(panels), 0), log_slopes), power)


def _grid(start: float, step: float, last: float | None = None) -> Tensor:
    """t = log s at multiples of the step, so that each is exact, to be read from ``start`` to LAST_S; or up to last."""
    first = (math.floor(start / step) - MARGIN) * step
    last = math.log(LAST_S) + (MARGIN + 1) * step if last is None else last
    return first + step * torch.arange(math.floor((last - first) / step) + 1, dtype=torch.float64)


def _step_for(error: float, smallest: float) -> float:
    """STEP, halved while log h' errs by more than 1e-12 between two points, but not below the smallest."""
    step = STEP
    while error > 1e-12 and step > smallest:
        step, error = step / 2, error / 2**NEIGHBOURS
    return step


def _error_of_reading(log_slopes: Tensor) -> float:
    """By how much log h', as far as h' is a number, errs between the grid's points: from every second point alone."""
    known = log_slopes[log_slopes > math.log(torch.finfo(torch.float64).tiny)]
    if len(known) < 2 * NEIGHBOURS:
        return 0.0
    weights = lagrange_weights(torch.tensor(0.5, dtype=torch.float64))
    read = (known[::2].unfold(0, NEIGHBOURS, 1) * weights).sum(-1)
    between = known[NEIGHBOURS - 1 :: 2][: len(read)]
    return float((read[: len(between)] - between).abs().max()) / 2**NEIGHBOURS


def _add_kinks(rest: GaussianProfile | None, kinks: Kinks) -> GaussianProfile:
    """The table of a divergence with kinks at u = g != 1, from that of what else it has."""
    # Their densities fall like e^(-y), y = (log g)^2/(2 s), and not like a power: so the table begins where the last of
    # them is below the smallest number, or adds nothing to the rest.
    squares = torch.tensor([math.log(place) ** 2 / 2 for place, _ in kinks], dtype=torch.float64)
    start = vanished = math.log(float(squares.min()) / 760)
    last, grid = None, None if rest is None else rest.grid
    if grid is not None:
        start = min(math.log(FIRST_S), math.log(float(squares.min()) / 120))
        last = grid.first + grid.top * grid.step
    start = max(start, math.log(SMALLEST_S))

    def log_slopes_on(t: Tensor) -> Tensor:
        each = [_log_slope_of_kinks((kink,), torch.exp(t)) for kink in kinks]
        return torch.stack(each if rest is None else [*each, rest.log_at(t, 1)])

    t = _grid(start, STEP, last)
    shares = torch.softmax(log_slopes_on(t), 0)[: len(kinks)]
    # Interpolating log(1 + e^-y) errs by about the eighth derivative's y^8, times this.
    falls = squares[:, None] * torch.exp(-t) * STEP
    step = _step_for(float((1e-3 * shares * (1 - shares) * falls**8).amax()), FINEST_STEP)
    t = _grid(start, step, last)
    log_slopes = torch.logsumexp(log_slopes_on(t), 0)
    # Their integral begins well below the first row.
    before = max(2 * NEIGHBOURS, math.ceil((float(t[0]) - vanished) / step))
    wider = torch.cat([t[0] - step * torch.arange(before, 0, -1, dtype=torch.float64), t])
    # h' may grow by e^24 over an interval of STEP.
    panels = _log_integrals(lambda s: _log_slope_of_kinks(kinks, s), wider, step, parts=round(32 * step / STEP))
    log_values = torch.logcumsumexp(panels, 0)[before - 1 :]
    if rest is None or grid is None:
        return _profile(t, step, (log_values, log_slopes), float(log_slopes[1] - log_slopes[0]) / step)
    return _profile(t, step, (torch.logaddexp(log_values, rest.log_at(t, 0)), log_slopes), grid.powers[1])


def _log_integrals(log_slope: Callable[[Tensor], Tensor], t: Tensor, step: float, parts: int = 1) -> Tensor:
    """log of the integral of h' over each interval of the grid, by 5 Gauss-Legendre points in log s on each part."""
    nodes = (-0.9061798459386640, -0.5384693101056831, 0.0, 0.5384693101056831, 0.9061798459386640)
    weights = (0.2369268850561891, 0.4786286704993665, 128 / 225, 0.4786286704993665, 0.2369268850561891)
    terms = []
    for part, (node, weight) in itertools.product(range(parts), zip(nodes, weights, strict=True)):
        # From where the interval begins: the logarithm of a small s has fewer digits than s.
        offset = step / parts * (part + (1 + node) / 2)
        log_slopes = log_slope(torch.exp(t[:-1]) * math.exp(offset))
        terms.append(log_slopes + t[:-1] + (offset + math.log(weight * step / parts / 2)))
    return torch.logsumexp(torch.stack(terms), 0)


def log_slope_by_quadrature(log_curvature: Curvature | None, kinks: Kinks, s: Tensor) -> Tensor:
    """log h'(s) for ascending float64 s [n] by the trapezoidal rule, exponentially exact for analytic integrands.

    The step in v resolves both the normal density (half a standard deviation) and the poles of kappa, which lie at a
    distance of pi from the real line for every smooth entry of the catalogue (0.4). Where kappa grows like e^(a v) the
    integrand's mass is at v = (a - 1/2) s, and the grid reaches 12 standard deviations beyond it. NaN where the mass
    lies in part beyond what is known of a user's kappa; inf far beyond MAX_EXPONENT.
    """
    of_kinks = _log_slope_of_kinks(kinks, s)
    if log_curvature is None:
        return of_kinks
    growth = _growth(log_curvature)
    parts = []
    for rows in s.split(32):
        steps = torch.clamp(torch.sqrt(rows) / 2, max=0.4)[:, None]
        if bool((steps == steps[0]).all()):
            steps = steps[:1]
        reach = growth * rows.max() + 12 * torch.sqrt(rows.max())
        # 30 standard deviations at least, or 200 in v.
        count = max(100 if float(rows.max()) < 0.64 else 500, math.ceil(float(reach / steps.min())))
        v = steps * torch.arange(-count, count + 1, dtype=torch.float64)
        log_terms = log_curvature(v) - v / 2 - v.square() / (2 * rows[:, None])
        log_mean = torch.logsumexp(torch.where(log_terms.isnan(), -math.inf, log_terms), -1)
        log_mean = log_mean + torch.log(steps[:, 0] / torch.sqrt(2 * math.pi * rows))
        log_mean = torch.where(_falls_short(log_terms), math.nan, log_mean)
        parts.append(log_mean - rows / 8 - math.log(2))
        if bool((parts[-1] > MAX_EXPONENT).all()):
            break
    parts.append(torch.full_like(s[sum(map(len, parts)) :], math.inf))
    return torch.logaddexp(torch.cat(parts), of_kinks)


def _growth(log_curvature: Curvature) -> float:
    """The largest |v| / s at which the integrand has a maximum, from the slopes of log kappa far out."""
    left, left_end, right_end, right = log_curvature(torch.tensor([-200.0, -190.0, 190.0, 200.0], dtype=torch.float64))
    slopes = torch.stack([0.5 - (left_end - left) / 10, (right - right_end) / 10 - 0.5])
    return float(slopes.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0).max())


def _falls_short(log_terms: Tensor) -> Tensor:
    """Which rows [n] have a NaN beside a term that counts: more than 1e-13 of the largest."""
    unknown = log_terms.isnan()
    beside = torch.zeros_like(unknown)
    beside[:, 1:] |= unknown[:, :-1]
    beside[:, :-1] |= unknown[:, 1:]
    outermost = torch.where(beside & ~unknown, log_terms, -math.inf).amax(-1)
    largest = torch.where(unknown, -math.inf, log_terms).amax(-1)
    return unknown.any(-1) & (outermost > largest + math.log(1e-13))


def _log_slope_of_kinks(kinks: Kinks, s: Tensor) -> Tensor:
    result = torch.full_like(s, -math.inf)
    for location, jump in kinks:
        deviation = math.log(location) + s / 2
        log_density = -deviation.square() / (2 * s) - torch.log(2 * math.pi * s) / 2
        result = torch.logaddexp(result, math.log(jump * location / 2) + log_density)
    return result
