"""Custom generators: check an f written in Python, and derive its functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fdu_kernels.internals import on_the_cpu
from fdu_kernels.scalar import MAX_EXPONENT, Scalar, derivative
from fdu_kernels.tabulation import Curvature, Kinks

Generator = Callable[[Tensor], Tensor]
"""f(u), elementwise."""

CURVATURE_LIMIT = 150.0
"""A user's kappa is evaluated for |v| up to here, where u^4 still fits float64, and continued as a power law."""


class OwnFunction(NamedTuple):
    """A function of the density ratio that is Python code: no numbers for kernels, but PyTorch operations."""

    value: Generator
    slope: Generator
    numbers: None = None

    def scalar(self) -> Scalar:
        """The same, differentiable; straight lines beyond |v| = 32, where u^2 still fits float32."""
        return Scalar(self.value, self.slope, -MAX_EXPONENT / 2, MAX_EXPONENT / 2)

    def negated(self) -> OwnFunction:
        """-y(v)."""
        return OwnFunction(lambda v: -self.value(v), lambda v: -self.slope(v))


def critic_functions(f: Generator) -> tuple[OwnFunction, OwnFunction]:
    """A(v) = f'(u) and B(v) = u f'(u) - f(u), u = e^v."""
    slope = derivative(f)
    second = derivative(slope)
    a = OwnFunction(lambda v: slope(torch.exp(v)), lambda v: torch.exp(v) * second(torch.exp(v)))
    b = OwnFunction(lambda v: torch.exp(v) * a.value(v) - f(torch.exp(v)), lambda v: torch.exp(v) * a.slope(v))
    return a, b


def ratio_function(f: Generator, samples_from: str) -> OwnFunction:
    """f(r) for samples from "q", f(r)/r for "p", of v = log r."""
    a, b = critic_functions(f)
    if samples_from == "q":
        return OwnFunction(lambda v: f(torch.exp(v)), lambda v: torch.exp(v) * a.value(v))
    return OwnFunction(lambda v: torch.exp(-v) * f(torch.exp(v)), lambda v: torch.exp(-v) * b.value(v))


@on_the_cpu()
def examine(f: Generator, name: str, places: tuple[float, ...]) -> tuple[Kinks, Curvature]:
    """Those of the declared kinks that f really has, and log kappa. Raises as Divergence.from_generator."""
    if any(place <= 0 for place in places):
        raise ValueError(f"kinks of {name!r} must be points u > 0, not {places}")
    v = torch.linspace(-8, 8, 321, dtype=torch.float64)
    u = torch.exp(v)
    values = _values(f, name, u)
    at_one = float(f(torch.ones(1, dtype=torch.float64)))
    if not abs(at_one) <= 1e-12:
        raise ValueError(f"the generator of {name!r} must have f(1) = 0, but f(1) = {at_one:g}; subtract f(1) from it")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"the generator of {name!r} is not finite on u in [e^-8, e^8]")
    slopes = (values[1:] - values[:-1]) / (u[1:] - u[:-1])
    scale = slopes.abs().amax().clamp(min=1e-300)
    falls = slopes[1:] - slopes[:-1] < -1e-9 * torch.maximum(slopes[1:].abs(), scale * 1e-6)
    if bool(falls.any()):
        where = float(u[1:-1][falls][0])
        raise ValueError(f"the generator of {name!r} is not convex: its slope falls near u = {where:.3g}")

    slope = derivative(f)
    second, kinks = derivative(slope), []
    for place in places:
        left, right = slope(torch.tensor([1 - 1e-7, 1 + 1e-7], dtype=torch.float64) * place).tolist()
        # A smooth f changes its slope by 2e-7 u f''(u) between the two.
        if right - left > 1e-5:
            kinks.append((place, right - left))
    _check_kinks_are_named(name, f, slope, second, tuple(kinks))
    return tuple(kinks), _log_of_continued(lambda v: torch.exp(2 * v) * second(torch.exp(v)))


