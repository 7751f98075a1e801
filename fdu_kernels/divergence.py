"""A divergence: a frozen record of data, and the functions derived from it."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdu_kernels import checks, critic, custom
from fdu_kernels.critic import CriticRow, ElementFunction
from fdu_kernels.custom import OwnFunction
from fdu_kernels.internals import on_the_cpu
from fdu_kernels.profiles import GaussianProfile
from fdu_kernels.scalar import derivative
from fdu_kernels.tabulation import Kinks, tabulated_profile

OnTensors = Callable[[Tensor], Tensor]
Rows = tuple[CriticRow, CriticRow]
Function = ElementFunction | OwnFunction

MADE_BY_USERS: weakref.WeakValueDictionary[str, Divergence] = weakref.WeakValueDictionary()
"""The divergences of from_generator that are alive, by key."""
_numbers = itertools.count(1)


@dataclass(frozen=True, repr=False)
class Divergence:
    """An f-divergence D_f(p || q) = E_q[f(p/q)]. Equality compares name, parameters and the user's generator.

    Made by :func:`fdu_kernels.get_divergence` or :meth:`from_generator`; ``str`` gives the spelling that
    get_divergence reads.
    """

    name: str
    parameters: tuple[tuple[str, float], ...] = ()
    custom: OnTensors | None = field(default=None, hash=False)  # the user's f, where there is one
    aliases: tuple[str, ...] = field(default=(), compare=False)  # other names for it
    formula: str = field(default="", compare=False)  # f(u) for people
    advice: str = field(default="", compare=False)  # one line: when to use it
    upper: float = field(default=math.inf, compare=False)  # the largest value: D_f lies in [0, upper]
    generator: OnTensors | None = field(default=None, compare=False)  # f(u); None for mse, a Gaussian profile only
    log_curvature: OnTensors | None = field(default=None, compare=False)
    """v -> log kappa(v) = log(u^2 f''(u)), u = e^v, without the kinks; None where f is piecewise linear."""
    kinks: Kinks = field(default=(), compare=False)  # (u, jump of f' there)
    exponential: tuple[float, float] | None = field(default=None, compare=False)
    """(c, k) of an elementary profile h(s) = c expm1(k s) / k; None: h is tabulated."""
    log_ratio_rows: Rows | None = field(default=None, compare=False)  # A, B of v = log p/q; None: by differentiation
    fgan_rows: Rows | None = field(default=None, compare=False)
    """T = g_f(v) and f*(T) with f-GAN's output activation; None: log_ratio_rows, which are an activation as well."""
    key: str = field(default="", compare=False, repr=False)
    """Its key in :func:`fdu_kernels.catalogue.find_divergence`: compiled code holds strings, not functions."""

    def __post_init__(self) -> None:
        key = str(self) if self.custom is None else f"{self.name}#{next(_numbers)}"
        object.__setattr__(self, "key", key)
        if self.custom is not None:
            MADE_BY_USERS[key] = self

    def __str__(self) -> str:
        return ":".join([self.name, *(repr(value).removesuffix(".0") for _, value in self.parameters)])

    def __repr__(self) -> str:
        return f"Divergence({str(self)!r})"

    def __deepcopy__(self, memo: dict[int, object]) -> Divergence:
        return self

    @property
    def slope_at_zero(self) -> float:
        """h'(0) = f''(1) / 2. Infinite where f has a kink at 1, and 0 where f is linear around 1."""
        if self.exponential is not None:
            return self.exponential[0]
        if any(location == 1 for location, _ in self.kinks):
            return math.inf
        if self.log_curvature is None:
            return 0.0
        with on_the_cpu():
            return float(torch.exp(self.log_curvature(torch.zeros((), dtype=torch.float64)))) / 2

    def f(self, u: Tensor) -> Tensor:
        """f(u) for u >= 0 of any shape. Raises ValueError for mse, which has no generator."""
        if self.generator is None:
            raise ValueError(f"divergence {str(self)!r} has no generator f; it is only a Gaussian profile, h(s) = s")
        return self.generator(_tensor(u))

    def profile(self, s: Tensor) -> Tensor:
        """h(s), the divergence of two Gaussians at squared Mahalanobis distance s >= 0 (any shape, differentiable)."""
        return self.gaussian_profile.scalar()(_tensor(s))

    def profile_grad(self, s: Tensor) -> Tensor:
        """h'(s), same shape (differentiable). Evaluated at s >= 1e-30, where it is finite for every divergence."""
        return self.gaussian_profile.scalar().slope_at(_tensor(s))

    def critic(self, v: Tensor, parametrization: str = "log_ratio") -> tuple[Tensor, Tensor]:
        """A(v), B(v) of the variational bound E_p[A] - E_q[B], of the shape of v (differentiable)."""
        a, b = self.critic_functions(parametrization)
        return a.scalar()(_tensor(v)), b.scalar()(_tensor(v))

    def critic_rows(self, parametrization: str) -> Rows | None:
        """The rows of A and B over the critic basis; None for a user's generator."""
        return (self.fgan_rows or self.log_ratio_rows) if parametrization == "fgan" else self.log_ratio_rows

    def derivative(self, u: Tensor) -> Tensor:
        """f'(u), differentiable."""
        return derivative(self.f)(u)

    def second_derivative(self, u: Tensor) -> Tensor:
        """f''(u), differentiable; kinks do not show."""
        return derivative(self.derivative)(u)

    @functools.cached_property
    def gaussian_profile(self) -> GaussianProfile:
        """h as numbers, for kernels, and as PyTorch operations.

        Raises ValueError for a user's generator whose curvature is not finite where the quadrature needs it.
        """
        if self.exponential is not None:
            return GaussianProfile.exponential(*self.exponential)
        return tabulated_profile(str(self), self.log_curvature, self.kinks, exact=self.custom is None)

    def critic_functions(self, parametrization: str) -> tuple[Function, Function]:
        """A and B of the variational bound as functions of the critic output v.

        ``parametrization``: "log_ratio" (v estimates log p/q) or "fgan" (v passes f-GAN's output activation, table 6).
        Raises ValueError if the divergence has no generator, or the parametrization is unknown.
        """
        self._require_generator()
        checks.check_choice("parametrization", parametrization, ("log_ratio", "fgan"))
        rows = self.critic_rows(parametrization)
        return custom.critic_functions(self.f) if rows is None else critic.critic_functions(rows)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - divergences are few, and found again by equality
    def bound_terms(self, parametrization: str) -> tuple[Function, Function]:
        """A and -B: the variational bound is the sum of their means."""
        a, b = self.critic_functions(parametrization)
        return a, b.negated()

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def ratio_function(self, samples_from: str) -> Function:
        """The density-ratio estimator's integrand as a function of v = log p/q: f(r) for "q", f(r)/r for "p".

        Raises ValueError if the divergence has no generator, or samples_from is neither "q" nor "p".
        """
        self._require_generator()
        checks.check_choice("samples_from", samples_from, ("q", "p"))
        if self.log_ratio_rows is None:
            return custom.ratio_function(self.f, samples_from)
        return critic.ratio_function(self.log_ratio_rows, samples_from)

    def _require_generator(self) -> None:
        if self.generator is None:
            lacking = "is a Gaussian profile without a generator f: no variational form and no density-ratio estimate"
            raise ValueError(f'divergence {str(self)!r} {lacking}; use "kl" or "jeffreys", proportional to it')

    @classmethod
    def from_generator(cls, f: OnTensors, name: str = "custom", kinks: Sequence[float] = (1.0,)) -> Divergence:
        """A divergence of your own: derivatives by differentiation, the Gaussian profile by quadrature.

        Args:
            f: convex on (0, inf) with f(1) = 0, elementwise on float64 tensors, made of differentiable PyTorch
                operations. To be picklable, it must be a module-level function, not a lambda.
            name: its name in messages.
            kinks: points u > 0 where f' may jump; differentiation cannot find them.

        The curvature is evaluated for log u in [-150, 150], or as far as rounding allows, and continued as a power
        of u. Where it is not a power (u log^2 u), h is linear beyond the s that would need more of it.
        Raises TypeError if f is not made of elementwise PyTorch operations that keep the dtype; ValueError if f(1) is
        not 0, or f is not convex, not finite on [e^-8, e^8], or has an unnamed kink.
        """
        found, log_curvature = custom.examine(f, name, tuple(float(kink) for kink in kinks))
        return cls(name, custom=f, generator=f, kinks=found, log_curvature=log_curvature, formula=name)


def _tensor(x: Tensor) -> Tensor:
    # as_tensor alone would move a tensor to torch.set_default_device's.
    return x if isinstance(x, Tensor) else torch.as_tensor(x)
