"""The catalogue of f-divergences: each one is stated here, once, as data; everything else reads these rows.

D_f(p || q) = E_q[f(p/q)] for a convex generator f with f(1) = 0. Normalisations are the standard ones; for the family
see Liese and Vajda 2006, for the conjugates and activations Nowozin et al. 2016 (f-GAN, arXiv 1606.00709), for the
use in unlearning Novello et al. 2026 (arXiv 2509.21167).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fdu_kernels import critics, profiles
from fdu_kernels.critics import CriticRow, CriticTerm, GeneratedTerm
from fdu_kernels.profiles import ElementaryProfile, KinkedProfile, Profile, TabulatedProfile

Elementwise = Callable[[Tensor], Tensor]
LOG2 = math.log(2)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """One divergence. Equal if name and parameter are equal, and the generator where a user gave it."""

    name: str
    """Its name in this package."""
    parameter: float | None = None
    """The value of its parameter; None if it has none."""
    custom: Elementwise | None = None
    """The generator that a user gave to :meth:`from_generator`; None for the catalogue's own."""
    formula: str = dataclasses.field(default="", compare=False)
    """f(u) in words."""
    generator: Elementwise | None = dataclasses.field(default=None, compare=False, repr=False)
    """f on tensors of u > 0; None for mse, which is a Gaussian profile only."""
    log_generator: Elementwise | None = dataclasses.field(default=None, compare=False, repr=False)
    """v -> f(e^v) in a form that is stable for large and small v."""
    make_profile: Callable[[], Profile] | None = dataclasses.field(default=None, compare=False, repr=False)
    """Makes the Gaussian profile; called once, when it is needed."""
    critic_terms: tuple[CriticTerm, CriticTerm] | None = dataclasses.field(default=None, compare=False, repr=False)
    """A and B in the log density ratio."""
    fgan_terms: tuple[CriticTerm, CriticTerm] | None = dataclasses.field(default=None, compare=False, repr=False)
    """T and f*(T) with f-GAN's output activation, where that is another function of v."""
    slope_at_zero: float = dataclasses.field(default=math.nan, compare=False)
    """h'(0) = f''(1) / 2: the weight against mse where distributions are close; inf where f has a kink at 1."""
    range: str = dataclasses.field(default="", compare=False)
    """The values it can take."""
    advice: str = dataclasses.field(default="", compare=False)
    """When to choose it."""

    @property
    def key(self) -> str:
        """The name by which :func:`get_divergence` finds it, with its parameter: "alpha:0.3"."""
        return self.name if self.parameter is None else f"{self.name}:{self.parameter:g}"

    @functools.cached_property
    def gaussian(self) -> Profile:
        """The Gaussian profile: h and h' as functions of the squared Mahalanobis distance."""
        if self.make_profile is None:
            raise ValueError(f"divergence {self.key!r} has no Gaussian profile")
        return self.make_profile()

    def f(self, u: Tensor) -> Tensor:
        """The generator at u > 0, same shape.

        Raises:
            ValueError: for mse, which has none.
        """
        if self.generator is None:
            raise ValueError(f"divergence {self.key!r} has no generator f; use kl or jeffreys")
        return self.generator(u)

    def profile(self, s: Tensor) -> Tensor:
        """h(s): the divergence of two Gaussians of one covariance at squared Mahalanobis distance s >= 0, same shape."""
        return profiles.value(self.gaussian, s)

    def profile_grad(self, s: Tensor) -> Tensor:
        """h'(s), same shape as s."""
        return profiles.slope(self.gaussian, s)

    def critic(self, v: Tensor, parametrization: str = "log_ratio") -> tuple[Tensor, Tensor]:
        """A(v) and B(v) of the variational bound E_p[A] - E_q[B], same shape as v.

        Raises:
            ValueError: for mse, which has no variational form, or an unknown parametrization.
        """
        a, b = self.terms(parametrization)
        return critics.value(a, v), critics.value(b, v)

    def terms(self, parametrization: str = "log_ratio") -> tuple[CriticTerm, CriticTerm]:
        """The two terms of the variational bound for "log_ratio" (v = log p/q) or "fgan" (f-GAN's activations)."""
        if parametrization not in ("log_ratio", "fgan"):
            raise ValueError(f"parametrization must be 'log_ratio' or 'fgan', got {parametrization!r}")
        if self.critic_terms is None:
            raise ValueError(f"divergence {self.key!r} has no variational form (it is no f-divergence); use kl or jeffreys")
        return self.fgan_terms or self.critic_terms if parametrization == "fgan" else self.critic_terms

    @staticmethod
    def from_generator(f: Elementwise, name: str = "custom") -> Divergence:
        """A divergence from any convex generator.

        Args:
            f: elementwise on float64 tensors of u > 0, in torch operations, convex, f(1) = 0, twice differentiable.
            name: how messages and reports call it.

        Raises:
            TypeError: f is no function from tensors to tensors of the same shape.
            ValueError: f(1) is not 0, f is not convex, or f has kinks (use total_variation or hockey_stick).
        """
        return _from_generator(f, name)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the catalogue: a name, how else people call it, and its divergence, for a parameter if it has one."""

    name: str
    aliases: tuple[str, ...]
    make: Callable[..., Divergence]
    parameter: str | None = None
    """The name of the parameter, as a keyword of :func:`get_divergence`."""
    example: float | None = None
    """A usual value of the parameter."""
    check: Callable[[float], str | None] = lambda value: None
    """What is wrong with a value of the parameter, and the remedy; None if nothing."""


def _stable_jensen_shannon(v: Tensor) -> Tensor:
    half = v / 2
    log_cosh = torch.log1p(2 * torch.sinh(half / 2).square())
    near = torch.exp(half) / 2 * (v * torch.sinh(half) - 2 * torch.cosh(half) * log_cosh)
    # Far out the form above overflows before f does; there one of the two logarithms has died away.
    below = (v * torch.exp(v) - (1 + torch.exp(v)) * (F.softplus(v) - LOG2)) / 2
    above = torch.exp(v) * (LOG2 - F.softplus(-v)) / 2 - (F.softplus(v) - LOG2) / 2
    return torch.where(v.abs() < 10, near, torch.where(v < 0, below, above))


def _mse() -> Divergence:
    return Divergence(
        "mse",
        formula="none: h(s) = s",
        make_profile=lambda: ElementaryProfile(1.0, 0.0),
        slope_at_zero=1.0,
        range="[0, inf)",
        advice="The usual regression loss; equals Jeffreys between Gaussians.",
    )


def _kl() -> Divergence:
    return Divergence(
        "kl",
        formula="u log u",
        generator=lambda u: torch.xlogy(u, u),
        log_generator=lambda v: v * torch.exp(v),
        make_profile=lambda: ElementaryProfile(0.5, 0.0),
        critic_terms=(CriticRow(constant=1, linear=-1, rate=-1), CriticRow(exponential=1)),
        fgan_terms=(CriticRow(linear=1), CriticRow(exponential=1, shift=1)),
        slope_at_zero=0.5,
        range="[0, inf)",
        advice="Half of mse: the concept-ablation objective.",
    )


def _reverse_kl() -> Divergence:
    return Divergence(
        "reverse_kl",
        formula="-log u",
        generator=lambda u: -torch.log(u),
        log_generator=lambda v: -v,
        make_profile=lambda: ElementaryProfile(0.5, 0.0),
        critic_terms=(CriticRow(exponential=-1, rate=-1), CriticRow(constant=-1, linear=1)),
        slope_at_zero=0.5,
        range="[0, inf)",
        advice="As kl between Gaussians; mode-seeking in the variational form.",
    )


def _jeffreys() -> Divergence:
    return Divergence(
        "jeffreys",
        formula="(u - 1) log u",
        generator=lambda u: (u - 1) * torch.log(u),
        log_generator=lambda v: v * torch.expm1(v),
        make_profile=lambda: ElementaryProfile(1.0, 0.0),
        critic_terms=(
            CriticRow(constant=1, linear=-1, exponential=-1, rate=-1),
            CriticRow(constant=-1, linear=1, exponential=1),
        ),
        slope_at_zero=1.0,
        range="[0, inf)",
        advice="kl plus reverse_kl; as mse between Gaussians.",
    )


def _pearson_chi2() -> Divergence:
    return Divergence(
        "pearson_chi2",
        formula="(u - 1)^2",
        generator=lambda u: (u - 1).square(),
        log_generator=lambda v: torch.expm1(v).square(),
        make_profile=lambda: ElementaryProfile(1.0, 1.0),
        critic_terms=(
            CriticRow(constant=-2, exponential=2, exponent=-1, rate=-1),
            CriticRow(constant=-1, exponential=1, exponent=2),
        ),
        fgan_terms=(CriticRow(linear=1), CriticRow(linear=1, square=0.25)),
        slope_at_zero=1.0,
        range="[0, inf)",
        advice="Amplifies samples with a large error; a straight line beyond s = 80.",
    )


def _neyman_chi2() -> Divergence:
    return Divergence(
        "neyman_chi2",
        formula="(1 - u)^2 / u",
        generator=lambda u: (1 - u).square() / u,
        log_generator=lambda v: 4 * torch.sinh(v / 2).square(),
        make_profile=lambda: ElementaryProfile(1.0, 1.0),
        critic_terms=(
            CriticRow(constant=1, exponential=-1, exponent=2, rate=-1),
            CriticRow(constant=2, exponential=-2, exponent=-1),
        ),
        fgan_terms=(CriticRow(constant=1, exponential=-1), CriticRow(constant=2, exponential=-2, exponent=0.5)),
        slope_at_zero=1.0,
        range="[0, inf)",
        advice="As pearson_chi2 between Gaussians; the roles of p and q swapped.",
    )


def _squared_hellinger() -> Divergence:
    return Divergence(
        "squared_hellinger",
        formula="(sqrt(u) - 1)^2 / 2",
        generator=lambda u: (torch.sqrt(u) - 1).square() / 2,
        log_generator=lambda v: torch.expm1(v / 2).square() / 2,
        make_profile=lambda: ElementaryProfile(1 / 8, -1 / 8),
        critic_terms=(
            CriticRow(constant=0.5, exponential=-0.5, exponent=0.5, rate=-1),
            CriticRow(constant=-0.5, exponential=0.5, exponent=0.5),
        ),
        fgan_terms=(
            CriticRow(constant=0.5, exponential=-0.5, rate=-1),
            CriticRow(constant=-0.5, exponential=0.5),
        ),
        slope_at_zero=1 / 8,
        range="[0, 1]",
        advice="Damps samples with a large error; the paper's choice, preserves best.",
    )


def _alpha(a: float) -> Divergence:
    return Divergence(
        "alpha",
        a,
        formula="(u^a - a u + a - 1) / (a (a - 1))",
        generator=lambda u: (u**a - a * u + a - 1) / (a * (a - 1)),
        log_generator=lambda v: (torch.expm1(a * v) - a * torch.expm1(v)) / (a * (a - 1)),
        make_profile=lambda: ElementaryProfile(0.5, a * (a - 1) / 2),
        critic_terms=(
            CriticRow(constant=-1 / (a - 1), exponential=1 / (a - 1), exponent=1 - a, rate=-1),
            CriticRow(constant=-1 / a, exponential=1 / a, exponent=a),
        ),
        slope_at_zero=0.5,
        range="[0, 1/(a (1 - a))] for 0 < a < 1, else [0, inf)",
        advice="A continuous knob: 0 < a < 1 damps large errors, a > 1 or a < 0 amplifies them.",
    )


def _check_alpha(a: float) -> str | None:
    if a == 0:
        return "alpha = 0 is the limit reverse_kl; use 'reverse_kl'"
    return "alpha = 1 is the limit kl; use 'kl'" if a == 1 else None


def _jensen_shannon() -> Divergence:
    return Divergence(
        "jensen_shannon",
        formula="(u log u - (u + 1) log((u + 1)/2)) / 2",
        generator=lambda u: (torch.xlogy(u, u) - (u + 1) * torch.log((u + 1) / 2)) / 2,
        log_generator=_stable_jensen_shannon,
        make_profile=lambda: TabulatedProfile(lambda v: 1 / (4 * torch.cosh(v / 2))),
        critic_terms=(
            CriticRow(constant=LOG2 / 2, softplus=-0.5, rate=-1),
            CriticRow(constant=-LOG2 / 2, softplus=0.5),
        ),
        slope_at_zero=1 / 8,
        range="[0, log 2]",
        advice="Bounded and symmetric, close to squared_hellinger; exact here, without a critic.",
    )


def _total_variation() -> Divergence:
    return Divergence(
        "total_variation",
        formula="|u - 1| / 2",
        generator=lambda u: (u - 1).abs() / 2,
        log_generator=lambda v: torch.expm1(v).abs() / 2,
        make_profile=lambda: KinkedProfile(1.0),
        critic_terms=(CriticRow(constant=0.5, step=-1, rate=-1), CriticRow(constant=-0.5, step=1)),
        fgan_terms=(
            CriticRow(constant=-0.5, sigmoid=1, rate=2),
            CriticRow(constant=-0.5, sigmoid=1, rate=2),
        ),
        slope_at_zero=math.inf,
        range="[0, 1]",
        advice="Weighs every sample by the sign of its error alone; its slope is infinite at 0.",
    )


def _le_cam() -> Divergence:
    return Divergence(
        "le_cam",
        formula="(u - 1)^2 / (2 (u + 1))",
        generator=lambda u: (u - 1).square() / (2 * (u + 1)),
        log_generator=lambda v: torch.expm1(v) * torch.tanh(v / 2) / 2,
        make_profile=lambda: TabulatedProfile(lambda v: 1 / (2 * torch.cosh(v / 2) ** 3)),
        critic_terms=(
            CriticRow(constant=0.5, sigmoid_square=-2, rate=-1),
            CriticRow(constant=-0.5, sigmoid_square=2),
        ),
        slope_at_zero=1 / 4,
        range="[0, 1]",
        advice="Bounded and symmetric, saturates a little before squared_hellinger.",
    )


def _skew_jensen_shannon(w: float) -> Divergence:
    shift = math.log((1 - w) / w)
    scale = math.sqrt(w * (1 - w)) / 2

    def log_generator(v: Tensor) -> Tensor:
        small = torch.expm1(v)
        log_mixture = torch.where(v < 1, torch.log1p(w * small), math.log(1 - w) + F.softplus(v - shift))
        return w * v * torch.exp(v) - (1 + w * small) * log_mixture

    return Divergence(
        "skew_jensen_shannon",
        w,
        formula="w u log u - (w u + 1 - w) log(w u + 1 - w)",
        generator=lambda u: w * torch.xlogy(u, u) - (w * u + 1 - w) * torch.log(w * u + 1 - w),
        log_generator=log_generator,
        make_profile=lambda: TabulatedProfile(lambda v: scale / torch.cosh((v - shift) / 2)),
        critic_terms=(
            CriticRow(constant=-w * math.log(w), softplus=-w, rate=-1, shift=shift),
            CriticRow(constant=(1 - w) * math.log(1 - w), softplus=1 - w, shift=shift),
        ),
        slope_at_zero=w * (1 - w) / 2,
        range="[0, -w log w - (1 - w) log(1 - w)]",
        advice="Jensen-Shannon with the mixture at w p + (1 - w) q; w = 1/2 is jensen_shannon.",
    )


def _check_skew(w: float) -> str | None:
    return None if 0 < w < 1 else "the weight must lie strictly between 0 and 1, such as 0.3"


def _shifted_log() -> Divergence:
    return Divergence(
        "shifted_log",
        formula="log 2 - log(u + 1)",
        generator=lambda u: LOG2 - torch.log1p(u),
        log_generator=lambda v: LOG2 - F.softplus(v),
        make_profile=lambda: TabulatedProfile(lambda v: torch.exp(v / 2) / (4 * torch.cosh(v / 2) ** 2)),
        critic_terms=(
            CriticRow(sigmoid=-1, rate=-1),
            CriticRow(constant=-LOG2, softplus=1, sigmoid=-1),
        ),
        slope_at_zero=1 / 8,
        range="[0, log 2]",
        advice="The log(1 + r) of GAN training; as jensen_shannon between Gaussians.",
    )


def _hockey_stick(g: float) -> Divergence:
    shift = math.log(g)
    excess = max(1 - g, 0.0)
    return Divergence(
        "hockey_stick",
        g,
        formula="max(u - g, 0) - max(1 - g, 0)",
        generator=lambda u: (u - g).clamp(min=0) - excess,
        log_generator=lambda v: g * torch.expm1(v - shift).clamp(min=0) - excess,
        make_profile=lambda: KinkedProfile(g),
        critic_terms=(
            CriticRow(constant=1, step=-1, rate=-1, shift=shift),
            CriticRow(constant=excess, step=g, shift=shift),
        ),
        slope_at_zero=math.inf if g == 1 else 0.0,
        range="[0, 1]" if g >= 1 else f"[0, {g:g}]",
        advice="Differential privacy's divergence: counts only ratios above g; g = 1 is total_variation.",
    )


def _check_hockey_stick(g: float) -> str | None:
    return None if g > 0 else "the threshold must be > 0, such as 2"


CATALOGUE: tuple[Entry, ...] = (
    Entry("mse", ("l2", "squared_error"), _mse),
    Entry("kl", ("kullback_leibler", "forward_kl"), _kl),
    Entry("reverse_kl", ("rkl",), _reverse_kl),
    Entry("jeffreys", ("j", "symmetric_kl"), _jeffreys),
    Entry("pearson_chi2", ("chi2", "chi_square", "chi_squared", "pearson"), _pearson_chi2),
    Entry("neyman_chi2", ("neyman", "reverse_chi2"), _neyman_chi2),
    Entry("squared_hellinger", ("hellinger", "h", "h2"), _squared_hellinger),
    Entry("alpha", ("alpha_divergence",), _alpha, "alpha", 0.3, _check_alpha),
    Entry("jensen_shannon", ("js", "jsd", "gan"), _jensen_shannon),
    Entry("total_variation", ("tv",), _total_variation),
    Entry("le_cam", ("lecam", "triangular"), _le_cam),
    Entry("skew_jensen_shannon", ("skew_js", "weighted_js"), _skew_jensen_shannon, "w", 0.3, _check_skew),
    Entry("shifted_log", ("sl",), _shifted_log),
    Entry("hockey_stick", ("egamma",), _hockey_stick, "g", 2.0, _check_hockey_stick),
)

_BY_NAME: Mapping[str, Entry] = {name: entry for entry in CATALOGUE for name in (entry.name, *entry.aliases)}


def divergences() -> tuple[str, ...]:
    """The names of the catalogue, in its order."""
    return tuple(entry.name for entry in CATALOGUE)


def get_divergence(divergence: str | Divergence, **parameter: float) -> Divergence:
    """A divergence by name or alias, its parameter as keyword or after a colon.

    ``get_divergence("alpha", alpha=0.3) == get_divergence("alpha:0.3")``.

    Raises:
        TypeError: neither a name nor a Divergence, or a keyword that the divergence does not have.
        ValueError: an unknown name (the closest ones are named), a missing or impossible parameter.
    """
    if isinstance(divergence, Divergence):
        if parameter:
            raise TypeError(f"divergence {divergence.key!r} is given already; its parameter cannot be changed")
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(f"divergence must be a name or a Divergence, got {type(divergence).__name__}")
    return _get_divergence(divergence, tuple(sorted(parameter.items())))


@functools.lru_cache(maxsize=1024)
def _get_divergence(text: str, keywords: tuple[tuple[str, float], ...]) -> Divergence:
    spelled, colon, tail = text.strip().lower().partition(":")
    name = spelled.replace("-", "_").replace(" ", "_")
    entry = _BY_NAME.get(name)
    if entry is None:
        close = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(divergences())}"
        raise ValueError(f"unknown divergence {text!r}; {hint}")
    unknown = [keyword for keyword, _ in keywords if keyword != entry.parameter]
    if entry.parameter is None:
        if colon or keywords:
            raise (TypeError if unknown else ValueError)(f"divergence {entry.name!r} has no parameter; use {entry.name!r}")
        return entry.make()
    usage = f"'{entry.name}:{entry.example:g}' or get_divergence('{entry.name}', {entry.parameter}={entry.example:g})"
    if unknown:
        raise TypeError(f"divergence {entry.name!r} has no parameter {unknown[0]!r}; use {usage}")
    if bool(colon) == bool(keywords):
        raise ValueError(f"divergence {entry.name!r} needs its parameter {entry.parameter!r} once; use {usage}")
    try:
        value = float(keywords[0][1] if keywords else tail)
    except (TypeError, ValueError):
        raise ValueError(f"divergence {text!r}: {entry.parameter} must be a number; use {usage}") from None
    wrong = "it must be finite" if not math.isfinite(value) else entry.check(value)
    if wrong:
        raise ValueError(f"divergence '{entry.name}' with {entry.parameter} = {value:g}: {wrong}")
    return entry.make(value)


def _from_generator(f: Elementwise, name: str) -> Divergence:
    grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
    try:
        values = f(torch.exp(grid))
    except Exception as error:
        raise TypeError(f"f must take a float64 tensor of u > 0 and return one; it raised {error!r}") from error
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        raise TypeError("f must return a tensor of the shape that it is given, elementwise in torch operations")
    at_one = float(f(torch.ones((), dtype=torch.float64)))
    if not abs(at_one) <= 1e-9:
        raise ValueError(f"f(1) must be 0, got {at_one:g}; subtract f(1) from f")

    def curvature(u: Tensor) -> Tensor:
        return critics.derivative(lambda w: critics.derivative(f, w), u).detach()

    second = curvature(torch.exp(grid))
    if not torch.isfinite(second).all() or second.min() < -1e-9 * second.abs().max():
        worst = float(torch.exp(grid[int(second.nan_to_num(nan=-math.inf).argmin())]))
        raise ValueError(f"f must be convex and twice differentiable; its second derivative fails near u = {worst:g}")

    def tilted_curvature(v: Tensor) -> Tensor:
        return torch.exp(1.5 * v) * curvature(torch.exp(v))

    def make_profile() -> Profile:
        profile = TabulatedProfile(tilted_curvature, spread=2.5)
        _refuse_kinks(f, profile, name)
        return profile

    terms = GeneratedTerm(f, conjugate=False), GeneratedTerm(f, conjugate=True)
    return Divergence(
        name,
        custom=f,
        formula="given as a function",
        generator=f,
        log_generator=lambda v: f(torch.exp(v)),
        make_profile=make_profile,
        critic_terms=terms,
        slope_at_zero=float(curvature(torch.ones((), dtype=torch.float64))) / 2,
        range="[0, sup]",
        advice="Your own.",
    )


def _refuse_kinks(f: Elementwise, profile: Profile, name: str) -> None:
    """The curvature of a kink is a spike that quadrature does not see: h from it then misses E[f] itself."""
    s = torch.ones((), dtype=torch.float64)
    z = torch.arange(-12, 12, 1 / 512, dtype=torch.float64)
    direct = (torch.exp(-z.square() / 2) * f(torch.exp(z - 0.5))).sum() / (512 * math.sqrt(2 * math.pi))
    if not torch.isclose(profile.value(s), direct, rtol=1e-5, atol=0):
        raise ValueError(
            f"generator {name!r} has a kink: its second derivative does not account for its values. "
            "Use total_variation or hockey_stick, or smooth it"
        )
