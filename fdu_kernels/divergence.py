"""What a divergence is: a frozen record of data, and the functions that follow from it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fdu_kernels.critic import CriticRow, critic_terms
from fdu_kernels.profiles import profile

Rows = tuple[CriticRow, CriticRow]

CURVATURE_LIMIT = 150.0
"""A user's kappa is evaluated for |v| up to here, where u^4 still fits float64, and continued as a power law."""
CURVATURE_STEP = 1 / 8
"""In v, for finding where a user's kappa drowns in rounding."""


MADE_BY_USERS: weakref.WeakValueDictionary[str, Divergence] = weakref.WeakValueDictionary()
"""The divergences of from_generator that are alive, by key."""
_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """An f-divergence D_f(p || q) = E_q[f(p/q)]. Two are equal if name, parameters and user's generator are.

    Get one by :func:`fdu_kernels.get_divergence` or :meth:`from_generator`; ``str`` gives the spelling that
    get_divergence reads.
    """

    name: str
    parameters: tuple[tuple[str, float], ...] = ()
    custom: Callable[[Tensor], Tensor] | None = None
    """The user's f, where there is one."""
    formula: str = dataclasses.field(default="", compare=False)
    """f(u) for people."""
    advice: str = dataclasses.field(default="", compare=False)
    """One line: when to use it."""
    upper: float = dataclasses.field(default=math.inf, compare=False)
    """The largest value: D_f lies in [0, upper]."""
    generator: Callable[[Tensor], Tensor] | None = dataclasses.field(default=None, compare=False)
    """f(u) on tensors; None for mse, which is a Gaussian profile only."""
    log_curvature: Callable[[Tensor], Tensor] | None = dataclasses.field(default=None, compare=False)
    """v -> log kappa(v) = log(u^2 f''(u)), u = e^v, without the kinks; None where f is piecewise linear."""
    kinks: tuple[tuple[float, float], ...] = dataclasses.field(default=(), compare=False)
    """(u, jump of f' there)."""
    exponential: tuple[float, float] | None = dataclasses.field(default=None, compare=False)
    """(c, k) of an elementary profile h(s) = c expm1(k s) / k; None: h is tabulated."""
    log_ratio_rows: Rows | None = dataclasses.field(default=None, compare=False)
    """A and B of v = log p/q; None: by autograd from the generator."""
    fgan_rows: Rows | None = dataclasses.field(default=None, compare=False)
    """T = g_f(v) and f*(T) with f-GAN's output activation; None: log_ratio_rows, which are an activation as well."""
    key: str = dataclasses.field(default="", compare=False, repr=False)
    """What :func:`fdu_kernels.catalogue.find_divergence` finds it by: compiled code holds strings, not functions."""

    def __post_init__(self) -> None:
        if self.custom is None:
            object.__setattr__(self, "key", str(self))
            return
        if not self.key:
            object.__setattr__(self, "key", f"{self.name}#{next(_numbers)}")
        MADE_BY_USERS[self.key] = self

    def __str__(self) -> str:
        return ":".join([self.name, *(repr(value).removesuffix(".0") for _, value in self.parameters)])

    def __reduce__(self) -> str | tuple[object, ...]:
        # Generators are closures, which do not pickle; a divergence of the catalogue is known by its name.
        from fdu_kernels.catalogue import get_divergence

        if self.custom is None:
            return _restore, (get_divergence, self.name, self.parameters)
        return Divergence.from_generator, (self.custom, self.name, tuple(place for place, _ in self.kinks))

    @property
    def slope_at_zero(self) -> float:
        """h'(0) = f''(1) / 2. Infinite where f has a kink at 1, and 0 where f is linear around 1."""
        if self.exponential is not None:
            return self.exponential[0]
        if any(location == 1 for location, _ in self.kinks):
            return math.inf
        if self.log_curvature is None:
            return 0.0
        with torch.device("cpu"):
            return float(torch.exp(self.log_curvature(torch.zeros((), dtype=torch.float64)))) / 2

    def f(self, u: Tensor) -> Tensor:
        """f(u) for u >= 0 of any shape. Raises ValueError for mse, which has no generator."""
        if self.generator is None:
            raise ValueError(f"divergence {str(self)!r} has no generator f; it is only a Gaussian profile, h(s) = s")
        return self.generator(_tensor(u))

    def profile(self, s: Tensor) -> Tensor:
        """h(s), the divergence of two Gaussians at squared Mahalanobis distance s >= 0 (any shape, differentiable)."""
        return profile(self)(_tensor(s))

    def profile_grad(self, s: Tensor) -> Tensor:
        """h'(s), same shape (differentiable). Evaluated at s >= 1e-30, so that it is finite for every divergence."""
        return profile(self).slope_at(_tensor(s))

    def critic(self, v: Tensor, parametrization: str = "log_ratio") -> tuple[Tensor, Tensor]:
        """A(v), B(v) of the variational bound E_p[A] - E_q[B], of the shape of v (differentiable)."""
        a, b = critic_terms(self, parametrization)
        return a(_tensor(v)), b(_tensor(v))

    def critic_rows(self, parametrization: str) -> Rows | None:
        """The rows of A and B over the critic basis; None for a user's generator."""
        return (self.fgan_rows or self.log_ratio_rows) if parametrization == "fgan" else self.log_ratio_rows

    def derivative(self, u: Tensor) -> Tensor:
        """f'(u) by autograd, differentiable."""
        return _derivative(self.f, u)

    def second_derivative(self, u: Tensor) -> Tensor:
        """f''(u) by autograd, differentiable; kinks do not show."""
        return _derivative(self.derivative, u)

    @classmethod
    def from_generator(
        cls, f: Callable[[Tensor], Tensor], name: str = "custom", kinks: Sequence[float] = (1.0,)
    ) -> Divergence:
        """A divergence of your own: derivatives by autograd, the Gaussian profile by quadrature.

        Args:
            f: convex on (0, inf) with f(1) = 0, elementwise on float64 tensors, made of differentiable operations.
            name: how it is called in messages.
            kinks: where f' may jump, u > 0. Autograd cannot find them.

        The curvature is evaluated for log u in [-150, 150], or as far as rounding leaves it, and continued as a power
        of u. Where it is none (u log^2 u), h is a straight line from the s on at which more of it would be needed.

        Raises:
            TypeError: f does not map a tensor to a tensor of its shape.
            ValueError: f(1) is not 0, f is not convex, not finite, or has a kink that was not named.
        """
        # Whatever torch.set_default_device says: this needs float64.
        with torch.device("cpu"):
            return _from_generator(f, name, tuple(float(kink) for kink in kinks))