def _values(f: Generator, name: str, u: Tensor) -> Tensor:
    """f(u), refused where it is not made of PyTorch operations."""
    try:
        with torch.enable_grad():
            values = f(u.clone().requires_grad_())
        reason = None if isinstance(values, Tensor) else f"it returned {type(values).__name__}"
        if reason is None and not values.requires_grad:
            reason = "its result does not depend on u by differentiable operations"
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
    if reason is not None:
        wanted = "PyTorch operations, such as torch.log instead of math.log or numpy.log"
        raise TypeError(f"the generator of {name!r} must be made of {wanted}: {reason}")
    if (values.shape, values.dtype) != (u.shape, u.dtype):
        returned = f"it got {tuple(u.shape)} {u.dtype} and returned {tuple(values.shape)} {values.dtype}"
        kept = "work elementwise and return the shape and dtype it is given"
        raise TypeError(f"the generator of {name!r} must {kept}; {returned}")
    return values.detach()


def _log_of_continued(curvature: Curvature) -> Curvature:
    """v -> log kappa(v), straight lines beyond both ends of what can be evaluated; NaN there if it is no power law."""
    (low, low_slope), (high, high_slope) = _end_of(curvature, -1), _end_of(curvature, 1)

    def log_curvature(v: Tensor) -> Tensor:
        # Rounding can make a vanishing second derivative slightly negative.
        result = torch.log(curvature(v.clamp(low, high)).clamp(min=0))
        result = torch.where(v < low, result + low_slope * (v - low), result)
        return torch.where(v > high, result + high_slope * (v - high), result)

    return log_curvature


def _end_of(curvature: Curvature, side: int) -> tuple[float, float]:
    """The last v to one side where kappa is accurate, and the slope d log kappa/dv there; NaN if it still changes."""
    # Far out the terms of a second derivative by autograd may cancel (le_cam: 1/u for a result of 1/u^3), and their
    # rounding, times u^2, would outgrow the integrand. It shows as roughness of log kappa at most points of 2 units of
    # v; a jump of a generator that is defined by parts shows at a few.
    per_unit = 8
    end = round(CURVATURE_LIMIT * per_unit)
    values = curvature(side / per_unit * torch.arange(end + 1, dtype=torch.float64))
    logs = torch.log(values.clamp(min=0))
    rough = ((logs[2:] - 2 * logs[1:-1] + logs[:-2]).abs() > 0.05) | (values[1:-1] < 0)
    noisy = rough.unfold(0, 2 * per_unit, 1).sum(-1) > per_unit
    noisy[: 4 * per_unit] = False
    noise = torch.nonzero(noisy)
    if len(noise):
        # Relative rounding is 1e-16 e^(rate v), 1e-2 here, and so 3e-6 at three quarters of the way.
        end = int(noise[0]) * 3 // 4
    overflow = torch.nonzero(~torch.isfinite(values))
    if len(overflow) and int(overflow[0]) <= end:
        end, noise = int(overflow[0]) - per_unit, noise[:0]
    end = max(end, 2 * per_unit)
    near, middle, far = (float(logs[max(end - back * per_unit, 0)]) for back in (0, 4, 8))
    slope = 0.0 if near == -math.inf else (near - middle) / 4
    if near > -math.inf and not len(noise) and not abs(slope - (middle - far) / 4) <= 1e-6:
        slope = math.nan
    return side * end / per_unit, side * slope


def _check_kinks_are_named(name: str, f: Generator, slope: Generator, second: Generator, kinks: Kinks) -> None:
    """Over each half of [-4, 4] in v: f(e^a) - f(1) - f'(1)(e^a - 1) is the integral of (e^a - u) f''(u), where a kink
    that autograd does not see is missing."""
    for end in (-4.0, 4.0):
        v = torch.linspace(0, end, 20_001, dtype=torch.float64)
        u = torch.exp(v)
        # Away from 1 itself, where a kink may be.
        one = torch.exp(torch.tensor([math.copysign(1e-7, end)], dtype=torch.float64))
        expected = float(f(u[-1:]) - f(one) - slope(one) * (u[-1] - one))
        found = float(torch.trapezoid((u[-1] - u) * second(u) * u, v))
        inside = [kink for kink in kinks if 0 < math.log(kink[0]) / end < 1]
        found += sum(jump * abs(float(u[-1]) - place) for place, jump in inside)
        if not abs(found - expected) <= 1e-3 * max(abs(expected), 1e-6 * abs(float(f(u[-1:])))) + 1e-5:
            cause = "f has a kink that was not named (pass kinks=(u, ...)) or an operation without a derivative"
            raise ValueError(f"the generator of {name!r}: its second derivative contradicts its values: {cause}")
