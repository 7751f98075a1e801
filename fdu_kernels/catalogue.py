"""Every divergence of the package, each stated once: adding one touches this file and nothing else.

u = p/q is the density ratio and v = log u. Generators have the literature's standard normalisation. What the fields
mean: fdu_kernels.divergence and .critic; f-GAN's output activations are those of Nowozin et al. 2016, table 6.
"""

from __future__ import annotations

import copyreg
import dataclasses
import difflib
import functools
import math
import pickle
import sys
from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from fdu_kernels.critic import CriticRow
from fdu_kernels.divergence import MADE_BY_USERS, Divergence
from fdu_kernels.internals import held_constant


@dataclasses.dataclass(frozen=True)
class Family:
    """Divergences with a parameter, built once and not for every way to write it: a table takes a tenth of a second."""

    build: Callable[[float], Divergence]
    parameter: str
    default: float


@functools.lru_cache(maxsize=1024)
def _alpha(alpha: float) -> Divergence:
    if alpha in (0, 1):
        instead = "reverse_kl" if alpha == 0 else "kl"
        raise ValueError(f'alpha must not be {alpha:g}: its formula divides by 0; use "{instead}", the limit')
    row_a = CriticRow(expm1=1 / (alpha - 1), expm1_rate=alpha - 1)
    return Divergence(
        "alpha", (("alpha", alpha),), aliases=("alpha_divergence",), formula="(u^a - a u + a - 1) / (a (a - 1))",
        advice="a is the parameter: 0 < a < 1 damps large errors (most at 1/2); a < 0 and a > 1 amplify them.",
        upper=1 / (alpha * (1 - alpha)) if 0 < alpha < 1 else math.inf,
        generator=lambda u: (u**alpha - alpha * u + alpha - 1) / (alpha * (alpha - 1)),
        log_curvature=lambda v: alpha * v, exponential=(0.5, alpha * (alpha - 1) / 2),
        log_ratio_rows=(row_a, CriticRow(expm1=1 / alpha, expm1_rate=alpha)),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _skew_jensen_shannon(w: float) -> Divergence:
    if not 0 < w < 1:
        raise ValueError(f"w of skew_jensen_shannon must lie strictly between 0 and 1, not {w:g}")
    logit = math.log(w / (1 - w))
    return Divergence(
        "skew_jensen_shannon", (("w", w),), aliases=("skew_js", "sjs"),
        formula="w u log u - (w u + 1 - w) log(w u + 1 - w)",
        advice="jensen_shannon with weights w and 1 - w: bounded; close to w times kl for small w.",
        upper=-w * math.log(w) - (1 - w) * math.log1p(-w),
        generator=lambda u: w * torch.xlogy(u, u) - torch.xlogy(w * u + 1 - w, w * u + 1 - w),
        log_curvature=lambda v: math.log1p(-w) + logsigmoid(v + logit),
        log_ratio_rows=(CriticRow(softplus=-w, scale=-1, logit=-logit), CriticRow(softplus=1 - w, logit=logit)),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _hockey_stick(g: float) -> Divergence:
    if not g > 0:
        raise ValueError(f"g of hockey_stick must be positive, not {g:g}")
    offset = max(1 - g, 0.0)
    row_a, row_b = CriticRow(step=1, threshold=math.log(g)), CriticRow(const=offset, step=g, threshold=math.log(g))
    return Divergence(
        "hockey_stick", (("g", g),), aliases=("hockey",), formula="max(u - g, 0) - max(1 - g, 0)",
        advice="Counts only where p > g q (differential privacy); for g > 1 small errors have no gradient.",
        upper=min(1.0, g), generator=lambda u: torch.clamp(u - g, min=0) - offset, kinks=((g, 1.0),),
        log_ratio_rows=(row_a, row_b), fgan_rows=(CriticRow(sigmoid=1), CriticRow(const=offset, sigmoid=g)),
    )  # fmt: skip


_ENTRIES: tuple[Divergence | Family, ...] = (
    Divergence(
        "mse", aliases=("l2", "squared_error"), formula="h(s) = s",
        advice="The usual regression loss, and the baseline for comparisons.", exponential=(1.0, 0.0),
    ),
    Divergence(
        "kl", aliases=("kl_divergence", "kullback_leibler", "forward_kl"), formula="u log u",
        advice="Half the mean squared error: the gradient is proportional to the error.",
        generator=lambda u: torch.xlogy(u, u), log_curvature=lambda v: v, exponential=(0.5, 0.0),
        log_ratio_rows=(CriticRow(const=1, linear=1), CriticRow(exp=1, exp_rate=1)),
        fgan_rows=(CriticRow(linear=1), CriticRow(exp=math.exp(-1), exp_rate=1)),
    ),
    Divergence(
        "reverse_kl", aliases=("rkl", "kl_reverse"), formula="-log u",
        advice="The same loss as kl between Gaussians; with a critic it seeks modes.",
        generator=lambda u: -torch.log(u), log_curvature=torch.zeros_like, exponential=(0.5, 0.0),
        log_ratio_rows=(CriticRow(exp=-1, exp_rate=-1), CriticRow(const=-1, linear=1)),
    ),
    Divergence(
        "jeffreys", aliases=("j", "symmetric_kl"), formula="(u - 1) log u",
        advice="kl + reverse_kl: symmetric; equal to mse between Gaussians.",
        generator=lambda u: (u - 1) * torch.log(u), log_curvature=lambda v: -logsigmoid(-v), exponential=(1.0, 0.0),
        log_ratio_rows=(CriticRow(linear=1, expm1=-1, expm1_rate=-1), CriticRow(linear=1, expm1=1, expm1_rate=1)),
    ),
    Divergence(
        "pearson_chi2", aliases=("chi2", "chi_square", "chi_squared", "pearson"), formula="(u - 1)^2",
        advice="Amplifies large errors, so that a few samples dominate each step: the larger s0, the slower it erases.",
        generator=lambda u: (u - 1).square(), log_curvature=lambda v: math.log(2) + 2 * v, exponential=(1.0, 1.0),
        log_ratio_rows=(CriticRow(expm1=2, expm1_rate=1), CriticRow(expm1=1, expm1_rate=2)),
        fgan_rows=(CriticRow(linear=1), CriticRow(linear=1, square=0.25)),
    ),
    Divergence(
        "neyman_chi2", aliases=("neyman", "reverse_chi2"), formula="(1 - u)^2 / u",
        advice="pearson_chi2 with p and q exchanged; the same loss between Gaussians.",
        generator=lambda u: (1 - u).square() / u, log_curvature=lambda v: math.log(2) - v, exponential=(1.0, 1.0),
        log_ratio_rows=(CriticRow(expm1=-1, expm1_rate=-2), CriticRow(expm1=-2, expm1_rate=-1)),
        fgan_rows=(CriticRow(expm1=-1, expm1_rate=1), CriticRow(expm1=-2, expm1_rate=0.5)),
    ),
    Divergence(
        "squared_hellinger", aliases=("hellinger", "h", "h2"), formula="(sqrt(u) - 1)^2 / 2",
        advice="The default. Bounded; damps large errors, so that no sample dominates a step.",
        upper=1.0, generator=lambda u: (torch.sqrt(u) - 1).square() / 2, log_curvature=lambda v: v / 2 - math.log(4),
        exponential=(0.125, -0.125),
        log_ratio_rows=(CriticRow(expm1=-0.5, expm1_rate=-0.5), CriticRow(expm1=0.5, expm1_rate=0.5)),
        fgan_rows=(CriticRow(expm1=-0.5, expm1_rate=-1), CriticRow(expm1=0.5, expm1_rate=1)),
    ),
    Family(_alpha, "alpha", 0.5),
    Divergence(
        "jensen_shannon", aliases=("js", "jsd"), formula="(u log u - (u + 1) log((u + 1)/2)) / 2",
        advice="Bounded and symmetric; damps large errors about as much as squared_hellinger.",
        upper=math.log(2), generator=lambda u: (torch.xlogy(u, u) - (u + 1) * torch.log((u + 1) / 2)) / 2,
        log_curvature=lambda v: logsigmoid(v) - math.log(2),
        log_ratio_rows=(CriticRow(softplus=-0.5, scale=-1), CriticRow(softplus=0.5)),
    ),
    Divergence(
        "total_variation", aliases=("tv", "tvd"), formula="|u - 1| / 2",
        advice="Robust to outliers, but noisy near the optimum: the gradient does not vanish with the error.",
        upper=1.0, generator=lambda u: (u - 1).abs() / 2, kinks=((1.0, 1.0),),
        log_ratio_rows=(CriticRow(const=-0.5, step=1), CriticRow(const=-0.5, step=1)),
        fgan_rows=(CriticRow(tanh=0.5, scale=2), CriticRow(tanh=0.5, scale=2)),
    ),
    Divergence(
        "le_cam", aliases=("lecam", "triangular"), formula="(u - 1)^2 / (2 (u + 1))",
        advice="Bounded and symmetric; damps large errors; twice as steep at 0 as jensen_shannon.",
        upper=1.0, generator=lambda u: (u - 1).square() / (2 * (u + 1)),
        log_curvature=lambda v: math.log(4) + 2 * logsigmoid(v) + logsigmoid(-v),
        log_ratio_rows=(CriticRow(tanh=1, tanh_squared=-0.5), CriticRow(tanh=1, tanh_squared=0.5)),
    ),
    Family(_skew_jensen_shannon, "w", 0.3),
    Divergence(
        "shifted_log", aliases=("sl",), formula="log 2 - log(u + 1)",
        advice="The same loss as jensen_shannon between Gaussians; its critic is bounded in (-1, 0).",
        upper=math.log(2), generator=lambda u: math.log(2) - torch.log1p(u), log_curvature=lambda v: 2 * logsigmoid(v),
        log_ratio_rows=(CriticRow(sigmoid=-1, scale=-1), CriticRow(softplus=1, sigmoid=-1)),
    ),
    Family(_hockey_stick, "g", 2.0),
)  # fmt: skip
FAMILIES = {entry.build(entry.default).name: entry for entry in _ENTRIES if isinstance(entry, Family)}
_MADE = (entry if isinstance(entry, Divergence) else entry.build(entry.default) for entry in _ENTRIES)
CATALOGUE = {made.name: made for made in _MADE}
"""Name -> divergence; of a family, the one of the default."""

_NAMES = {spelling: name for name, made in CATALOGUE.items() for spelling in (name, *made.aliases)}


def divergences() -> tuple[str, ...]:
    """The names of the catalogue. Some take a parameter, with a default in :func:`get_divergence`."""
    return tuple(CATALOGUE)


def get_divergence(name: str | Divergence, **parameters: float) -> Divergence:
    """A divergence by name, alias or spelling with parameter: ``get_divergence("alpha:0.3")``.

    Args:
        name: see :func:`divergences`; case, spaces and hyphens are ignored. A Divergence is returned unchanged.
        parameters: alpha=0.3 for "alpha" (default 0.5), w for "skew_jensen_shannon" (0.3), g for "hockey_stick" (2).

    Raises ValueError for an unknown name (with the closest ones) or a parameter outside its range; TypeError
    for anything but a name, or for a parameter that this divergence does not have.
    """
    if isinstance(name, Divergence):
        if parameters:
            raise TypeError(f"parameters {sorted(parameters)} were given with a Divergence, which has its own")
        return name
    if not isinstance(name, str):
        remedy = "Divergence.from_generator makes one of a function f"
        raise TypeError(f"divergence must be a name or a Divergence, not {type(name).__name__}; {remedy}")
    return _lookup(name, tuple(sorted(parameters.items())) if parameters else ())


def find_divergence(key: str) -> Divergence:
    """The divergence whose ``key`` this is, of the catalogue or a user's own."""
    return MADE_BY_USERS.get(key) or get_divergence(key)


@held_constant
def _lookup(spelling: str, parameters: tuple[tuple[str, float], ...]) -> Divergence:
    return _build(spelling, parameters)  # torch.compile would trace into a cached function


@functools.lru_cache(maxsize=1024)
def _build(spelling: str, parameters: tuple[tuple[str, float], ...]) -> Divergence:
    typed, colon, suffix = (part.strip() for part in spelling.partition(":"))
    typed = typed.lower().replace("-", "_").replace(" ", "_")
    if typed not in _NAMES:
        close = difflib.get_close_matches(typed, _NAMES, n=3, cutoff=0.4)
        hint = f"closest: {', '.join(dict.fromkeys(_NAMES[found] for found in close))}; " if close else ""
        raise ValueError(f"unknown divergence {spelling!r}; {hint}known: {', '.join(CATALOGUE)}")
    name = _NAMES[typed]
    family = FAMILIES.get(name)
    wanted = None if family is None else family.parameter
    unexpected = [key for key, _ in parameters if key != wanted]
    if unexpected or (colon and wanted is None):
        takes = f"takes {wanted}" if wanted else "takes no parameter"
        raise TypeError(f"divergence {name!r} {takes}, but got {', '.join(unexpected) or suffix!r}")
    if family is None or not (colon or parameters):
        return CATALOGUE[name]
    if colon and parameters:
        raise TypeError(f"{wanted} of {name!r} was given twice: in {spelling!r} and as {wanted}={parameters[0][1]!r}")
    given: object = parameters[0][1] if parameters else suffix
    try:
        value = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{wanted} of divergence {name!r} must be a finite number, not {given!r}; example: {name}:0.3")
    return CATALOGUE[name] if value == family.default else family.build(value)


def _reduce(divergence: Divergence) -> tuple[Callable[..., Divergence], tuple[object, ...]]:
    """How a divergence pickles: by its name, or by the user's generator."""
    f = divergence.custom
    if f is None:
        return get_divergence, (divergence.key,)
    found: object = sys.modules.get(getattr(f, "__module__", ""))
    for part in getattr(f, "__qualname__", "").split("."):
        found = getattr(found, part, None)
    if found is not f:
        remedy = "define it with def at the top level of a module"
        raise pickle.PicklingError(f"the generator of {divergence.name!r} is a lambda or a local function; {remedy}")
    return Divergence.from_generator, (f, divergence.name, tuple(place for place, _ in divergence.kinks))


copyreg.pickle(Divergence, _reduce)