def _restore(get: Callable[..., Divergence], name: str, parameters: tuple[tuple[str, float], ...]) -> Divergence:
    return get(name, **dict(parameters))


def _tensor(x: Tensor) -> Tensor:
    # as_tensor alone would move a tensor to torch.set_default_device's.
    return x if isinstance(x, Tensor) else torch.as_tensor(x)


def _derivative(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = u if u.requires_grad else u.detach().requires_grad_()
        result = function(leaf)
        if not result.requires_grad:
            return torch.zeros_like(u)
        (gradient,) = torch.autograd.grad(result.sum(), leaf, create_graph=True, allow_unused=True)
    if gradient is None:
        return torch.zeros_like(u)
    return gradient if u.requires_grad else gradient.detach()


def _from_generator(f: Callable[[Tensor], Tensor], name: str, places: tuple[float, ...]) -> Divergence:
    if any(place <= 0 for place in places):
        raise ValueError(f"kinks of {name!r} must be points u > 0, not {places}")
    v = torch.linspace(-8, 8, 321, dtype=torch.float64)
    u = torch.exp(v)
    values = f(u)
    if not isinstance(values, Tensor) or values.shape != u.shape:
        raise TypeError(f"the generator of {name!r} must map a tensor to a tensor of the same shape, elementwise")
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

    plain = Divergence(name, custom=f, generator=f)

    def curvature(v: Tensor) -> Tensor:
        u = torch.exp(v)
        return u.square() * plain.second_derivative(u)

    kinks = []
    for place in places:
        sides = torch.tensor([1 - 1e-7, 1 + 1e-7], dtype=torch.float64) * place
        left, right = plain.derivative(sides).tolist()
        # A smooth f changes its slope by 2e-7 u f''(u) between the two.
        if right - left > 1e-5:
            kinks.append((place, right - left))
    made = dataclasses.replace(plain, kinks=tuple(kinks), log_curvature=_log_of_continued(curvature), formula=name)
    _check_kinks_are_named(made)
    return made


def _log_of_continued(curvature: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """v -> log kappa(v), straight lines beyond both ends of what can be evaluated; NaN there if it is no power law."""
    (low, low_slope), (high, high_slope) = _end_of(curvature, -1), _end_of(curvature, 1)

    def log_curvature(v: Tensor) -> Tensor:
        # Rounding can make a vanishing second derivative slightly negative.
        result = torch.log(curvature(v.clamp(low, high)).clamp(min=0))
        result = torch.where(v < low, result + low_slope * (v - low), result)
        return torch.where(v > high, result + high_slope * (v - high), result)

    return log_curvature


def _end_of(curvature: Callable[[Tensor], Tensor], side: int) -> tuple[float, float]:
    """The last v to one side at which kappa is accurate, and the slope d log kappa/dv there, NaN if it still changes.

    Far out the terms of a second derivative by autograd may cancel (le_cam: 1/u for a result of 1/u^3), and their
    rounding, times u^2, would outgrow the integrand. It shows as roughness of log kappa at most points of 2 units of v;
    a jump of a generator that is defined by parts shows at a few.
    """
    per_unit = round(1 / CURVATURE_STEP)
    count = round(CURVATURE_LIMIT * per_unit)
    values = curvature(side * CURVATURE_STEP * torch.arange(count + 1, dtype=torch.float64))
    logs = torch.log(values.clamp(min=0))
    rough = ((logs[2:] - 2 * logs[1:-1] + logs[:-2]).abs() > 0.05) | (values[1:-1] < 0)
    noisy = rough.unfold(0, 2 * per_unit, 1).sum(-1) > per_unit
    noisy[: 4 * per_unit] = False
    end, noise = count, torch.nonzero(noisy)
    if len(noise):
        # Relative rounding is 1e-16 e^(rate v), 1e-2 here, and so 3e-6 at three quarters of the way.
        end = int(noise[0]) * 3 // 4
    overflow = torch.nonzero(~torch.isfinite(values))
    if len(overflow) and int(overflow[0]) <= end:
        end, noise = int(overflow[0]) - per_unit, noise[:0]
    end = max(end, 2 * per_unit)
    near, middle, far = (float(logs[max(end - back * per_unit, 0)]) for back in (0, 4, 8))
    slope = (near - middle) / 4
    if near == -math.inf:
        slope = 0.0
    elif not len(noise) and not abs(slope - (middle - far) / 4) <= 1e-6:
        slope = math.nan
    return side * end * CURVATURE_STEP, side * slope


def _check_kinks_are_named(divergence: Divergence) -> None:
    """Compare f(e) + f(1/e) with what the second derivative and the named kinks make of it.

    f(e^a) - f(1) - f'(1)(e^a - 1) is the integral of (e^a - u) f''(u), so that a kink that autograd does not see is
    missing there. Both sides are taken over each half of [-4, 4] in v.
    """
    count = 20_001
    for end in (-4.0, 4.0):
        v = torch.linspace(0, end, count, dtype=torch.float64)
        u = torch.exp(v)
        # Away from 1 itself, where a kink may be.
        start = math.exp(math.copysign(1e-7, end))
        one = torch.tensor([start], dtype=torch.float64)
        expected = float(divergence.f(u[-1:])) - float(divergence.f(one))
        expected -= float(divergence.derivative(one)) * (float(u[-1]) - start)
        integrand = (u[-1] - u) * divergence.second_derivative(u) * u
        found = float(torch.trapezoid(integrand, v))
        for place, jump in divergence.kinks:
            if place != 1 and min(0.0, end) < math.log(place) < max(0.0, end):
                found += jump * abs(float(u[-1]) - place)
        if not abs(found - expected) <= 1e-3 * max(abs(expected), 1e-6 * abs(float(divergence.f(u[-1:])))) + 1e-5:
            raise ValueError(
                f"the second derivative of the generator of {str(divergence)!r} does not add up to its values: f has a "
                "kink that was not named (pass kinks=(u, ...)) or an operation without a derivative"
            )
